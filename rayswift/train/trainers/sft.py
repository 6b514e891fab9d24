"""Supervised training as RaySwift does it: cross entropy, plain or weighted, and token accuracy (``pt``, ``sft``)."""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
from peft import PeftModel
from transformers.integrations import is_deepspeed_zero3_enabled

from rayswift import private
from rayswift.train.collate import Batch
from rayswift.train.loss import find_loss_head, trained_places
from rayswift.train.trainers.step import StepTraining


class SftTrainer(StepTraining):
    """Cross entropy of the trained tokens: ``pt`` and ``sft``."""

    #: Right tokens, trained tokens, all tokens, steps, steps that train any token.
    NUM_COUNTS = 5

    def __init__(self, *args: Any, router_aux_loss_coef: float = 0.0, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        base: Any = self.model.get_base_model() if isinstance(self.model, PeftModel) else self.model
        self.router_aux_loss_coef = router_aux_loss_coef if _is_mixture(base) else 0.0
        if _is_mixture(base):  # the model itself would add it only where it computes the loss
            base.config.output_router_logits, base.router_aux_loss_coef = False, 0.0
        # Liger has a loss of its own; ZeRO-3 gathers the head's weights where the head is called as it was built.
        own = self.args.use_liger_kernel or self.is_fsdp_enabled or is_deepspeed_zero3_enabled()
        with self.accelerator.autocast():
            self.loss_head = None if own else find_loss_head(self.model, self.args.label_smoothing_factor)
        # Joined rows are kept apart by their bounds; other forms of attention have a mask, made of their positions.
        self._knows_bounds = base.config._attn_implementation not in ("sdpa", "eager", "flex_attention")
        if self.loss_head is not None:
            # The Trainer counts the trained tokens of a step only for losses that ask for them.
            self.model_accepts_loss_kwargs = self.loss_is_scaled_for_ga = True

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Forward and backward pass of a micro-batch. Those of a step share what autocast makes of float32 weights,
        which it would else make for each. (Checkpointed layers may make it without gradients first: each for itself.)
        """
        if not self._losses and not self.args.gradient_checkpointing:
            torch.autocast_increment_nesting()
        return super().training_step(*args, **kwargs)

    def _get_grad_norm(self, *args: Any, **kwargs: Any) -> Any:
        """The norm of a step's gradients; its passes are over."""
        if not self.args.gradient_checkpointing and torch.autocast_decrement_nesting() == 0:
            torch.clear_autocast_cache()
        return super()._get_grad_norm(*args, **kwargs)

    def compute_loss(
        self, model: Any, inputs: Batch, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The mean over the step's trained tokens, each times its weight; counts right, trained and all tokens
        (no synchronisation)."""
        if not self.router_aux_loss_coef:
            return self._token_loss(model, inputs, return_outputs, num_items_in_batch)
        asked: Any = {**inputs, "output_router_logits": True}
        loss, outputs = self._token_loss(model, asked, True, num_items_in_batch)
        # Transformers' loss for the balance of experts, the mean over the micro-batches of a step.
        loss = loss + self.router_aux_loss_coef * outputs.aux_loss / self.current_gradient_accumulation_steps
        return (loss, outputs) if return_outputs else loss

    def _token_loss(self, model: Any, inputs: Batch, return_outputs: bool, num_items_in_batch: Any) -> Any:
        labels, mask, weights = inputs["labels"], inputs.get("attention_mask"), inputs.pop("loss_scale", None)
        tokens = torch.full((), labels.numel(), device=labels.device) if mask is None else mask.sum()
        if self.loss_head is not None:
            del inputs["labels"]
            places = inputs.pop("places")
            by_mask = "cu_seq_lens_q" in inputs and not self._knows_bounds
            with self.loss_head.scoring(labels, weights, places=places) as found, private.no_mask_questions(by_mask):
                outputs = model(**inputs)
            trained = torch.full((), len(places), device=labels.device)
            loss = found[0].loss / (trained.clamp(min=1) if num_items_in_batch is None else num_items_in_batch)
            if num_items_in_batch is not None and self.args.average_tokens_across_devices:
                loss *= self.accelerator.num_processes  # the count is that of all workers
            self._counts[:3] += torch.stack([found[0].right, trained, tokens.to(trained)]).to(self._counts)
            return (loss, outputs) if return_outputs else loss
        smoothing = self.args.label_smoothing_factor
        plain = weights is None and not smoothing
        self.compute_loss_func = None if plain else functools.partial(token_loss, weights=weights, smoothing=smoothing)
        if self.args.use_liger_kernel and self.model_accepts_loss_kwargs:  # its fused loss makes no logits
            inputs = {**inputs, "return_token_accuracy": True}  # type: ignore[dict-item]
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        if outputs.logits is not None:
            right, trained = count_right(outputs.logits.detach(), labels)
        else:
            trained = (labels[:, 1:] != -100).sum()
            accuracy = getattr(outputs, "token_accuracy", None)
            right = trained * (math.nan if accuracy is None else accuracy.detach())
        if model.training:
            self._counts[:3] += torch.stack([right.to(self._counts), trained.to(self._counts), tokens.to(self._counts)])
        return (loss, outputs) if return_outputs else loss

    def _prepare_inputs(self, inputs: Any) -> Any:
        """What the host can tell of a batch is found before the device has it, which would make the host wait."""
        if self.loss_head is not None and "labels" in inputs:
            inputs = {**inputs, "places": trained_places(inputs["labels"])}
            if "attention_mask" in inputs and bool(inputs["attention_mask"].all()):
                del inputs["attention_mask"]
        return super()._prepare_inputs(inputs)

    def _get_num_items_in_batch(self, batch_samples: list[Batch], device: torch.device) -> Any:
        """Trained tokens of a step on all workers: at least one, for a step without any divides by it too."""
        items = super()._get_num_items_in_batch(batch_samples, device)
        if not isinstance(items, torch.Tensor):
            return items
        self._counts[3:] += torch.stack([torch.ones_like(items), items > 0]).to(self._counts)
        return items.clamp(min=1)

    def train_metrics(self, counts: torch.Tensor, seconds: float, loss: float) -> dict[str, float]:
        """Loss of the steps that train any token, token accuracy and speed."""
        right, trained, tokens, steps, trained_steps = counts.tolist()
        if not trained:
            return {"tokens/s": tokens / seconds}
        loss *= steps / trained_steps if trained_steps else 1.0
        return {"loss": loss, "token_acc": right / trained, "tokens/s": tokens / seconds}

    def eval_counts(self, batch: Batch) -> torch.Tensor:
        """Summed loss, right tokens, trained tokens."""
        labels, places = batch.pop("labels"), batch.pop("places", None)
        batch.pop("loss_scale", None)
        if self.loss_head is not None:
            with self.accelerator.autocast(), self.loss_head.scoring(labels, smoothing=0.0, places=places) as found:
                self.model_wrapped(**batch)
            trained = (labels[:, 1:] != -100).sum()
            return torch.stack([found[0].loss, found[0].right, trained]).to(self._counts)
        with self.accelerator.autocast():
            logits = self.model_wrapped(**batch).logits
        loss = torch.nn.functional.cross_entropy(
            logits[:, :-1].float().flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100, reduction="sum"
        )
        return torch.stack([loss, *count_right(logits, labels)]).to(self._counts)

    def eval_means(self, counts: torch.Tensor) -> dict[str, float]:
        """Loss per trained token and token accuracy."""
        loss, right, trained = counts.tolist()
        return {"loss": loss / trained if trained else math.nan, "token_acc": right / trained if trained else math.nan}


def _is_mixture(model: Any) -> bool:
    """Whether a model has experts that Transformers' loss can balance."""
    return hasattr(model, "router_aux_loss_coef") and hasattr(model.config, "output_router_logits")


def count_right(logits: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Trained tokens whose most likely prediction is right, and all trained tokens.

    Args:
        logits: float (rows, length, vocabulary); position t predicts token t + 1.
        labels: int64 (rows, length), −100 where not trained.
    """
    mask = labels[:, 1:] != -100
    predicted = logits[:, :-1][mask].argmax(-1)
    return (predicted == labels[:, 1:][mask]).sum(), mask.sum()


def token_loss(
    outputs: Any,
    labels: torch.Tensor,
    num_items_in_batch: torch.Tensor | int | None = None,
    *,
    weights: torch.Tensor | None,
    smoothing: float = 0.0,
) -> torch.Tensor:
    """Cross entropy times each token's weight, over the number of trained tokens (SWIFT's ``--loss_scale``).

    Args:
        outputs: with ``logits``, float (rows, length, vocabulary).
        labels: int64 (rows, length), −100 where not trained.
        num_items_in_batch: trained tokens of the whole step; None: of these rows.
        weights: float32 (rows, length); None: every trained token counts the same.
        smoothing: ``--label_smoothing_factor``.
    """
    logits = outputs.logits[:, :-1].float().flatten(0, 1)
    losses = torch.nn.functional.cross_entropy(
        logits, labels[:, 1:].flatten(), ignore_index=-100, reduction="none", label_smoothing=smoothing
    )
    if weights is not None:
        losses = losses * weights[:, 1:].flatten()
    items = (labels[:, 1:] != -100).sum() if num_items_in_batch is None else num_items_in_batch
    return losses.sum() / items

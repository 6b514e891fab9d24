"""Supervised training as RaySwift does it: cross entropy, plain or weighted, and token accuracy (``pt``, ``sft``)."""

from __future__ import annotations

import functools
import math
from typing import Any

import torch

from rayswift.train.collate import Batch
from rayswift.train.trainers.step import StepTraining


class SftTrainer(StepTraining):
    """Cross entropy of the trained tokens: ``pt`` and ``sft``."""

    #: Right tokens, trained tokens, all tokens, steps, steps that train any token.
    NUM_COUNTS = 5

    def compute_loss(
        self, model: Any, inputs: Batch, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The model's own loss, or ours where tokens have weights or are smoothed; counts right, trained and all tokens
        (no synchronisation)."""
        labels, mask, weights = inputs["labels"], inputs.get("attention_mask"), inputs.pop("loss_scale", None)
        tokens = torch.tensor(labels.numel()) if mask is None else mask.sum()
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
        labels = batch.pop("labels")
        batch.pop("loss_scale", None)
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

"""Transformers' Trainer as RaySwift uses it: fed by the data path, telling the driver, saving whole checkpoints."""

from __future__ import annotations

import functools
import math
import os
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from transformers import Trainer, TrainerCallback
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from rayswift.data.token_rows import TokenRows
from rayswift.train.batches import Batch, Rank, eval_batches

if TYPE_CHECKING:
    from rayswift.train.plan import StepPlan

Push = Callable[[dict[str, Any]], None]


class StepTrainer(Trainer):
    """Trains from a loader that knows its own position, and reports every step.

    Args:
        loader: iterable of micro-batches from the step to resume at.
        step_plan: the run's steps.
        val_rows: validation rows, or None.
        rank: this worker's share.
        push: sends an event to the driver.
        commit: called on every worker after a checkpoint's files are written; makes it whole.
    """

    def __init__(
        self,
        *args: Any,
        loader: Any,
        step_plan: StepPlan,
        val_rows: TokenRows | None,
        rank: Rank,
        push: Push,
        commit: Callable[[StepTrainer], None],
        pad_token_id: int,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.loader, self.step_plan, self.val_rows, self.rank = loader, step_plan, val_rows, rank
        self.push, self.commit, self.pad_token_id = push, commit, pad_token_id
        self.last_saved_step = -1
        # Right tokens, trained tokens, all tokens; on the device, so that counting never waits for it.
        self._counts = torch.zeros(3, dtype=torch.float64, device=self.args.device)
        self._logged_at = time.monotonic()
        self.remove_callback(PrinterCallback)
        self.remove_callback(ProgressCallback)
        self.add_callback(_StepEvents(self))

    # --- data: RaySwift's loaders are already sharded, so Accelerate must not shard them again ---

    def get_train_dataloader(self) -> Any:
        """The loader itself."""
        return self.loader

    # --- metrics ---

    def compute_loss(
        self, model: Any, inputs: Batch, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The model's own loss, or the weighted one; counts right, trained and all tokens (no synchronisation)."""
        labels, mask, weights = inputs["labels"], inputs.get("attention_mask"), inputs.pop("loss_scale", None)
        tokens = torch.tensor(labels.numel()) if mask is None else mask.sum()
        self.compute_loss_func = None if weights is None else functools.partial(weighted_loss, weights=weights)
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        right, trained = count_right(outputs.logits.detach(), labels)
        if model.training:
            self._counts += torch.stack([right, trained, tokens.to(right)]).to(self._counts)
        return (loss, outputs) if return_outputs else loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Complete a row with token accuracy and speed over all workers and send it to the driver."""
        if "loss" in logs:
            counts = self._all_reduce(self._counts)
            now = time.monotonic()
            logs["token_acc"] = float(counts[0]) / max(float(counts[1]), 1.0)
            logs["tokens/s"] = float(counts[2] / max(now - self._logged_at, 1e-9))
            self._counts.zero_()
            self._logged_at = now
        logs["epoch"] = self.step_plan.epoch_of(self.state.global_step)
        row = {**logs, "global_step": self.state.global_step, "memory(GiB)": memory_gib()}
        self.state.log_history.append(row)
        if self.is_world_process_zero():
            self.push({"event": "log", "row": row})

    def _all_reduce(self, values: torch.Tensor) -> torch.Tensor:
        total = values.clone()
        if self.rank.world_size > 1:
            torch.distributed.all_reduce(total)
        return total.cpu()

    # --- evaluation ---

    @torch.no_grad()
    def evaluate(self, *_args: Any, metric_key_prefix: str = "eval", **_kwargs: Any) -> dict[str, float]:
        """Mean loss per trained token and token accuracy over the validation rows of all workers."""
        if self.val_rows is None:
            return {}
        started, model = time.monotonic(), self.model_wrapped
        was_training = model.training
        model.eval()
        # Summed loss, right tokens, trained tokens.
        totals = torch.zeros(3, dtype=torch.float64, device=self.args.device)
        size, batches = self.args.per_device_eval_batch_size, 0
        for batch in eval_batches(self.val_rows, size, self.rank, self.pad_token_id):
            batch = self._prepare_inputs(batch)
            labels = batch.pop("labels")
            batch.pop("loss_scale", None)
            with self.accelerator.autocast():
                logits = model(**batch).logits
            loss = torch.nn.functional.cross_entropy(
                logits[:, :-1].float().flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100, reduction="sum"
            )
            totals += torch.stack([loss, *count_right(logits, labels)]).to(totals)
            batches += 1
        model.train(was_training)
        metrics = self._eval_metrics(self._all_reduce(totals), metric_key_prefix, time.monotonic() - started, batches)
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        self._logged_at += time.monotonic() - started
        return metrics

    def _eval_metrics(self, totals: torch.Tensor, prefix: str, seconds: float, batches: int) -> dict[str, float]:
        loss, right, trained = (float(value) for value in totals)
        assert self.val_rows is not None
        return {
            f"{prefix}_loss": loss / trained if trained else math.nan,
            f"{prefix}_runtime": seconds,
            f"{prefix}_samples_per_second": len(self.val_rows) / seconds,
            f"{prefix}_steps_per_second": batches / seconds,
            f"{prefix}_token_acc": right / trained if trained else math.nan,
        }

    # --- checkpoints ---

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Let Transformers write the files, then make the checkpoint whole."""
        step = self.state.global_step
        if self.state.best_global_step:
            best = f"checkpoint-{self.state.best_global_step}"
            self.state.best_model_checkpoint = os.path.join(str(self.args.output_dir), best)
        super()._save_checkpoint(model, trial)
        self.commit(self)
        self.last_saved_step = step

    def save_final(self) -> None:
        """The last step is always evaluated and saved (SWIFT), also when a stream ended early."""
        if self.args.save_strategy != "no" and self.last_saved_step != self.state.global_step > 0:
            self._save_checkpoint(self.model_wrapped, None)


class _StepEvents(TrainerCallback):
    """One event per optimiser step, and SWIFT's rule that the last step is evaluated and saved."""

    def __init__(self, trainer: StepTrainer) -> None:
        self.trainer = trainer

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> Any:
        """After each optimiser step."""
        if state.is_world_process_zero:
            self.trainer.push({"event": "step", "step": state.global_step})
        if state.global_step >= state.max_steps:
            control.should_log = True
            control.should_evaluate = control.should_evaluate or args.eval_strategy != "no"
            control.should_save = control.should_save or args.save_strategy != "no"
        return control


def count_right(logits: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Trained tokens whose most likely prediction is right, and all trained tokens.

    Args:
        logits: float (rows, length, vocabulary); position t predicts token t + 1.
        labels: int64 (rows, length), −100 where not trained.
    """
    mask = labels[:, 1:] != -100
    predicted = logits[:, :-1][mask].argmax(-1)
    return (predicted == labels[:, 1:][mask]).sum(), mask.sum()


def weighted_loss(
    outputs: Any, labels: torch.Tensor, num_items_in_batch: torch.Tensor | int | None = None, *, weights: torch.Tensor
) -> torch.Tensor:
    """Cross entropy times each token's weight, over the number of trained tokens (SWIFT's ``--loss_scale``).

    Args:
        outputs: with ``logits``, float (rows, length, vocabulary).
        labels: int64 (rows, length), −100 where not trained.
        num_items_in_batch: trained tokens of the whole step; None: of these rows.
        weights: float32 (rows, length).
    """
    logits = outputs.logits[:, :-1].float().flatten(0, 1)
    losses = torch.nn.functional.cross_entropy(logits, labels[:, 1:].flatten(), ignore_index=-100, reduction="none")
    items = (labels[:, 1:] != -100).sum() if num_items_in_batch is None else num_items_in_batch
    return (losses * weights[:, 1:].flatten()).sum() / items


def memory_gib() -> float:
    """Peak accelerator memory of this worker in GiB; without one, its peak resident memory."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_reserved() / 2**30
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20

"""Steps whose loss or gradients are no numbers: they change nothing, and their rows are told."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, cast

import torch
from transformers import Trainer

from rayswift.errors import RunFailedError
from rayswift.train.clock import Clock
from rayswift.train.collate import Batch
from rayswift.train.loader import Rank
from rayswift.train.trainers.spikes import Spikes


class CheckedSteps(Trainer):
    """A Trainer that looks at the loss and the gradients of a step before the optimiser takes it.

    Attributes:
        on_nan: what happens at a step without numbers, ``stop`` or ``skip``.
        clock: where its time goes.
    """

    on_nan: str
    clock: Clock
    rank: Rank
    loader: Any
    push: Callable[[dict[str, Any]], None]
    _counts: torch.Tensor
    _spikes: Spikes
    #: Steps that were left out since the last row of the log.
    _skipped = 0

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: Any) -> tuple[list[Batch], Any]:
        """The micro-batches of a step, whose counts a step that is left out does not add to."""
        self._before_step = (self._tr_loss.clone(), self._counts.clone())
        self._losses: list[torch.Tensor] = []  # of the step's micro-batches
        self.clock.enter("data")
        found = super().get_batch_samples(epoch_iterator, num_batches, device)
        self.clock.enter("step")
        return found

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Forward and backward pass of a micro-batch."""
        loss = super().training_step(*args, **kwargs)
        self._losses.append(loss)
        self.clock.tick()
        return loss

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        """The norm of a step's gradients; None for a step that is left out. Every worker finds the same: gradients are
        those of all workers, and so is the loss. Here, once a step, the host waits for the device."""
        norm = super()._get_grad_norm(model, grad_norm)
        loss = torch.stack(self._losses).sum().float() / self.rank.world_size
        if self.rank.world_size > 1:
            torch.distributed.all_reduce(loss)
        mean, size = torch.stack([loss, torch.as_tensor(0.0 if norm is None else norm).to(loss)]).tolist()
        bad = [what for what, value in (("loss", mean), ("gradients", size)) if not math.isfinite(value)]
        if bad == ["gradients"] and self.args.fp16:  # too large for float16 at this scale of the loss, which adapts
            return norm
        if not bad:
            if self._spikes.is_spike(mean):
                self._report_rows(f"the loss jumps to {mean:.4g}", "goes on")
            return norm
        what = f"its loss is {mean}" if "loss" in bad else "its gradients are not finite, though its loss is"
        applied = self.is_deepspeed_enabled and not getattr(self.model_wrapped.optimizer, "overflow", False)
        end = "stop" if applied else self.on_nan
        self._report_rows(what, end)
        if end == "stop":
            raise RunFailedError(f"step {self.state.global_step + 1}: {what}")
        self._leave_out(model)
        return None

    def _report_rows(self, what: str, then: str) -> None:
        """Tell the driver which rows a step has, of all workers: those of micro-batches whose loss is not finite, or
        where there are none all of them. ``then``: what happens to the run, ``stop``, ``skip`` or ``goes on``."""
        losses, tokenizer = torch.stack(self._losses).tolist(), cast(Any, self.processing_class)
        own = [
            {"worker": self.rank.rank, "micro_batch": number, "loss": loss, "row": place,
             "text": tokenizer.decode(row.input_ids)}
            for number, (loss, rows) in enumerate(
                zip(losses, self.loader.rows_of(self.state.global_step), strict=False))
            for place, row in rows
        ]  # fmt: skip
        found: list[Any] = [own] * self.rank.world_size
        if self.rank.world_size > 1:
            torch.distributed.all_gather_object(found, own)
        rows = [row for one in found for row in one]
        rows = [row for row in rows if not math.isfinite(row["loss"])] or rows
        if self.rank.rank == 0:
            step = self.state.global_step + 1
            self.push({"event": "bad_step", "step": step, "what": what, "then": then, "rows": rows})

    def _leave_out(self, model: Any) -> None:
        """Have this step change nothing: optimisers pass over weights without gradients."""
        if not self.is_deepspeed_enabled:  # which has left it out itself
            model.zero_grad(set_to_none=True)
        self._tr_loss.copy_(self._before_step[0])
        self._counts.copy_(self._before_step[1])
        self._skipped += 1
        if self.is_deepspeed_enabled and self.model_wrapped.lr_scheduler is not None:
            cast(Any, self.model_wrapped).lr_scheduler.step()  # as without DeepSpeed: the rate is that of the step

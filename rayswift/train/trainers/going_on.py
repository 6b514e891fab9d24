"""How a trainer takes over the state of a checkpoint, and gives it away."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Collection
from typing import Any

import torch
from torch.optim.lr_scheduler import LambdaLR
from transformers import Trainer
from transformers.trainer_callback import ExportableState

from rayswift.train.clock import Clock


class GoingOn(Trainer):
    """A Trainer that may leave parts of a checkpoint's state behind, and whose first step has the learning rate of its
    schedule.

    Attributes:
        left_out: what stays behind, of ``optimizer``, ``scheduler`` and ``rng``.
        keep: called on every worker after a step whose state shall be held for workers that start again.
        keeps_step: whether it is called after this one.
    """

    left_out: Collection[str] = ()
    keep: Callable[[Any], None] = staticmethod(lambda trainer: None)
    keeps_step = False
    clock: Clock

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        fresh = {}
        if not self.is_deepspeed_enabled:  # which has loaded all of it
            fresh = {name: copy.deepcopy(self._part(name).state_dict()) for name in ("optimizer", "scheduler")}
        if not {"optimizer", "scheduler"} <= set(self.left_out):
            super()._load_optimizer_and_scheduler(checkpoint)
        for name in set(fresh) & set(self.left_out):
            self._part(name).load_state_dict(fresh[name])
        if checkpoint is not None:
            self._set_learning_rate(checkpoint)

    def _part(self, name: str) -> Any:
        return self.optimizer if name == "optimizer" else self.lr_scheduler

    def _set_learning_rate(self, checkpoint: str) -> None:
        """A saved optimiser has the learning rate that came next in the schedule of its run, which may be another: that
        of a run that was over is 0."""
        schedule = getattr(self.lr_scheduler, "scheduler", self.lr_scheduler)  # DeepSpeed's is wrapped
        if not isinstance(schedule, LambdaLR):
            return
        saved = self.is_deepspeed_enabled or os.path.isfile(os.path.join(checkpoint, "scheduler.pt"))
        if "scheduler" in self.left_out or not saved:
            schedule.last_epoch = self.state.global_step
        rates = [
            base * at(schedule.last_epoch) for base, at in zip(schedule.base_lrs, schedule.lr_lambdas, strict=True)
        ]
        for group, rate in zip(schedule.optimizer.param_groups, rates, strict=True):
            if isinstance(group["lr"], torch.Tensor):
                group["lr"].fill_(rate)
            else:
                group["lr"] = rate
        schedule._last_lr = rates

    def exported_state(self) -> Any:
        """The Trainer's state as a checkpoint holds it, which later steps leave alone."""
        for one in [*self.callback_handler.callbacks, self.control]:
            if isinstance(one, ExportableState):
                kept: Any = self.state.stateful_callbacks
                name = type(one).__name__
                if isinstance(kept.get(name), list):
                    kept[name].append(one.state())
                else:
                    kept[name] = one.state()
        state = copy.copy(self.state)
        state.log_history = list(state.log_history)
        state.stateful_callbacks = copy.deepcopy(state.stateful_callbacks)
        return state

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if "rng" not in self.left_out:
            super()._load_rng_state(checkpoint)

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        """What Transformers does after a step; then its state is complete."""
        super()._maybe_log_save_evaluate(*args, **kwargs)
        if self.keeps_step:
            self.keeps_step = False
            with self.clock.within("checkpoint"):
                self.keep(self)

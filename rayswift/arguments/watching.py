"""What a run does about steps that go wrong, and what it does beside its steps."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from rayswift.arguments.base import Arguments
from rayswift.arguments.fields import arg
from rayswift.arguments.training import _EVALUATED, CheckpointArguments, OptimizerArguments


@dataclass(init=False, repr=False, eq=False)
class StepArguments(Arguments):
    """Steps that go wrong."""

    topic: ClassVar[str] = OptimizerArguments.topic

    on_nan: str = arg(
        "stop", "at a step whose loss or gradients are no numbers: end the run, or leave the step out (its rows are "
        "saved either way)", choices=("stop", "skip"),
    )  # fmt: skip
    step_timeout: float | None = arg(
        None, "seconds after which a forward and backward pass, or waiting for rows or other workers, that does not "
        "end ends the run, with the stack of each worker", gt=0, shown="never", example="600",
    )  # fmt: skip
    ddp_timeout: int = arg(
        1800, "seconds after which workers that wait for another one in vain start again (--max_failures)", ge=1,
        no_effect={"num_workers=1": "one worker waits for nobody"},
    )  # fmt: skip


@dataclass(init=False, repr=False, eq=False)
class EvaluationArguments(Arguments):
    """Evaluation beside training."""

    topic: ClassVar[str] = CheckpointArguments.topic

    eval_async: bool = arg(
        False, "evaluate every checkpoint beside training, on what a further worker would have", no_effect=_EVALUATED
    )

    def problems(self) -> Iterator[str]:
        if not self.eval_async:
            return
        if getattr(self, "save_strategy", None) in ("no", "best"):
            yield f"--eval_async true contradicts --save_strategy {self.save_strategy}: checkpoints are evaluated"  # type: ignore[attr-defined]
        if getattr(self, "early_stop_interval", None):
            yield "--eval_async true contradicts --early_stop_interval: training does not wait for scores; drop one"
        if getattr(self, "lr_scheduler_type", None) in ("reduce_lr_on_plateau", "greedy"):
            yield (f"--eval_async true contradicts --lr_scheduler_type {self.lr_scheduler_type}: "  # type: ignore[attr-defined]
                   "the learning rate would wait for scores; drop one")  # fmt: skip

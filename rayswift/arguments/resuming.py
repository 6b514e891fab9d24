"""The flags of a run that goes on from a checkpoint."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

from rayswift.arguments.base import Arguments
from rayswift.arguments.fields import arg


def read_resume(raw: Any) -> str | None:
    """A checkpoint folder, "true" for the newest whole one, or "auto" for that or a fresh start; false means no."""
    text = str(raw)
    return {"true": "true", "auto": "auto", "false": None}.get(text.lower(), text)


_RESUMED: dict[str, str] = {"resume_from_checkpoint=none": "only with --resume_from_checkpoint"}


@dataclass(init=False, repr=False, eq=False)
class ResumeArguments(Arguments):
    """Which checkpoint, and what is taken from it."""

    topic: ClassVar[str] = "Evaluation, checkpoints and logs"

    resume_from_checkpoint: str | None = arg(
        None, "checkpoint folder to go on from; true for the newest; auto for it, or a fresh start where there is none",
        parse=read_resume, example="auto",
    )  # fmt: skip
    resume_only_model: bool = arg(
        False, "go on with the checkpoint's weights and place in the data alone; --ignore_data_skip true: from step 0",
        no_effect=_RESUMED,
    )  # fmt: skip
    reset_optimizer: bool = arg(
        False, "go on with an optimiser that has seen nothing, and the settings given now", no_effect=_RESUMED
    )
    reset_scheduler: bool = arg(
        False, "go on with the --learning_rate and the schedule given now, at the step of the checkpoint",
        no_effect=_RESUMED,
    )  # fmt: skip

    @property
    def left_out(self) -> frozenset[str]:
        """What of a checkpoint's state a run that goes on from it leaves behind: optimizer, scheduler, rng."""
        if self.resume_only_model:
            return frozenset({"optimizer", "scheduler", "rng"})
        return frozenset(name for name in ("optimizer", "scheduler") if getattr(self, f"reset_{name}"))

    @property
    def begins_anew(self) -> bool:
        """Whether a run takes a checkpoint's weights alone, and begins at step 0 of its data (SWIFT)."""
        skips = str(self.training_args.get("ignore_data_skip", False)).lower() == "true"
        return bool(self.resume_from_checkpoint) and self.resume_only_model and skips

    def problems(self) -> Iterator[str]:
        resets = [name for name in ("resume_only_model", "reset_optimizer", "reset_scheduler") if getattr(self, name)]
        if resets and self.resume_from_checkpoint and getattr(self, "deepspeed", None) not in (None, "zero0"):
            yield (f"--{resets[0]} true contradicts --deepspeed: its checkpoint is taken over whole; begin a new run "
                   "on the weights (--adapters or --model CHECKPOINT)")  # fmt: skip

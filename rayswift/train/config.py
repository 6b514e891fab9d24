"""What travels from the driver to every worker: the data, the model, the steps, and where the run goes."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from rayswift.arguments.tasks import TaskSettings
from rayswift.data.tokens.row_index import LazyRows, RowIndex

if TYPE_CHECKING:
    from rayswift.data.flow.plan import StreamMix
    from rayswift.data.tokens.encoder import Encoder
    from rayswift.data.tokens.packing import Packs
    from rayswift.train.schedule import StepSchedule


@dataclass(frozen=True)
class RunData:
    """What a run trains on, and what it is validated on.

    Args:
        train: token rows, or standard ones to encode on the way; None for a stream.
        packs: how rows are packed; None without packing, or for a stream.
        stream: the plans of streams; None for rows.
        val: validation token rows, or None.
        encoder: turns standard rows into token ids.
        fingerprint: tells one data order from another; kept in checkpoints.
    """

    train: RowIndex | None
    packs: Packs | None
    stream: StreamMix | None
    val: RowIndex | None
    encoder: Encoder
    fingerprint: str

    @property
    def num_items(self) -> int | None:
        """Rows or packs of an epoch; None for a stream."""
        if self.train is None:
            return None
        return len(self.train) if self.packs is None else len(self.packs)

    @property
    def token_parts(self) -> dict[str, RowIndex]:
        """Training and validation rows whose lengths are known, by SWIFT's names for them."""
        found = {"train_dataset": self.train, "val_dataset": self.val}
        return {name: rows for name, rows in found.items() if rows is not None and not isinstance(rows, LazyRows)}


@dataclass(frozen=True)
class PackedPlan:
    """How a model trains joined rows. ``attention``: Transformers' name; ``by_row``: the classes of the layers that
    take one row after the other."""

    attention: str
    by_row: tuple[str, ...] = ()


@dataclass(frozen=True)
class WorkerConfig:
    """Everything a worker needs; the same on every rank and every attempt.

    Args:
        args: the command's arguments.
        model: the model's local folder, or its hub id when nodes fetch it themselves.
        model_fingerprint: what tells it from others; kept in checkpoints.
        dtype: ``bfloat16``, ``float16`` or ``float32``.
        use_gpu: whether workers have accelerators.
        data: what is trained.
        packing: how joined rows are trained; None where none are joined.
        largest_pass: tokens of a worker's largest forward pass, padding included; None where that is not known.
        schedule: the run's steps.
        run_uri: the run directory, a local path or a URI.
        resume: URI of the checkpoint to start from, or None.
        resume_step: its step.
        events: the driver's event queue (see :mod:`rayswift.train.events`).
        spare: the resources of ``--eval_async``'s evaluator; None where workers evaluate.
        task: of the losses of tasks that tell numbers.
    """

    args: Any
    model: str
    model_fingerprint: str
    dtype: str
    use_gpu: bool
    data: RunData
    packing: PackedPlan | None
    largest_pass: int | None
    schedule: StepSchedule
    run_uri: str
    resume: str | None
    resume_step: int
    events: Any
    spare: dict[str, float] | None = None
    task: TaskSettings = field(default_factory=TaskSettings)

"""``--report_to``: where the numbers of a run go beside ``logging.jsonl``: TensorBoard, Weights & Biases, SwanLab."""

from __future__ import annotations

import importlib
import importlib.util
import time
from typing import TYPE_CHECKING, Any

from rayswift.errors import UserError, one_line

if TYPE_CHECKING:
    from rayswift.train.run_directory import RunDirectory

#: The package of each tracker.
PACKAGES = {"tensorboard": "tensorboard", "wandb": "wandb", "swanlab": "swanlab"}


class TensorBoard:
    """Event files in ``runs/``."""

    def __init__(self, run: RunDirectory) -> None:
        # PyTorch's SummaryWriter writes with it, too, and would bring PyTorch into the driver.
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        self._writer = EventFileWriter(str(run.local / "runs"))

    def log(self, values: dict[str, float], step: int) -> None:
        """Add numbers by their tags."""
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary

        numbers = [Summary.Value(tag=tag, simple_value=value) for tag, value in values.items()]
        self._writer.add_event(Event(wall_time=time.time(), step=step, summary=Summary(value=numbers)))
        self._writer.flush()

    def close(self) -> None:
        """Finish the event file."""
        self._writer.close()


class Tracker:
    """Weights & Biases or SwanLab, whose modules have the same three functions. Both find their keys and their server
    where their own documentation says."""

    def __init__(self, name: str, args: Any, run: RunDirectory) -> None:
        self._module = importlib.import_module(PACKAGES[name])
        title = args.training_args.get("run_name") or run.path.rpartition("/")[2]
        names = {"wandb": ("name", "dir"), "swanlab": ("experiment_name", "logdir")}[name]
        try:
            self._module.init(
                project=args.training_args.get("project"),
                config=args.to_dict(),
                **dict(zip(names, (title, str(run.local)), strict=True)),
            )
        except Exception as error:
            raise UserError(f"--report_to {name}: {one_line(error)}") from error

    def log(self, values: dict[str, float], step: int) -> None:
        """Add numbers by their tags."""
        self._module.log(values, step=step)

    def close(self) -> None:
        """Send what is left."""
        self._module.finish()


def reporter_names(args: Any) -> list[str]:
    """The trackers of a run; ``all`` are those that are installed.

    Raises:
        UserError: one is not installed.
    """
    names = [name for name in args.report_to if name in PACKAGES]
    if "all" in args.report_to:
        return [name for name, package in PACKAGES.items() if importlib.util.find_spec(package)]
    for name in names:
        if importlib.util.find_spec(PACKAGES[name]) is None:
            raise UserError(f"--report_to {name}: not installed; pip install {PACKAGES[name]}, or leave it out")
    return list(dict.fromkeys(names))


def open_reporters(args: Any, run: RunDirectory) -> list[TensorBoard | Tracker]:
    """Begin what ``--report_to`` names.

    Raises:
        UserError: one is not installed, or refuses.
    """
    return [TensorBoard(run) if name == "tensorboard" else Tracker(name, args, run) for name in reporter_names(args)]

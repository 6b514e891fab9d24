"""The driver's view of a run: one live progress line, ``logging.jsonl``, trackers and the plots.

Events come from the workers' :class:`~rayswift.train.events.EventQueue`, whatever machine they are on.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, cast

from rayswift.console import say
from rayswift.errors import RunFailedError
from rayswift.files import write_whole
from rayswift.train.clock import PHASES
from rayswift.train.local_events import QueueGone
from rayswift.train.summary import Goodput, Summary, format_seconds
from rayswift.train.watch import hang_line, stacks_text

if TYPE_CHECKING:
    from rayswift.train.run_directory import RunDirectory
    from rayswift.train.schedule import StepSchedule

logger = logging.getLogger("rayswift.train")

POLL_SECONDS = 0.5
#: Seconds for the other workers to say where they are, once one says that it does not get on.
SILENT_SECONDS = 10.0
#: SWIFT 3.3's order of a training row.
_ROW_ORDER = ("loss", "token_acc", "acc", "grad_norm", "learning_rate", "memory(GiB)", "train_speed(iter/s)")


class Progress:
    """Consumes events on a thread while ``TorchTrainer.fit`` blocks. Use as a context manager.

    Args:
        queue: the event queue (see :mod:`rayswift.train.events`).
        schedule: the run's steps.
        run: where logging.jsonl, runs/ and images/ go.
        reporters: what else the numbers go to; closed at the end.
        summary: what the run says of itself at its end.
        place_of: ``file:line`` of a row of a step (see :data:`rayswift.data.tokens.table.PlacedRow`).
        step_timeout: that of the command.
    """

    def __init__(
        self,
        queue: Any,
        schedule: StepSchedule,
        run: RunDirectory,
        reporters: Sequence[Any] = (),
        summary: Summary | None = None,
        place_of: Callable[[Any], str] = str,
        step_timeout: float | None = None,
    ) -> None:
        self.queue, self.schedule, self.run = queue, schedule, run
        self.summary = summary or Summary(Goodput(time.monotonic()))
        self._place_of, self._step_timeout = place_of, step_timeout
        #: Why the run ends before its time, in one line.
        self.failure: str | None = None
        self._hangs: dict[int, dict[str, Any]] = {}
        self._hung_since, self._main = 0.0, False
        self.rows: list[dict[str, Any]] = []
        self.parameter_info: str | None = None
        self.best_step: int | None = None
        self.last_step: int | None = None
        self._first_step = 0
        self._started = time.monotonic()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._loop, name="rayswift-progress", daemon=True)
        self._behind = False  # the log lacks rows
        self._bar: Any = None
        self._reporters = reporters

    def __enter__(self) -> Progress:
        from tqdm import tqdm

        self._bar = tqdm(total=self.schedule.max_steps, desc="Train", unit="step", dynamic_ncols=True, file=sys.stderr)
        self._main = threading.current_thread() is threading.main_thread()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join(timeout=30)
        self._bar.close()
        try:
            for reporter in self._reporters:
                reporter.close()
            plot_rows(self.rows, self.run)
            self.summary.write(self.run)
        except OSError as error:
            self._say(f"{self.run.uri}: no pictures of this run ({error.strerror})")
        for line in self.summary.lines():
            say(line)
        if self.failure is not None:
            raise RunFailedError(self.failure)

    def _loop(self) -> None:
        while True:
            if stopping := self._stop.is_set():
                self.queue.settle()
            try:
                for event in self.queue.ask("drain", self.summary.counted()):
                    self._take(event)
                self._end_hang()
            except QueueGone as error:
                logger.debug("no events: %s", error)
                return
            if stopping:
                return
            self._stop.wait(POLL_SECONDS)

    def _take(self, event: dict[str, Any]) -> None:
        try:
            getattr(self, f"_on_{event['event']}")(event)
        except OSError as error:  # a full disk ends no training
            if not self._behind:
                self._say(f"{self.run.uri}: its log cannot be written ({error.strerror}); training goes on")
            self._behind = True

    # --- one method per event ---

    def _on_start(self, event: dict[str, Any]) -> None:
        if self.parameter_info is None:
            self._say(f"model_parameter_info: {event['parameter_info']}")
            self._say(f"activations are {event['activations']} (--gradient_checkpointing)")
        self.parameter_info = event["parameter_info"]
        self.summary.device, self.summary.num_workers = event.get("device"), event.get("workers", 1)

    def _on_resume(self, event: dict[str, Any]) -> None:
        """An attempt starts at a step: rows of later steps were never part of the run that goes on."""
        step = event["step"]
        self.summary.goodput.attempt(step, event.get("seconds") or dict.fromkeys(PHASES, 0.0))
        if self.rows or self.last_step is not None or step:
            self._say(f"training goes on from step {step}")
        self.run.fetch("logging.jsonl")
        self._first_step, self._started = step, time.monotonic()
        self.rows = [row for row in read_log(self.run) if row.get("global_step/max_steps") and _step_of(row) <= step]
        # A killed driver did not come to write the last rows; the checkpoint has them, but for times.
        known = {(_step_of(row), "eval_loss" in row) for row in self.rows}
        logged = [row for row in event.get("history", []) if "loss" in row or "eval_loss" in row]
        lost = [self._format(row) for row in logged if (row["global_step"], "eval_loss" in row) not in known]
        for row in lost:
            for name in ("train_speed(iter/s)", "elapsed_time", "remaining_time"):
                row.pop(name, None)
        self.rows = sorted([*self.rows, *lost], key=lambda row: (_step_of(row), "eval_loss" in row))
        self.run.write_jsonl("logging.jsonl", self.rows)
        self._bar.n = self._bar.initial = step
        self._bar.start_t = self._bar.last_print_t = time.time()
        self._bar.refresh()

    def _on_step(self, event: dict[str, Any]) -> None:
        self._bar.n = event["step"]
        self._bar.refresh()
        self._hear(event)

    def _hear(self, event: dict[str, Any]) -> None:
        if "seconds" in event:
            self.summary.goodput.hear(event["seconds"])

    def _on_log(self, event: dict[str, Any]) -> None:
        row = event["row"]
        self._hear(event)
        if "work" in event:
            self.summary.add(event["work"])
        formatted = self._format(row)
        self.rows.append(formatted)
        self._say(str(formatted))
        if "loss" in row:
            names = ("rewards/accuracies", "token_acc", "acc")
            accuracy = next((f"acc={row[name]:.3f} " for name in names if name in row), "")
            grad_norm = f"grad_norm={row['grad_norm']:.2f} " if "grad_norm" in row else ""
            self._bar.set_postfix_str(
                f"loss={row['loss']:.4f} {accuracy}{grad_norm}lr={row['learning_rate']:.2e} "
                f"tok/s={row['tokens/s']:.0f} mem={row['memory(GiB)']:.2f}GiB"
            )
        if self._behind:
            self.run.write_jsonl("logging.jsonl", self.rows)
            self._behind = False
        else:
            self.run.append_jsonl("logging.jsonl", formatted)
        self.summary.write(self.run)
        prefix = "eval" if "eval_loss" in row else "train"
        values = {
            f"{prefix}/{name.removeprefix('eval_').removeprefix('train_')}": value
            for name, value in row.items()
            if isinstance(value, (int, float)) and name != "global_step"
        }
        for reporter in self._reporters:
            reporter.log(values, row["global_step"])

    def _on_save(self, event: dict[str, Any]) -> None:
        self._hear(event)
        self.summary.goodput.save(event["step"])

    def _on_kept(self, event: dict[str, Any]) -> None:
        self.summary.goodput.kept(event["step"], event["seconds"])

    def _on_checkpoint(self, event: dict[str, Any]) -> None:
        self.last_step, self.best_step = event["step"], event["best"]
        times = f" ({event['seconds']:.1f} s; training waited {event['waited']:.2f} s)" if "waited" in event else ""
        self._say(f"saved checkpoint-{event['step']}{times}")
        self.summary.goodput.checkpoint(event["step"])
        self.summary.write(self.run)
        self.run.sync()

    def _on_note(self, event: dict[str, Any]) -> None:
        self._say(event["line"])

    def _on_drops(self, event: dict[str, Any]) -> None:
        for line in event["lines"]:
            self._say(line)

    def _on_end(self, event: dict[str, Any]) -> None:
        self.summary.memory = event["memory"]
        self._hear(event)

    def _on_bad_step(self, event: dict[str, Any]) -> None:
        """A step whose loss or gradients are no numbers, or whose loss jumps: its rows are kept."""
        rows = [{"place": self._located(row.pop("row")), **row} for row in event["rows"]]
        rows.sort(key=lambda row: -row["loss"] if math.isfinite(row["loss"]) else -math.inf)
        name = f"bad_steps/step-{event['step']}.jsonl"
        (self.run.local / "bad_steps").mkdir(exist_ok=True)
        written = [row if math.isfinite(row["loss"]) else {**row, "loss": str(row["loss"])} for row in rows]
        self.run.write_jsonl(name, written)
        first = f", {rows[0]['place']} the first," if rows else ""
        line = f"step {event['step']}: {event['what']}; its {len(rows)} rows{first} are in {self.run.uri}/{name}"
        if event["then"] == "stop":
            self.failure = f"{line} (--on_nan skip leaves such steps out)"
        else:
            left_out = "the step is left out" if event["then"] == "skip" else "training goes on"
            self._say(f"{line}; {left_out}")

    def _located(self, row: Any) -> str:
        try:
            return self._place_of(row)
        except Exception as error:  # the files may have gone since
            logger.debug("no place of row %s: %s", row, error)
            return f"row {row}"

    def _on_hang(self, event: dict[str, Any]) -> None:
        self._hung_since = self._hung_since if self._hangs else time.monotonic()
        self._hangs[event["rank"]] = event

    def _end_hang(self) -> None:
        """End the run when all workers have said where they are, or have had the time to."""
        if not self._hangs or self.failure is not None:
            return
        workers, timeout = next(iter(self._hangs.values()))["workers"], self._step_timeout or 0.0
        if len(self._hangs) < workers and time.monotonic() - self._hung_since < min(timeout, SILENT_SECONDS):
            return
        self.failure = hang_line(self._hangs, workers, timeout)
        with contextlib.suppress(OSError):
            write_whole(self.run.local / "stacks.txt", stacks_text(self._hangs))
            self.failure += f"; every stack is in {self.run.uri}/stacks.txt"
        if self._main:  # as Ctrl-C: what `fit` waits for would never come
            signal.pthread_kill(cast(int, threading.main_thread().ident), signal.SIGINT)
        else:
            self._say(self.failure)

    # --- formatting ---

    def _format(self, row: dict[str, Any]) -> dict[str, Any]:
        """A worker's row as SWIFT writes it: its key order, 8 decimals, shares and times."""
        step = row["global_step"]
        elapsed = time.monotonic() - self._started
        speed = (step - self._first_step) / elapsed if elapsed else 0.0
        values = {**row, "train_speed(iter/s)": speed}
        skipped = {"global_step", "epoch", "tokens/s"}
        names = [name for name in _ROW_ORDER if name in values] if "loss" in row else []
        names += [name for name in row if name not in names and name not in skipped]
        digits = {"memory(GiB)": 2, "train_speed(iter/s)": 6}
        formatted: dict[str, Any] = {name: values[name] for name in names}
        formatted |= {
            name: round(value, digits.get(name, 8)) for name, value in formatted.items() if isinstance(value, float)
        }
        if "tokens/s" in row:
            formatted["tokens/s"] = round(row["tokens/s"], 2)
        formatted["epoch"] = round(row["epoch"], 8)
        formatted["global_step/max_steps"] = f"{step}/{self.schedule.max_steps}"
        formatted["percentage"] = f"{step / self.schedule.max_steps:.2%}"
        formatted["elapsed_time"] = format_seconds(elapsed)
        formatted["remaining_time"] = format_seconds((self.schedule.max_steps - step) / speed if speed else 0)
        return formatted

    def _say(self, line: str) -> None:
        with self._bar.external_write_mode(file=sys.stdout):
            say(line)


def read_log(run: RunDirectory) -> list[dict[str, Any]]:
    """The rows of a run's logging.jsonl; a half-written last line of a killed driver is left out."""
    path = run.local / "logging.jsonl"
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            logger.debug("%s: a broken line is left out", path)
    return rows


def _step_of(row: dict[str, Any]) -> int:
    return int(row["global_step/max_steps"].split("/")[0])


def plot_rows(rows: list[dict[str, Any]], run: RunDirectory) -> None:
    """``images/train_loss.png``, ``eval_loss.png`` and so on: one picture per logged number."""
    series: dict[str, list[tuple[int, float]]] = {}
    for row in rows:
        step = _step_of(row)
        for name, value in row.items():
            if isinstance(value, (int, float)) and ("loss" in row or "eval_loss" in row):
                series.setdefault(name if name.startswith("eval_") else f"train_{name}", []).append((step, value))
    if not series:
        return
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    folder = run.local / "images"
    folder.mkdir(exist_ok=True)
    for name, points in series.items():
        figure, axes = plt.subplots(figsize=(8, 5))
        axes.plot(*zip(*points, strict=True), marker="." if len(points) < 50 else None)
        axes.set_xlabel("step")
        axes.set_title(name)
        axes.grid(alpha=0.3)
        figure.savefig(folder / f"{name.replace('/', '_per_')}.png", dpi=100)
        plt.close(figure)

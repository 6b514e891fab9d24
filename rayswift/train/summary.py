"""What a run says of itself at its end: speed, memory, and where its time went.

Goodput is the share of the time in which steps were trained that the run still has: what is trained again after a
failure was lost. It is that of a run directory, of all commands that went on with it, while one of them ran.
"""

from __future__ import annotations

import contextlib
import json
import time
from typing import TYPE_CHECKING, Any

from rayswift.console import say
from rayswift.files import write_whole
from rayswift.train.clock import PHASES
from rayswift.train.flops import peak_tflops

if TYPE_CHECKING:
    from rayswift.train.run_directory import RunDirectory

FILE = "goodput.json"
#: Where time goes: what a worker does, what failures and stops cost (starting again, steps that are lost), the rest.
PARTS = (*PHASES, "restarts", "other")


def format_seconds(seconds: float) -> str:
    """``53s``, ``1m 31s``, ``9h 30m 16s``, as SWIFT writes them."""
    minutes, left = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    parts = [f"{hours}h"] if hours else []
    parts += [f"{minutes}m"] if minutes or hours else []
    return " ".join([*parts, f"{left}s"])


def length_line(lengths: Any) -> str:
    """SWIFT's ``172.068281±93.875049, min=36.000000, max=866.000000, size=48330``."""
    spread = f"{lengths.mean():.6f}±{lengths.std():.6f}"
    return f"{spread}, min={lengths.min():.6f}, max={lengths.max():.6f}, size={len(lengths)}"


class Goodput:
    """Where the time of a run went. Seconds of a worker come as its clock reads them: all of this attempt.

    Args:
        began: when this command did, of ``time.monotonic``.
        before: what :meth:`state` was at the end of the commands before it.
    """

    def __init__(self, began: float, before: dict[str, Any] | None = None) -> None:
        state = before or {"seconds": {}, "trained": {}}
        self._seconds = {part: float(state["seconds"].get(part, 0.0)) for part in PARTS}
        self._began, self._heard = began, began
        #: Seconds of steps by the step of a checkpoint.
        self._trained = {int(step): float(seconds) for step, seconds in state["trained"].items()}
        self._saving: dict[int, float] = {}
        self._kept = (0, 0.0)  # the same of the step whose state is held
        self._goes_on = before is not None
        self._attempt = self._base = dict.fromkeys(PHASES, 0.0)

    def attempt(self, step: int, seconds: dict[str, float]) -> None:
        """Workers begin at a step: later steps are lost."""
        self._end_attempt()
        now = time.monotonic()
        self._seconds["restarts" if self._goes_on else "start"] += now - self._heard
        self._heard, self._attempt, self._base = now, seconds, seconds
        known_steps = [*self._trained.items(), self._kept]
        kept = max((trained for known, trained in known_steps if known <= step), default=0.0)
        lost = max(self._seconds["step"] - kept, 0.0)
        self._seconds["step"] -= lost
        self._seconds["restarts"] += lost
        self._trained = {known: trained for known, trained in self._trained.items() if known <= step}

    def hear(self, seconds: dict[str, float]) -> None:
        """A sign of the first worker."""
        self._attempt, self._heard = seconds, time.monotonic()

    def save(self, step: int) -> None:
        """A checkpoint of what was trained until now begins."""
        self._saving[step] = self._now()["step"]

    def checkpoint(self, step: int) -> None:
        """It is whole: that is kept."""
        self._trained[step] = self._saving.pop(step, self._now()["step"])

    def kept(self, step: int, seconds: dict[str, float]) -> None:
        """The state after a step is held, when this was the worker's clock."""
        self._kept = (step, self._seconds["step"] + seconds["step"] - self._base["step"])

    def _end_attempt(self) -> None:
        self._seconds, self._base = self._now(), self._attempt
        self._goes_on = self._goes_on or any(self._attempt.values())

    def _now(self) -> dict[str, float]:
        found = dict(self._seconds)
        for phase in PHASES:
            part = "restarts" if phase == "start" and self._goes_on else phase
            found[part] += self._attempt[phase] - self._base[phase]
        return found

    def state(self) -> dict[str, Any]:
        """For the commands that go on with the run."""
        return {"seconds": self.seconds(), "trained": self._trained}

    def seconds(self) -> dict[str, float]:
        """The seconds of each part; what is not of a worker's clock is ``other``."""
        found = self._now()
        found["other"] += time.monotonic() - self._heard
        return found


class Summary:
    """What was counted of a run: by this command, but for :class:`Goodput`."""

    def __init__(self, goodput: Goodput) -> None:
        self.goodput = goodput
        self.device: str | None = None
        self.num_workers = 1
        self.memory: list[float] = []
        self._work = {"tokens": 0.0, "trained": 0.0, "flops": 0.0, "seconds": 0.0}

    @classmethod
    def of(cls, run: RunDirectory, began: float, goes_on: bool) -> Summary:
        """For a command that began then; where it goes on with a run, that counts on."""
        if goes_on:
            run.fetch(FILE)
            with contextlib.suppress(OSError, ValueError, LookupError, TypeError, AttributeError):  # none, or broken
                return cls(Goodput(began, json.loads((run.local / FILE).read_text(encoding="utf-8"))))
        return cls(Goodput(began))

    def write(self, run: RunDirectory) -> None:
        """Keep what a command that goes on has to know."""
        write_whole(run.local / FILE, json.dumps(self.goodput.state()))

    def add(self, work: dict[str, float]) -> None:
        """Count what workers did since the last row of the log."""
        self._work = {name: self._work[name] + work[name] for name in self._work}

    def row(self) -> dict[str, Any]:
        """The numbers, for the last row of ``logging.jsonl``."""
        seconds = self.goodput.seconds()
        wall = sum(seconds.values())
        row: dict[str, Any] = {"goodput": round(seconds["step"] / wall, 4) if wall else 0.0,
                               "seconds": {part: round(value, 2) for part, value in seconds.items()}}  # fmt: skip
        if self._work["seconds"]:
            per_second = {name: value / self._work["seconds"] for name, value in self._work.items()}
            row |= {"tokens/s": round(per_second["tokens"], 2), "trained_tokens/s": round(per_second["trained"], 2)}
            row["TFLOP/s"] = round(per_second["flops"] / 1e12 / self.num_workers, 4)  # of each worker
            if peak := peak_tflops(self.device):
                row["MFU"] = round(row["TFLOP/s"] / peak, 4)
        if self.memory:
            row["peak_memory(GiB)"] = [round(one, 2) for one in self.memory]
        return row

    def counted(self) -> dict[str, float]:
        """Those of the row that `rayswift.cluster.board` says while the run goes on."""
        return {name.lower(): value for name, value in self.row().items() if name in ("goodput", "MFU")}

    def lines(self) -> list[str]:
        """For the person at the terminal."""
        row, lines = self.row(), []
        if not row["seconds"]["step"]:  # nothing was trained
            return []
        if "tokens/s" in row:
            mfu = f", MFU {row['MFU']:.1%} of {self.device}" if "MFU" in row else ""
            lines.append(f"speed: {row['tokens/s']:.0f} tokens/s, {row['trained_tokens/s']:.0f} of them trained; "
                         f"{row['TFLOP/s']:.3g} TFLOP/s per worker{mfu}")  # fmt: skip
        if self.memory:
            each = ", ".join(f"{one:.2f}" for one in self.memory)
            lines.append(f"memory: at most {each} GiB {'by worker' if len(self.memory) > 1 else ''}".rstrip())
        rest = ", ".join(f"{part} {format_seconds(value)}" for part, value in row["seconds"].items() if part != "step")
        total = format_seconds(sum(row["seconds"].values()))
        lines.append(f"time: {total}, goodput {row['goodput']:.1%}; {rest}")
        return lines


def say_end(args: Any, outcome: dict[str, Any]) -> None:
    """Where the results of a run are, and the commands that use them."""
    last, best = outcome["last_model_checkpoint"], outcome["best_model_checkpoint"]
    say(f"last_model_checkpoint: {last}")
    say(f"best_model_checkpoint: {best}")
    result = best if args.load_best_model_at_end else last
    if result is None:
        return
    flag = "--model" if args.train_type == "full" else "--adapters"
    asked = "--stream true" if args.task_type == "causal_lm" else "--val_dataset ROWS.jsonl"
    say("next:")
    say(f"  rayswift infer {flag} {result} {asked}")
    if flag == "--adapters":
        say(f"  rayswift infer {flag} {result} {asked} --merge_lora true")

"""What RaySwift's processes say about their work to whoever asks the cluster.

*Notes* are lines of JSON in the log of the actor that knows (a run's event queue, a gateway). Ray's dashboard shows the
logs of actors, dead ones too, so that `rayswift status` needs its address and nothing else: no actor to ask, no store,
no port of ours. *Meters* are numbers in Ray's own Prometheus endpoint, which every node has (`METERS` names them all).
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import json
import os
import time
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

MARK = "RAYSWIFT "

#: name → kind and help. Ray puts ``ray_`` before a name, and ``_total`` after that of a counter.
METERS = {
    "rayswift_train_step": ("gauge", "Optimiser steps done."),
    "rayswift_train_max_steps": ("gauge", "Optimiser steps of the whole run."),
    "rayswift_train_loss": ("gauge", "Loss of the last log row."),
    "rayswift_train_eval_loss": ("gauge", "Loss of the last evaluation."),
    "rayswift_train_learning_rate": ("gauge", "Learning rate."),
    "rayswift_train_grad_norm": ("gauge", "Norm of the gradient."),
    "rayswift_train_tokens_per_second": ("gauge", "Trained tokens per second, all workers together."),
    "rayswift_train_memory_gib": ("gauge", "Peak memory of the first worker."),
    "rayswift_train_goodput": ("gauge", "Share of the run's time that trained what was kept."),
    "rayswift_train_mfu": ("gauge", "Share of the accelerators' peak operations that the model needed."),
    "rayswift_train_data_wait_share": ("gauge", "Share of the time since the last log row that waited for data."),
    "rayswift_train_checkpoint_step": ("gauge", "Step of the last whole checkpoint."),
    "rayswift_train_checkpoints": ("counter", "Checkpoints that became whole."),
    "rayswift_train_attempts": ("counter", "Times that the workers started to train."),
    "rayswift_token_cache_hits": ("counter", "Data files whose encoded rows were found."),
    "rayswift_token_cache_misses": ("counter", "Data files whose rows were encoded."),
    "rayswift_serve_requests": ("counter", "Requests received by the gateways."),
    "rayswift_serve_errors": ("counter", "Requests answered with an error."),
    "rayswift_serve_generated_tokens": ("counter", "Generated tokens."),
    "rayswift_serve_retries": ("counter", "Requests sent to another replica because one failed."),
    "rayswift_serve_resumed_streams": ("counter", "Streams that another replica resumed."),
    "rayswift_serve_leases": ("counter", "Leases of replicas' places that were asked of Serve."),
    "rayswift_serve_kept_leases": ("counter", "Requests that found a lease which was kept."),
    "rayswift_serve_running_requests": ("gauge", "Requests in progress."),
    "rayswift_serve_waiting_requests": ("gauge", "Requests that wait for a replica."),
}  # fmt: skip


def note(**facts: Any) -> None:
    """Write one note into the log of this actor; past ``sys.stdout``, which Serve takes for itself."""
    line = MARK + json.dumps({"time": round(time.time(), 2), **facts}, default=str)
    with contextlib.suppress(OSError):  # a full disk ends no work
        os.write(1, f"{line}\n".encode())


def read_notes(log: str) -> Iterator[dict[str, Any]]:
    """The notes in a log; the first and the last line may be cut in two."""
    for line in log.splitlines():
        if line.startswith(MARK):
            try:
                yield json.loads(line.removeprefix(MARK))
            except json.JSONDecodeError:
                continue


class Meters:
    """The meters of one process, all with the same labels.

    Args:
        labels: what tells these from others of the same name, for example ``{"run": URI}``.
    """

    def __init__(self, **labels: str) -> None:
        self._labels = labels
        self._counted: dict[str, float] = {}

    def set(self, **values: Any) -> None:
        """Set gauges by name; what is no number is left out."""
        for name, value in values.items():
            if isinstance(value, (int, float)):
                self._meter(name).set(float(value))

    def add(self, name: str, value: float = 1) -> None:
        """Add to a counter."""
        if value > 0:  # Ray refuses none
            self._meter(name).inc(value)

    def count_up_to(self, **totals: float) -> None:
        """Bring counters to what has been counted elsewhere."""
        for name, total in totals.items():
            self.add(name, total - self._counted.get(name, 0))
            self._counted[name] = total

    @functools.cache  # noqa: B019  # lives as long as its process
    def _meter(self, name: str) -> Any:
        from ray.util import metrics

        kind, text = METERS[name]
        meter = (metrics.Gauge if kind == "gauge" else metrics.Counter)(name, text, tuple(self._labels))
        meter.set_default_tags(self._labels)
        return meter


class RunBoard:
    """What a training run says: its facts, then steps, rows of the log and checkpoints.

    Args:
        facts: ``run`` (its URI), ``command``, ``model``, ``max_steps``, ``workers``; without ``run`` nothing is said.
    """

    #: Seconds between two notes of a step.
    STEP_SECONDS = 5.0
    #: The facts stand at least so often in the log: who reads its end needs no more.
    FACTS_EVERY = 100

    def __init__(self, facts: Mapping[str, Any]) -> None:
        self._said, self._meters = 0.0, Meters(run=str(facts.get("run")))
        self.is_on = "run" in facts
        self._facts, self._notes = {"since": round(time.time(), 2), **facts}, 0
        self._counted: dict[str, float] = {}
        if self.is_on:
            self._note()
            self._meters.set(rayswift_train_max_steps=facts["max_steps"])

    def take(self, event: Mapping[str, Any]) -> None:
        """Say what a worker's event means to those outside."""
        kind, step = event["event"], event.get("step")
        if not self.is_on:
            return
        if kind == "resume":
            self._note(attempt=step)
            self._meters.add("rayswift_train_attempts")
        elif kind == "step":
            self._meters.set(rayswift_train_step=step)
            if time.monotonic() - self._said > self.STEP_SECONDS:
                self._said = time.monotonic()
                self._note(step=step)
        elif kind == "checkpoint":
            self._note(checkpoint=step)
            self._meters.add("rayswift_train_checkpoints")
            self._meters.set(rayswift_train_checkpoint_step=step)
        elif kind == "log":
            self._take_row(event["row"], event.get("data_wait"))

    def counted(self, numbers: Mapping[str, float]) -> None:
        """Say what is counted of the whole run: ``goodput``, ``mfu``; with the rows that follow, too."""
        if self.is_on:
            self._counted = dict(numbers)
            self._meters.set(**{f"rayswift_train_{name}": value for name, value in numbers.items()})

    def _note(self, **said: Any) -> None:
        if self._notes % self.FACTS_EVERY == 0:
            said["run"] = self._facts
        self._notes += 1
        note(**said)

    def _take_row(self, row: Mapping[str, Any], data_wait: float | None) -> None:
        numbers = {name: value for name, value in {**self._counted, **row}.items() if isinstance(value, (int, float))}
        if data_wait is not None:
            numbers["data_wait"] = round(data_wait, 4)
        self._note(step=numbers.pop("global_step"), row=numbers)
        names = ("loss", "eval_loss", "learning_rate", "grad_norm")
        values = {f"rayswift_train_{name}": row.get(name) for name in names}
        values["rayswift_train_tokens_per_second"] = row.get("tokens/s")
        values["rayswift_train_memory_gib"] = row.get("memory(GiB)")
        self._meters.set(**values, rayswift_train_data_wait_share=data_wait)


class ServeBoard:
    """What a gateway says of its counters (`rayswift.serve.gateway.shared.Counters`)."""

    #: Seconds between two looks; a note is written when something has changed since the last one.
    SECONDS = 5.0
    _NAMES: ClassVar[dict[str, str]] = {
        "requests": "requests", "errors": "errors", "tokens": "generated_tokens", "retries": "retries",
        "resumed": "resumed_streams", "leases": "leases", "kept_leases": "kept_leases",
    }  # fmt: skip

    def __init__(self, models: list[str]) -> None:
        self._said: dict[str, Any] = {}
        self._meters = Meters(models=",".join(models))

    async def follow(self, counters: Any) -> None:
        """Look at an object's counters until this is cancelled."""
        while True:
            self.look(vars(counters))
            await asyncio.sleep(self.SECONDS)

    def look(self, counters: Mapping[str, Any]) -> None:
        """Say what the counters say."""
        known = {name: counters[name] for name in (*self._NAMES, "running", "waiting")}
        if known != self._said:
            note(counters=known, seconds=self.SECONDS)
            self._said = known
        self._meters.set(
            rayswift_serve_running_requests=known["running"], rayswift_serve_waiting_requests=known["waiting"]
        )
        self._meters.count_up_to(**{f"rayswift_serve_{name}": known[key] for key, name in self._NAMES.items()})

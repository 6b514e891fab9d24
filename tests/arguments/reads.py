"""Which settings a command reads while it works: what is never read can change nothing.

Reads of ``rayswift/arguments`` itself (checks, saving) do not count, nor do copies of all settings into other
arguments: what those are read for counts.
"""

from __future__ import annotations

import contextlib
import sys
import threading
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import rayswift.arguments
from rayswift.arguments import Arguments
from rayswift.arguments.commands import flags_of

_OWN = str(Path(rayswift.arguments.__file__).parent)
_COPIES = frozenset({"model_specs", "_with_adapters", "conflicts"})


def _counts(frame: types.FrameType | None) -> bool:
    """Whether a read here is for what the setting does."""
    while frame is not None and frame.f_code.co_name.startswith("<"):  # a comprehension: whose?
        frame = frame.f_back
        if frame is None or frame.f_code.co_name in _COPIES:
            return False
    if frame is None:
        return False
    return not frame.f_code.co_filename.startswith(_OWN) or frame.f_code.co_name in ("resolve", "with_saved")


@contextlib.contextmanager
def recorded() -> Iterator[set[str]]:
    """The names of settings that are read from any arguments, and of what Transformers reads of its own."""
    from transformers import TrainingArguments

    found: set[str] = set()
    names = {name for command in ("sft", "rlhf", "infer", "deploy", "app", "sample", "eval", "export")
             for name in flags_of(command)}  # fmt: skip

    class Fields(dict[str, Any]):
        """Fields of TrainingArguments by name: looking one up is reading it."""

        def get(self, name: str, default: Any = None) -> Any:
            if _counts(sys._getframe(1)):
                found.add(name)
            return super().get(name, default)

    def read(self: Any, name: str) -> Any:
        if name in names and _counts(sys._getframe(1)):
            found.add(name)
        value = object.__getattribute__(self, name)
        return Fields(value) if name == "training_args" else value

    def hf_read(self: Any, name: str) -> Any:
        caller = sys._getframe(1)
        if name in names and caller.f_code.co_name not in ("to_dict", "to_sanitized_dict", "__post_init__", "__repr__"):
            found.add(f"hf:{name}")
        return object.__getattribute__(self, name)

    with (
        mock.patch.object(Arguments, "__getattribute__", read, create=True),
        mock.patch.object(TrainingArguments, "__getattribute__", hf_read, create=True),
    ):
        yield found


class _Queue:
    """The driver's event queue, in this process."""

    def __init__(self) -> None:
        self.events: list[dict[str, Any]] = []
        self.ended = threading.Event()

    def tell(self, name: str, event: dict[str, Any]) -> None:
        self.events.append(event)

    def ask(self, name: str, *args: Any) -> Any:
        answers: dict[str, Callable[[], Any]] = {
            "drain": list, "is_stopping": self.ended.wait, "kept_step": int, "keep": dict,
        }  # fmt: skip
        return answers[name]()

    def settle(self) -> None:
        pass

    close = settle


@contextlib.contextmanager
def training_here() -> Iterator[_Queue]:
    """``rayswift.train`` with its one worker in this process: no Ray is started."""
    import ray
    import ray.train

    from rayswift import cluster
    from rayswift.cluster import Cluster
    from rayswift.train import driver, events, packing, worker

    queue = _Queue()
    rank = types.SimpleNamespace(
        get_world_rank=lambda: 0, get_world_size=lambda: 1, get_local_rank=lambda: 0, get_local_world_size=lambda: 1
    )

    def make_trainer(loop: Any, *, train_loop_config: Any, **_: Any) -> Any:
        fit = lambda: types.SimpleNamespace(return_value=worker.train_loop(train_loop_config))  # noqa: E731
        return types.SimpleNamespace(fit=fit)

    with contextlib.ExitStack() as stack:
        for owner, name, value in (
            (cluster, "connect", lambda args: Cluster(embedded=True, cpus=2, gpus=0, nodes=1)),
            (driver, "start_warm_workers", lambda *_: []),
            (driver, "make_trainer", make_trainer),
            (events, "start_event_queue", lambda facts: queue),
            (ray, "get", lambda value, **_: value),
            (ray.train, "get_context", lambda: rank),
            (ray.train, "report", lambda *_, **__: None),
            (ray.train, "get_preemption_info", lambda: None),
            (packing, "_tried", lambda trial, *_: {"attention": trial.attn_impl or "sdpa", "by_row": []}),
        ):
            stack.enter_context(mock.patch.object(owner, name, value))
        stack.callback(queue.ended.set)
        yield queue

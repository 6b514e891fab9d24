"""What runs benchmarks: the interface of a backend, and what several of them need."""

from __future__ import annotations

import contextlib
import io
import logging
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from rayswift.eval.benchmarks import Benchmark
from rayswift.eval.models import EvalEndpoint, EvalModel
from rayswift.eval.results import Result
from rayswift.serve.running import Endpoint

if TYPE_CHECKING:
    from rayswift.arguments import EvalArguments


class Backend(Protocol):
    """Runs benchmarks on an endpoint with its own prompts and scorers."""

    folder: str  # below --eval_output_dir, and the key in eval_result.jsonl; SWIFT's names

    def prepare(self, benchmark: Benchmark) -> None:
        """Load and check its data. Raises UserError. Called for every benchmark before any model starts."""

    def check(self, benchmark: Benchmark, endpoint: EvalEndpoint) -> None:
        """Raises UserError where the engine cannot do what the benchmark needs."""

    def run(self, benchmark: Benchmark, model: EvalModel, endpoint: Endpoint, folder: Path) -> Result:
        """Ask and score every question. Answers are kept in ``folder``; called again there, it asks for the rest."""


@contextlib.contextmanager
def own_logging() -> Iterator[None]:
    """Importing EvalScope replaces the root logger's handlers; our lines stay as they were."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    try:
        yield
    finally:
        root.handlers[:] = handlers
        root.setLevel(level)


@contextlib.contextmanager
def without_bars() -> Iterator[None]:
    """Progress bars of reading a few files are not worth the lines."""
    with contextlib.redirect_stderr(io.StringIO()):
        yield


@contextlib.contextmanager
def own_progress(name: str, count: Callable[[], tuple[int, int | None]]) -> Iterator[None]:
    """One bar in place of a library's many, in a terminal only. ``count`` says what is done, of how many."""
    from tqdm import tqdm

    over = threading.Event()
    bar = tqdm(desc=name, unit="question", file=sys.stderr, disable=None)

    def show() -> None:
        bar.n, bar.total = count()
        bar.refresh()

    def watch() -> None:
        while not over.wait(1):
            show()

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        with contextlib.nullcontext() if is_debugging() else without_bars():
            yield
    finally:
        over.set()
        watcher.join()
        show()
        bar.close()


def is_debugging() -> bool:
    """Whether the libraries' own logs are wanted in the terminal (``LOG_LEVEL=debug``)."""
    return logging.getLogger("rayswift").getEffectiveLevel() <= logging.DEBUG


def generation_flags(args: EvalArguments) -> dict[str, Any]:
    """The flags of generation that the user set (temperature is 0 by default), under OpenAI's names."""
    flags = {
        "max_tokens": args.max_new_tokens, "temperature": args.temperature, "top_p": args.top_p, "top_k": args.top_k,
        "repetition_penalty": args.repetition_penalty, "stop": list(args.stop_words) or None,
    }  # fmt: skip
    return {name: value for name, value in flags.items() if value is not None}

"""Requests that share forward passes of a Transformers model, each with its own sampling, seed, stops and length.

A *row* is one answer being generated. One thread runs the model over a batch of rows of the same adapter with
``model.generate``. What a row has so far is enough to go on from, so a batch can be stopped between two tokens: to take
in new rows, to let another adapter's rows have their turn, or to try again with fewer when memory ran out.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

from rayswift.errors import one_line
from rayswift.generate.text_stream import TextStream
from rayswift.generate.token_choice import Choice, Sampling, choose_tokens
from rayswift.generate.transformers import TransformersEngine
from rayswift.generate.types import GenerationSettings

logger = logging.getLogger("rayswift.generate.continuous_batching")

BASE = ""  # the adapter of requests for the model itself
#: Tokens a batch runs on while others wait. Starting again costs a pass over all prompts, so it is only done at once
#: when the others can join in.
_TURN, _LONG_TURN = 16, 256


@dataclass(frozen=True)
class Piece:
    """A stretch of an answer: text that is certain, the tokens it came from, and why the answer ended (at its end)."""

    text: str
    token_ids: list[int]
    logprobs: list[dict[str, Any]]
    finish_reason: str | None = None
    error: str | None = None


class Row:
    """One answer. ``emit`` is called with each piece, in the thread of the model; `cancel` may come from any."""

    def __init__(
        self,
        engine: TransformersEngine,
        prompt: list[int],
        sampling: Sampling,
        emit: Callable[[Piece], Any],
        *,
        adapter: str = BASE,
        stop_ids: frozenset[int] = frozenset(),
        stop_words: tuple[str, ...] = (),
    ) -> None:
        self.prompt, self.sampling, self.adapter = prompt, sampling, adapter
        self.generated: list[int] = []
        self.done = False
        self._emit, self._stop_ids = emit, stop_ids
        tokenizer, skip = engine.encoder.tokenizer, sampling.skip_special_tokens
        self._decode = lambda ids: tokenizer.decode(ids, skip_special_tokens=skip, clean_up_tokenization_spaces=False)
        self._text = TextStream(self._decode, stop_words)
        self._ids: list[int] = []  # of the next piece, as are the log probabilities
        self._logprobs: list[dict[str, Any]] = []

    @property
    def left(self) -> int:
        """Tokens that may still come."""
        return self.sampling.max_tokens - len(self.generated)

    def take(self, choice: Choice) -> None:
        """The next token of the answer."""
        token = choice.token
        self.generated.append(token)
        self._ids.append(token)
        if token in self._stop_ids:
            self._finish("stop", self._text.end())
            return
        if choice.logprobs:
            self._logprobs.append(self._logprob_entry(choice.logprobs))
        text = self._text.add(token)
        if self._text.finished:
            self._finish("stop", text)
        elif self.left <= 0:
            self._finish("length", text + self._text.end())
        elif text:
            self._send(Piece(text, self._ids, self._logprobs))

    def replay(self, ids: list[int]) -> None:
        """Take tokens that were generated elsewhere; nothing after what ends the answer."""
        for token in ids:
            if not self.done:
                self.take(Choice(token))

    def cancel(self) -> None:
        """Nobody wants the rest: the model drops the row before its next token."""
        self.done = True

    def fail(self, error: str) -> None:
        """The model cannot answer."""
        self.done = True
        self._send(Piece("", self._ids, self._logprobs, "error", error))

    def _finish(self, reason: str, text: str) -> None:
        self.done = True
        self._send(Piece(text, self._ids, self._logprobs, reason))

    def _send(self, piece: Piece) -> None:
        self._ids, self._logprobs = [], []
        try:
            self._emit(piece)
        except RuntimeError:  # the event loop of the asker is gone
            self.done = True

    def _logprob_entry(self, likely: list[tuple[int, float]]) -> dict[str, Any]:
        """OpenAI's entry; ``likely`` has the chosen token first, then the alternatives."""
        entries = []
        for token, logprob in likely:
            text = self._decode([token])
            entries.append({"token": text, "logprob": max(logprob, -9999.0), "bytes": list(text.encode())})
        return {**entries[0], "top_logprobs": entries[1:]}


class Busy(Exception):
    """The line of waiting rows is full."""


@dataclass
class BatchRunner:
    """Runs rows on ``engine``. ``max_rows`` in a batch; `submit` refuses what would make ``max_waiting`` rows wait."""

    engine: TransformersEngine
    max_rows: int = 16
    max_waiting: int = 1024
    tokens: int = 0  # generated so far
    running: list[Row] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._waiting: deque[Row] = deque()
        self._tasks: deque[tuple[Callable[[], Any], Future[Any]]] = deque()
        self._changed, self._closed = threading.Condition(), False
        self._thread = threading.Thread(target=self._work, name="batches", daemon=True)
        self._thread.start()

    @property
    def alive(self) -> bool:
        """Whether the thread of the model still works."""
        return self._thread.is_alive()

    @property
    def waiting(self) -> int:
        """Rows that wait for their turn."""
        return len(self._waiting)

    def submit(self, rows: list[Row]) -> None:
        """Put rows at the end of the line.

        Raises:
            Busy: there is no room for them all.
        """
        with self._changed:
            if self._waiting and len(self._waiting) + len(rows) > self.max_waiting:
                raise Busy
            self._waiting += rows
            self._changed.notify()

    def between_batches(self, task: Callable[[], Any]) -> Future[Any]:
        """Run ``task`` while the model rests: whatever changes it."""
        future: Future[Any] = Future()
        with self._changed:
            self._tasks.append((task, future))
            self._changed.notify()
        return future

    def has_rows_of(self, adapter: str) -> bool:
        """Whether rows of an adapter run or wait."""
        with self._changed:
            return any(row.adapter == adapter and not row.done for row in (*self.running, *self._waiting))

    def close(self) -> None:
        """Stop the thread; rows that are not done get an error."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join()

    # --- the thread of the model --------------------------------------------------------------------------------

    def _work(self) -> None:
        while not self._closed:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._tasks or self._closed)
                tasks, self._tasks = list(self._tasks), deque()
            for task, future in tasks:
                _resolve(task, future)
            self._take_rows()
            if self.running:
                self._run(self.running)
                with self._changed:
                    self._waiting += [row for row in self.running if not row.done]
                    self.running = []
        for row in self._waiting:
            row.fail("the server is shutting down")

    def _take_rows(self) -> None:
        """Make a batch of the first row that waits and others of its adapter; the rest keep their places."""
        with self._changed:
            rows: list[Row] = []
            passed: list[Row] = []
            while self._waiting and len(rows) < self.max_rows:
                row = self._waiting.popleft()
                if not row.done:
                    (rows if not rows or row.adapter == rows[0].adapter else passed).append(row)
            self._waiting.extendleft(reversed(passed))
            self.running = rows

    def _run(self, rows: list[Row]) -> None:
        """One turn of a batch; when the model fails on it (memory, mostly), halve it until the guilty row is alone."""
        try:
            self._generate(rows)
        except Exception as error:
            left = [row for row in rows if not row.done]
            if len(left) == 1:
                logger.warning("an answer failed: %s", one_line(error))
                left[0].fail(one_line(error))
            elif left:
                logger.warning("a batch of %d failed (%s): trying smaller ones", len(left), one_line(error))
                self._run(left[: len(left) // 2])
                self._run(left[len(left) // 2 :])

    def _generate(self, rows: list[Row]) -> None:
        import torch
        from transformers import LogitsProcessorList, StoppingCriteriaList

        sequences = [row.prompt + row.generated for row in rows]
        width, pad = max(map(len, sequences)), self.engine.pad_token_id
        ids = torch.tensor([[pad] * (width - len(ids)) + ids for ids in sequences])
        mask = torch.tensor([[0] * (width - len(ids)) + [1] * len(ids) for ids in sequences])
        greedy = GenerationSettings(max(row.left for row in rows), temperature=0, repetition_penalty=1.0)
        config = self.engine.generation_config(greedy, width)
        model = self.engine.model
        # No token, and None would be the model's own: each row knows its ends.
        config.eos_token_id = model.get_input_embeddings().weight.shape[0]
        with self._adapter(rows[0].adapter), torch.inference_mode():
            model.generate(
                input_ids=ids.to(model.device),
                attention_mask=mask.to(model.device),
                generation_config=config,
                logits_processor=LogitsProcessorList([_Choosing(self, rows)]),
                stopping_criteria=StoppingCriteriaList([_TurnEnds(self, rows)]),
            )

    def _adapter(self, name: str) -> Any:
        """The context in which the model answers as this adapter."""
        model = self.engine.model
        if not hasattr(model, "disable_adapter"):  # no PeftModel
            return nullcontext()
        if name == BASE:
            return _no_adapter(model)
        model.set_adapter(name, inference_mode=True)
        return nullcontext()

    def turn_is_over(self, rows: list[Row], steps: int) -> bool:
        """Whether the batch should stop for those who wait."""
        if self._closed:
            return True
        if not (self._waiting or self._tasks):
            return False
        busy = sum(not row.done for row in rows)
        with self._changed:
            can_join = any(row.adapter == rows[0].adapter for row in self._waiting) and busy < self.max_rows
        return steps >= (_TURN if can_join or self._tasks else _LONG_TURN)


@contextmanager
def _no_adapter(model: Any) -> Iterator[None]:
    with model.disable_adapter():
        yield


def _resolve(task: Callable[[], Any], future: Future[Any]) -> None:
    try:
        future.set_result(task())
    except BaseException as error:
        future.set_exception(error)


class _Choosing:
    """A logits processor that chooses the next token of every row itself, and leaves ``generate`` no other."""

    def __init__(self, runner: BatchRunner, rows: list[Row]) -> None:
        self._runner, self._rows = runner, rows

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        import torch

        open_rows = [(index, row) for index, row in enumerate(self._rows) if not row.done]
        asked = [(index, row.sampling, row.prompt, row.generated) for index, row in open_rows]
        chosen = choose_tokens(asked, scores)
        forced = torch.full_like(scores, -torch.inf)
        forced[:, self._runner.engine.pad_token_id] = 0.0  # what rows go on with that are done
        for (index, row), choice in zip(open_rows, chosen, strict=True):
            forced[index] = -torch.inf
            forced[index, choice.token] = 0.0
            row.take(choice)
        self._runner.tokens += len(chosen)
        return forced


class _TurnEnds:
    """Stops the rows that are done, and all of them when the turn is over."""

    def __init__(self, runner: BatchRunner, rows: list[Row]) -> None:
        self._runner, self._rows, self._steps = runner, rows, 0

    def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> Any:
        import torch

        self._steps += 1
        over = self._runner.turn_is_over(self._rows, self._steps)
        return torch.tensor([over or row.done for row in self._rows], dtype=torch.bool, device=input_ids.device)

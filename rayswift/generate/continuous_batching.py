"""Requests that share forward passes of a Transformers model, each with its own sampling, seed, stops and length.

A *sequence* is one answer being generated. The model runs over a batch of sequences of the same adapter (its rows) with
``model.generate``: in one thread for all who submit, or in the caller's own. What a sequence has so far is enough to go
on from, so a batch can be stopped between two tokens: to take in new ones, to let another adapter's have their turn, or
to try again with fewer when memory ran out.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Protocol

from rayswift.errors import one_line
from rayswift.generate.logprobs import prompt_logprobs
from rayswift.generate.text_stream import TextStream
from rayswift.generate.token_choice import Choice, Sampling, choose_tokens
from rayswift.generate.types import SamplingParams

logger = logging.getLogger("rayswift.generate.continuous_batching")

BASE = ""  # the adapter of requests for the model itself
#: Tokens a batch runs on while others wait. Starting again costs a pass over all prompts, so it is only done at once
#: when the others can join in.
_TURN, _LONG_TURN = 16, 256


class Engine(Protocol):
    """What is run: `rayswift.generate.transformers.TransformersEngine`."""

    model: Any
    encoder: Any

    @property
    def pad_token_id(self) -> int: ...

    def generation_config(self, params: SamplingParams, prompt_length: int) -> Any: ...


@dataclass(frozen=True)
class TokenDelta:
    """A stretch of an answer: text that is certain, the tokens it came from, and why the answer ended (at its end):
    ``stop_reason`` is the stop word or the id in ``stop_ids``. ``logprobs``: `Choice.logprobs` of each token."""

    text: str
    token_ids: list[int]
    logprobs: list[list[tuple[int, float]]]
    finish_reason: str | None = None
    error: str | None = None
    stop_reason: str | int | None = None


class Sequence:
    """One answer. ``emit`` is called with each piece, in the thread of the model; `cancel` may come from any."""

    def __init__(
        self,
        engine: Engine,
        prompt: list[int],
        sampling: Sampling,
        emit: Callable[[TokenDelta], Any],
        *,
        adapter: str = BASE,
        stop_words: tuple[str, ...] = (),
    ) -> None:
        self.prompt, self.sampling, self.adapter = prompt, sampling, adapter
        self.generated: list[int] = []
        self.done = False
        self._emit, self._tokenizer = emit, engine.encoder.tokenizer
        self._text = TextStream(self._decode, stop_words, keep_stop=sampling.keep_stop)
        self._ids: list[int] = []  # of the next piece, as are the log probabilities
        self._logprobs: list[list[tuple[int, float]]] = []

    @property
    def left(self) -> int:
        """Tokens that may still come."""
        return self.sampling.max_tokens - len(self.generated)

    def take(self, choice: Choice) -> None:
        """The next token of the answer."""
        token = choice.token
        self.generated.append(token)
        self._ids.append(token)
        if choice.logprobs:
            self._logprobs.append(choice.logprobs)
        if token in self.sampling.stop_ids:
            text = self._text.add(token) if self.sampling.keep_stop else ""
            self._finish("stop", text + self._text.end(), token)
            return
        text = self._text.add(token)
        if self._text.finished:
            self._finish("stop", text, self._text.stopped_by)
        elif self.left <= 0:
            self._finish("length", text + self._text.end())
        elif text:
            self._send(TokenDelta(text, self._ids, self._logprobs))

    def replay(self, ids: list[int]) -> None:
        """Take tokens that were generated elsewhere; nothing after what ends the answer."""
        for token in ids:
            if not self.done:
                self.take(Choice(token))

    def end(self) -> None:
        """No token is asked for: the answer is empty."""
        self._finish("length", "")

    def cancel(self) -> None:
        """Nobody wants the rest: the model drops the row before its next token."""
        self.done = True

    def fail(self, error: str) -> None:
        """The model cannot answer."""
        self.done = True
        self._send(TokenDelta("", self._ids, self._logprobs, "error", error))

    def _finish(self, reason: str, text: str, stop_reason: str | int | None = None) -> None:
        self.done = True
        self._send(TokenDelta(text, self._ids, self._logprobs, reason, stop_reason=stop_reason))

    def _decode(self, ids: Any) -> str:
        skip = self.sampling.skip_special_tokens
        text: str = self._tokenizer.decode(ids, skip_special_tokens=skip, clean_up_tokenization_spaces=False)
        return text

    def _send(self, piece: TokenDelta) -> None:
        self._ids, self._logprobs = [], []
        try:
            self._emit(piece)
        except RuntimeError:  # the event loop of the asker is gone
            self.done = True


class Busy(Exception):
    """The line of waiting rows is full."""


@dataclass
class BatchRunner:
    """Runs rows on ``engine``: those submitted in a thread of its own, or those of `run` in the caller's.

    ``max_rows`` in a batch; `submit` refuses what would make ``max_waiting`` rows wait.
    """

    engine: Engine
    max_rows: int = 16
    max_waiting: int = 1024
    tokens: int = 0  # generated so far
    running: list[Sequence] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._waiting: deque[Sequence] = deque()
        self._tasks: deque[tuple[Callable[[], Any], Future[Any]]] = deque()
        self._changed, self._closed = threading.Condition(), False
        self._thread = threading.Thread(target=self._work, name="batches", daemon=True)
        self._started = False

    @property
    def alive(self) -> bool:
        """Whether the thread of the model still works, or has yet to start."""
        return not self._started or self._thread.is_alive()

    @property
    def waiting(self) -> int:
        """Rows that wait for their turn."""
        return len(self._waiting)

    def submit(self, rows: list[Sequence]) -> None:
        """Put rows at the end of the line.

        Raises:
            Busy: there is no room for them all.
        """
        with self._changed:
            if self._waiting and len(self._waiting) + len(rows) > self.max_waiting:
                raise Busy
            self._waiting += rows
            self._wake()

    def between_batches(self, task: Callable[[], Any]) -> Future[Any]:
        """Run ``task`` while the model rests: whatever changes it."""
        future: Future[Any] = Future()
        with self._changed:
            self._tasks.append((task, future))
            self._wake()
        return future

    def score_prompt(self, prompt: list[int], adapter: str, top: int) -> Future[Any]:
        """`prompt_logprobs` of a prompt, as this adapter has them."""

        def score() -> Any:
            with self._adapter(adapter):
                return prompt_logprobs(self.engine.model, prompt, top)

        return self.between_batches(score)

    def has_rows_of(self, adapter: str) -> bool:
        """Whether rows of an adapter run or wait."""
        with self._changed:
            return any(row.adapter == adapter and not row.done for row in (*self.running, *self._waiting))

    def close(self) -> None:
        """Stop the thread; rows that are not done get an error."""
        with self._changed:
            self._closed = True
            self._wake()
        self._thread.join()

    def run(self, rows: list[Sequence]) -> None:
        """Answer rows in this thread, all in one batch; for a runner that nobody submits to."""
        while left := [row for row in rows if not row.done]:
            self._run(left)

    def _wake(self) -> None:
        """Let the thread look (it starts when there is something to do for the first time)."""
        if not self._started:
            self._started = True
            self._thread.start()
        self._changed.notify()

    # --- the thread of the model --------------------------------------------------------------------------------

    def _work(self) -> None:
        try:
            while not self._closed:
                with self._changed:
                    self._changed.wait_for(lambda: self._waiting or self._tasks or self._closed)
                    tasks, self._tasks = list(self._tasks), deque()
                for task, future in tasks:
                    if not future.set_running_or_notify_cancel():
                        continue  # who asked has left
                    try:
                        future.set_result(task())
                    except BaseException as error:
                        future.set_exception(error)
                self._take_rows()
                if self.running:
                    self._run(self.running)
                    with self._changed:
                        self._waiting += [row for row in self.running if not row.done]
                        self.running = []
        finally:
            for row in (*self.running, *self._waiting):
                if not row.done:
                    row.fail("the server is shutting down")

    def _take_rows(self) -> None:
        """Make a batch of the first row that waits and others of its adapter; the rest keep their places."""
        with self._changed:
            rows: list[Sequence] = []
            passed: list[Sequence] = []
            while self._waiting and len(rows) < self.max_rows:
                row = self._waiting.popleft()
                if not row.done:
                    (rows if not rows or row.adapter == rows[0].adapter else passed).append(row)
            self._waiting.extendleft(reversed(passed))
            self.running = rows

    def _run(self, rows: list[Sequence]) -> None:
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

    def _generate(self, rows: list[Sequence]) -> None:
        import torch
        from transformers import LogitsProcessorList, StoppingCriteriaList

        ids, mask = padded([row.prompt + row.generated for row in rows], self.engine.pad_token_id)
        greedy = SamplingParams(max(row.left for row in rows), temperature=0, repetition_penalty=1.0)
        config = self.engine.generation_config(greedy, ids.shape[1])
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

    @contextmanager
    def _adapter(self, name: str) -> Iterator[None]:
        """While the context lasts the model answers as this adapter."""
        model = self.engine.model
        is_adapted = hasattr(model, "disable_adapter")  # a PeftModel
        if is_adapted and name != BASE:
            model.set_adapter(name, inference_mode=True)
        with model.disable_adapter() if is_adapted and name == BASE else nullcontext():
            yield

    def turn_is_over(self, rows: list[Sequence], steps: int) -> bool:
        """Whether the batch should stop for those who wait."""
        if self._closed:
            return True
        if not (self._waiting or self._tasks):
            return False
        busy = sum(not row.done for row in rows)
        with self._changed:
            can_join = any(row.adapter == rows[0].adapter for row in self._waiting) and busy < self.max_rows
        return steps >= (_TURN if can_join or self._tasks else _LONG_TURN)


def padded(sequences: list[list[int]], pad: int) -> tuple[Any, Any]:
    """Token ids and attention mask, shape (sequences, longest), the shorter ones filled up on the left."""
    import torch

    width = max(map(len, sequences))
    ids = [[pad] * (width - len(sequence)) + sequence for sequence in sequences]
    mask = [[0] * (width - len(sequence)) + [1] * len(sequence) for sequence in sequences]
    return torch.tensor(ids), torch.tensor(mask)


class _Choosing:
    """A logits processor that chooses the next token of every row itself, and leaves ``generate`` no other."""

    def __init__(self, runner: BatchRunner, rows: list[Sequence]) -> None:
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

    def __init__(self, runner: BatchRunner, rows: list[Sequence]) -> None:
        self._runner, self._rows, self._steps = runner, rows, 0

    def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> Any:
        import torch

        self._steps += 1
        over = self._runner.turn_is_over(self._rows, self._steps)
        return torch.tensor([over or row.done for row in self._rows], dtype=torch.bool, device=input_ids.device)

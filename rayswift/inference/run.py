"""Answers to the rows of a dataset: from a source of answers to the result file, with progress and statistics."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from rayswift.console import say
from rayswift.errors import UserError
from rayswift.generate.types import (
    Answer,
    AnswerSource,
    Engine,
    EngineUnusable,
    JsonRow,
    Request,
    SamplingParams,
    prompt_of,
    split_reference,
)
from rayswift.inference.chat import RULE
from rayswift.inference.rows import BAD_ROW, result_row
from rayswift.inference.scores import score
from rayswift.journal import ResultFile

if TYPE_CHECKING:
    from rayswift.arguments import InferArguments

logger = logging.getLogger("rayswift.inference.run")


def answer_rows(
    source: AnswerSource, rows: Sequence[JsonRow], results: ResultFile, args: InferArguments
) -> list[JsonRow]:
    """Answer the rows that the result file lacks and write them to it in order; returns all rows of this run."""
    kept = len(results.rows)
    if 0 < kept < len(rows):
        logger.info("%d of %d rows are in %s already: they are kept", kept, len(rows), results.path)
    missing = list(enumerate(rows))[kept:]
    # Answers that came before those of earlier rows wait here; rows that could not be read need no engine.
    waiting = {index: result_row(row, Answer(error=row[BAD_ROW])) for index, row in missing if BAD_ROW in row}
    throughput = Throughput()

    def write_ready() -> int:
        before = len(results.rows)
        while (index := len(results.rows)) in waiting:
            results.append(waiting.pop(index))
        return len(results.rows) - before

    with progress_bar(len(rows), kept, hidden=bool(args.stream)) as bar:
        bar.update(write_ready())
        for index, answer in source([Request((index,), row) for index, row in missing if BAD_ROW not in row]):
            throughput.add(answer)
            waiting[index] = result_row(rows[index], answer)
            bar.set_postfix_str(f"{throughput.tokens_per_second:.1f} tokens/s", refresh=False)
            bar.update(write_ready())
    report(results, args.metric, throughput.statistics(len(missing)))
    return results.rows


@dataclass
class Throughput:
    """What was generated, and how fast."""

    num_prompt_tokens: int = 0
    num_generated_tokens: int = 0
    start: float = field(default_factory=time.monotonic)
    engine_start: float | None = None
    latest: float = 0.0

    def add(self, answer: Answer) -> None:
        """Count an answer that has just come."""
        self.num_prompt_tokens += answer.num_prompt_tokens
        self.num_generated_tokens += answer.num_generated_tokens
        self.latest = time.monotonic()
        if answer.seconds:  # the pool's first engine was ready when it took the first of them
            began = self.latest - answer.seconds
            self.engine_start = min(began, self.engine_start or began)

    @property
    def runtime(self) -> float:
        """Seconds so far."""
        return max(time.monotonic() - self.start, 1e-9)

    @property
    def tokens_per_second(self) -> float:
        """Generated tokens per second."""
        return self.num_generated_tokens / self.runtime

    @property
    def engine_tokens_per_second(self) -> float:
        """Generated tokens per second from the moment the first engine was ready to the latest answer."""
        if self.engine_start is None:
            return self.tokens_per_second
        return self.num_generated_tokens / max(self.latest - self.engine_start, 1e-9)

    def statistics(self, num_samples: int) -> JsonRow:
        """SWIFT's last line."""
        return {
            "num_prompt_tokens": self.num_prompt_tokens,
            "num_generated_tokens": self.num_generated_tokens,
            "num_samples": num_samples,
            "runtime": round(self.runtime, 4),
            "samples/s": round(num_samples / self.runtime, 4),
            "tokens/s": round(self.tokens_per_second, 4),
        }


def progress_bar(total: int, done: int, *, hidden: bool, name: str = "infer", unit: str = "row") -> Any:
    """Rows, rows/s, the time left and tokens/s, on standard error."""
    from tqdm.auto import tqdm

    return tqdm(total=total, initial=done, desc=name, unit=unit, disable=hidden)


def report(results: ResultFile, metric: str | None, statistics: JsonRow) -> None:
    """Print what was done: the score asked for, SWIFT's line of statistics, failures, and where the answers are."""
    rows = results.rows
    failed = [row for row in rows if BAD_ROW in row]
    if metric is not None:
        say(score(rows, metric))
    say(statistics)
    if failed:
        logger.warning("%d of %d rows have no answer, the first: %s", len(failed), len(rows), failed[0][BAD_ROW])
    say(f"The answers are in {results.path}")


def shown(engine: Engine, params: SamplingParams) -> AnswerSource:
    """One row after the other, each shown in the terminal as it is answered (``--stream true`` over a dataset)."""

    def answer(row: JsonRow) -> Answer:
        asked = split_reference(row["messages"])[0]
        say(f"[QUERY] {asked[-1]['content'] if asked else ''}\n[RESPONSE] ", end="")
        try:
            for piece in engine.stream(prompt_of(row), params, row.get("tools")):
                say(piece, end="")
        except EngineUnusable:
            raise
        except (UserError, RuntimeError, ValueError, IndexError) as error:
            return Answer(error=str(error))
        finally:
            say(f"\n{RULE}")
        return engine.last_stream

    return lambda requests: ((request.numbers[0], answer(request.row)) for request in requests)

"""What goes to the engines of a pool and comes back: rows of Ray Data's tables."""

from __future__ import annotations

import json
from collections.abc import Sequence

from rayswift.generate.types import Answer, JsonRow, Request, prompt_of

#: How often a block of prompts is given to another engine when its engine died. One that kills every engine must not
#: be tried for ever.
BLOCK_RETRIES = 20
#: CPUs that each of Ray Data's tasks before and after vLLM reserves: they must fit beside it on a small machine, or it
#: would wait for ever.
HELPER_CPUS = 0.1
#: The columns of an answer on its way back; ``error`` is the name that `ray.data.llm` gives it.
ERROR = "__inference_error__"
#: The seed of an answer that has none of its own: the command's ``--seed``.
NO_SEED = -1


def request_row(request: Request) -> JsonRow:
    """A request on its way to an engine."""
    return {
        "index": request.numbers,
        "seed": request.seeds or (NO_SEED,) * len(request.numbers),
        "messages": json.dumps(prompt_of(request.row)),
        "tools": json.dumps(request.row.get("tools")),
    }


def each_answer(item: JsonRow) -> list[JsonRow]:
    """A request as one row for each of its answers."""
    pairs: Sequence[tuple[int, int]] = list(zip(item["index"], item["seed"], strict=True))
    return [{**item, "index": int(index), "seed": int(seed)} for index, seed in pairs]


def answer_row(index: int, answer: Answer) -> JsonRow:
    """An answer on its way from an engine to the driver."""
    return {
        "index": index,
        "text": answer.text,
        "num_prompt_tokens": answer.num_prompt_tokens,
        "num_generated_tokens": answer.num_generated_tokens,
        "logprobs": json.dumps(answer.logprobs),
        "seconds": answer.seconds,
        ERROR: answer.error or "",
    }


def read_answer(row: JsonRow) -> Answer:
    """The answer of such a row. From `ray.data.llm` a row with an error has nothing else that can be relied on."""
    if row[ERROR]:
        return Answer(error=str(row[ERROR]))
    return Answer(
        row["text"],
        int(row["num_prompt_tokens"]),
        int(row["num_generated_tokens"]),
        json.loads(row["logprobs"]),
        seconds=float(row["seconds"]),
    )

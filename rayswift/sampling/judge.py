"""Process rewards from a model that judges, behind any OpenAI endpoint. SWIFT's ``client`` and ``qwen_max``."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from rayswift.errors import UserError
from rayswift.generate.types import EngineUnusable, SamplingParams

if TYPE_CHECKING:
    from rayswift.arguments import SampleArguments
    from rayswift.generate.endpoint import EndpointEngine
    from rayswift.sampling.tasks import Task

logger = logging.getLogger("rayswift.sampling")

_DASHSCOPE = "https://dashscope.aliyuncs.com/compatible-mode/v1"
#: name → what its endpoint, model and key are where the flags do not say.
JUDGES: dict[str, dict[str, Any]] = {
    "client": {},
    "qwen_max": {"base_url": _DASHSCOPE, "model": "qwen-max", "key_variable": "DASHSCOPE_API_KEY"},
}
_INSTRUCTIONS = (
    "You judge answers. Read the conversation, the reference answer and the answer to judge, which may be "
    "unfinished. Think step by step about whether it is correct, coherent and clear; the reference is one good answer, "
    "not the only one. End with a line of this form, where the number is between -1.0 (worst) and 1.0 (best):\n"
    "Reward: NUMBER"
)
_REWARD = re.compile(r"Reward\W*?(?P<number>[-+]?\d*\.?\d+)", re.IGNORECASE)


@dataclass
class Judge:
    """Asks for a reward between −1 and 1 for each answer; a judgement without a number counts as 0, and an answer for
    which there is no judgement (refused, empty, too long) has no reward: it is neither kept nor rejected."""

    base_url: str
    model: str | None
    api_key: str | None
    parallel: int
    max_tokens: int = 1024  # a small model that repeats itself would go on until its context is full
    needs_reference: bool = False

    @classmethod
    def of(cls, args: SampleArguments, name: str) -> Judge:
        """The judge that the flags describe.

        Raises:
            UserError: its key is not there.
        """
        own = JUDGES[name]
        key = args.judge_api_key or os.environ.get(own.get("key_variable", "OPENAI_API_KEY"))
        if name == "qwen_max" and not key and not args.judge_base_url:
            raise UserError("--prm_model qwen_max needs a key: give --judge_api_key, or set DASHSCOPE_API_KEY")
        base_url = args.judge_base_url or own["base_url"]
        return cls(base_url, args.judge_model or own.get("model"), key, args.max_parallel_requests,
                   args.judge_max_tokens)  # fmt: skip

    def sources(self) -> dict[str, str]:
        """What the judge's endpoint says of itself."""
        from rayswift.generate.endpoint import endpoint_sources

        return endpoint_sources("--judge_base_url", self.base_url, self.model, self.api_key)

    def score(self, tasks: Iterable[Task]) -> Iterator[tuple[int, list[float | None]]]:
        """Judge every answer of the tasks, several tasks at a time."""
        from rayswift.generate.endpoint import EndpointEngine, in_parallel

        try:
            engine = EndpointEngine.connect(self.base_url, model=self.model, api_key=self.api_key).patient()
            calls = ((task.index, partial(self.judge_task, engine, task)) for task in tasks)
            yield from in_parallel(calls, self.parallel)
        except EngineUnusable as error:
            renamed = re.sub(r"--(base_url|model|api_key)\b", r"--judge_\1", str(error))
            raise EngineUnusable(renamed) from None

    def judge_task(self, engine: EndpointEngine, task: Task) -> list[float | None]:
        """The rewards of one prompt's answers."""
        return [self.judge(engine, request["messages"], task.reference) for request in task.requests]

    def judge(self, engine: EndpointEngine, messages: list[dict[str, Any]], reference: str | None) -> float | None:
        """The reward of one answer; None where the judge gives none."""
        *before, answer = messages
        said = "\n\n".join(f"[{message['role']}]\n{message['content']}" for message in before)
        question = f"The conversation:\n\n{said}\n\nThe reference answer:\n\n{reference or '(none)'}\n\n"
        asked = [{"role": "system", "content": _INSTRUCTIONS},
                 {"role": "user", "content": f"{question}The answer to judge:\n\n{answer['content']}"}]  # fmt: skip
        settings = SamplingParams(temperature=0.0, max_new_tokens=self.max_tokens)
        try:
            text = engine.complete(asked, settings).text
        except EngineUnusable:
            raise
        except UserError as error:
            logger.warning("an answer has no judgement: %s", error)
            return None
        found = list(_REWARD.finditer(text))  # the number after the last counts
        return min(1.0, max(-1.0, float(found[-1]["number"]))) if found else 0.0

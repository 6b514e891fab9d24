"""A pool of vLLM engines: `ray.data.llm`'s processor, with the prompts of training.

Its chat-template, tokenising and detokenising stages stay out: each would hold a CPU, and the ids are ours.
"""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rayswift import private
from rayswift.data.tokens.encoder import Encoder
from rayswift.errors import UserError
from rayswift.generate.logprobs import logprob_entry
from rayswift.generate.model_spec import ModelSpec
from rayswift.generate.pool_rows import BLOCK_RETRIES, ERROR, HELPER_CPUS, NO_SEED, answer_row, each_answer
from rayswift.generate.types import Answer, JsonRow, SamplingParams
from rayswift.modeling.resolved import ResolvedModel

#: Settings of vLLM's server that its engine does not know.
_SERVER_ONLY = ("enable_auto_tool_choice", "tool_call_parser", "reasoning_parser", "enable_log_requests")
#: Tokens per step: those of vLLM's class for offline work (an engine that somebody else drives gets 2048).
_BATCHED_TOKENS = {"gpu": 8192, "cpu": 4096}
#: Answers under way per slot of the engine. A block comes back when its last answer is there; with more of them under
#: way, the slots of those that ended early are taken at once.
_OVERLAP = 2


def answered_by_vllm(
    dataset: Any, model: ResolvedModel, spec: ModelSpec, size: tuple[int, int], block_answers: int
) -> Any:
    """The dataset of answers (see :func:`rayswift.generate.pool_rows.answer_row`) to one of requests.

    Several answers to a prompt are several rows: `ray.data.llm` returns one for each, and vLLM itself makes one request
    of each of ``n``. They stand in one block, so the engine computes the prompt once and keeps it for the others.
    """
    from ray.data.llm import build_processor, vLLMEngineProcessorConfig

    from rayswift.generate.transformers import context_length

    args, model_dir = model.args, resolve_on_every_node(spec, model.args.hub_token)
    params = SamplingParams.from_arguments(args)
    encoder = Encoder.from_args(args, model_dir)
    context = min(spec.max_model_len or math.inf, context_length(encoder, args.positions))
    requests = RequestMaker(encoder, params, args.seed, int(context), next(iter(spec.adapters.values()), model_dir))
    kwargs = offline_kwargs(spec) | spec.llm_config(model_dir)["engine_kwargs"]
    config = vLLMEngineProcessorConfig(
        model_source=model_dir,
        engine_kwargs={name: value for name, value in kwargs.items() if name not in _SERVER_ONLY},
        concurrency=size,
        batch_size=block_answers,
        max_concurrent_batches=math.ceil(_OVERLAP * args.vllm_max_num_seqs / block_answers),
        should_continue_on_error=True,
        chat_template_stage=False,
        tokenize_stage=False,
        detokenize_stage=False,
        placement_group_config={"bundles": spec.bundles, "strategy": spec.placement_strategy},
        runtime_env={"env_vars": spec.env_vars},
        log_engine_metrics=False,
    )
    helpers = {"num_cpus": HELPER_CPUS}
    with quiet():
        processor = build_processor(
            config,
            preprocess=requests,
            postprocess=functools.partial(vllm_answer, encoder),
            preprocess_map_kwargs=helpers,
            postprocess_map_kwargs=helpers,
        )
    private.retry_engine_blocks(processor, BLOCK_RETRIES)
    return processor(dataset.flat_map(each_answer, num_cpus=HELPER_CPUS))


def offline_kwargs(spec: ModelSpec) -> dict[str, Any]:
    """Engine settings of work that nobody waits for; what the spec says goes before them."""
    tokens = _BATCHED_TOKENS["gpu" if spec.use_gpu else "cpu"]
    if spec.use_gpu:
        return {"max_num_batched_tokens": tokens}
    # Prompts are computed whole there; of a model whose length is not given, vLLM itself finds the batch that holds it.
    return {"max_num_batched_tokens": max(tokens, spec.max_model_len)} if spec.max_model_len else {}


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """No warnings from libraries: building the processor calls ``ray.init`` again, which says so at length."""
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(logging.NOTSET)
        logging.getLogger("ray").setLevel(logging.ERROR)


def resolve_on_every_node(spec: ModelSpec, token: str | None) -> str:
    """The model's folder, downloaded where it is not there yet (``token``: the hub's): vLLM does not know our hubs.

    Raises:
        UserError: the nodes keep it in different places.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    here = spec.resolve_model(token)
    resolve = ray.remote(num_cpus=0)(ModelSpec.resolve_model)
    nodes = [node["NodeID"] for node in ray.nodes() if node["Alive"]] if not spec.local else []
    waiting = [
        resolve.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False)).remote(spec, token)
        for node in nodes
    ]
    if elsewhere := {folder for folder in ray.get(waiting) if folder != here}:
        raise UserError(f"--model {spec.model}: other nodes keep it in {elsewhere.pop()}, not in {here}; "
                        "put it on storage that all share and give its path")  # fmt: skip
    return here


@dataclass(frozen=True)
class RequestMaker:
    """Turns a row into what the engine stage takes. ``model``: the model's folder, or the adapter's."""

    encoder: Encoder
    params: SamplingParams
    seed: int
    context: int
    model: str
    _last: dict[tuple[str, str], tuple[list[int], str]] = field(default_factory=dict, compare=False, repr=False)

    def __call__(self, row: JsonRow) -> JsonRow:
        """A row that cannot be a prompt passes the engine by as an error.

        Every row has the same keys: Arrow would fill gaps with None, and a None where the error stands is one too.
        """
        prompt = (row["messages"], row["tools"])
        if prompt not in self._last:  # the answers to a prompt stand side by side: it is encoded once
            self._last.clear()
            self._last[prompt] = self.prompt_ids(*map(json.loads, prompt))
        ids, error = self._last[prompt]
        own = row.get("seed", NO_SEED)
        seed = self.seed if own == NO_SEED else own
        return {
            "tokenized_prompt": ids,
            "sampling_params": sampling_params(self.params, self.encoder, seed, self.context - len(ids)),
            "model": self.model,
            ERROR: error,
        }

    def prompt_ids(self, messages: list[JsonRow], tools: Any) -> tuple[list[int], str]:
        """Token ids of a prompt, or why there are none."""
        try:
            ids = self.encoder.encode_prompt(messages, tools)
        except UserError as error:
            return [], str(error)
        if not ids:
            return [], "the prompt is empty"
        if len(ids) >= self.context:
            return [], f"the prompt has {len(ids)} tokens, the context holds {self.context}"
        return ids, ""


def sampling_params(params: SamplingParams, encoder: Encoder, seed: int, room: int) -> dict[str, Any]:
    """vLLM's ``SamplingParams``: what is not set is the model's, as with the Transformers engine."""
    return {
        **params.resolved(generation_config(encoder.model_dir)),
        "max_tokens": max(1, min(params.max_new_tokens or room, room)),
        "seed": seed,
        "stop": [*encoder.stop_strings, *params.stop_words],
        "stop_token_ids": encoder.eos_token_ids,
        "skip_special_tokens": False,
        "logprobs": (params.top_logprobs or 0) if params.logprobs else None,
    }


@functools.lru_cache(maxsize=4)
def generation_config(model_dir: str) -> dict[str, Any]:
    """The model's ``generation_config.json``; empty if it has none."""
    try:
        with open(f"{model_dir}/generation_config.json", encoding="utf-8") as file:
            found = json.load(file)
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def vllm_answer(encoder: Encoder, row: JsonRow) -> JsonRow:
    """What the engine stage gave, on its way back. Rows with an error do not come here."""
    answer = Answer(
        (encoder.response_prefix or "") + row["generated_text"],
        row["num_input_tokens"],
        row["num_generated_tokens"],
        openai_logprobs(encoder.tokenizer, row["generated_tokens"], row["logprobs"]),
        seconds=row["time_taken_llm"],
    )
    return answer_row(row["index"], answer)


def openai_logprobs(
    tokenizer: Any, ids: Sequence[int], steps: Sequence[Mapping[int, JsonRow]] | None
) -> JsonRow | None:
    """vLLM's log probabilities (per step: token id → logprob, rank) as OpenAI's object."""
    if steps is None:
        return None

    content = []
    for token, step in zip(ids, steps, strict=False):
        ranked = sorted(step.items(), key=lambda pair: pair[1]["rank"])
        likely = [(int(other), found["logprob"]) for other, found in ranked]
        content.append(logprob_entry(tokenizer, [(token, step[token]["logprob"]), *likely]))
    return {"content": content}

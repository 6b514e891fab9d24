"""What the model is to do for a request: its fields, else the model's ``generation_config.json``."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

from rayswift.data.tokens.encoder import Encoder
from rayswift.generate.constraints import Constraint
from rayswift.generate.continuous_batching import Sequence, TokenDelta
from rayswift.generate.token_choice import Sampling
from rayswift.generate.transformers import TransformersEngine
from rayswift.serve.openai_errors import ApiError
from rayswift.serve.replica.openai_requests import ChatRequest, GenerationRequest
from rayswift.serve.replica.tool_calls import call_grammar
from rayswift.serve.replica.trained_template import stop_strings


def rows_of(
    engine: TransformersEngine, body: GenerationRequest, prompts: list[list[int]], adapter: str, encoder: Encoder,
    emit: Callable[[int, TokenDelta], Any], defaults: Mapping[str, Any],
) -> list[Sequence]:  # fmt: skip
    """A row for each choice of each prompt; ``emit`` gets the number of the choice with each piece. ``defaults``: the
    deployment's (`ModelSpec.sampling`).

    Raises:
        ApiError: the request asks for what cannot be.
    """
    ends = set() if body.ignore_eos else {*encoder.eos_token_ids, *engine.stop_token_ids}
    ends |= set(body.stop_token_ids or ())
    asked = [body.stop] if isinstance(body.stop, str) else body.stop or []
    calls = isinstance(body, ChatRequest) and body.wants_calls
    words = (*asked, *(() if body.ignore_eos else stop_strings(encoder, tools=calls)))
    count = body.n or 1
    samplings = [_sampling(engine, body, prompt, ends, defaults) for prompt in prompts for _ in range(count)]
    constraints = _constraints(engine, body, encoder, len(samplings))
    return [
        Sequence(
            engine, prompts[index // count], replace(sampling, index=index % count, constraint=constraints[index]),
            partial(emit, index), adapter=adapter, stop_words=words,
        )
        for index, sampling in enumerate(samplings)
    ]  # fmt: skip


def _sampling(
    engine: TransformersEngine, body: GenerationRequest, prompt: list[int], ends: set[int], defaults: Mapping[str, Any]
) -> Sampling:
    """How every answer to a prompt is sampled; ``ends``: tokens that end one.

    Raises:
        ApiError: prompt and answer do not fit into the context, or a token is none.
    """
    room, wanted = engine.context_length - len(prompt), body.token_limit
    if not prompt:
        raise ApiError(400, "the prompt is empty", param="prompt")
    if room < (0 if wanted == 0 else 1) or (wanted or 0) > room:
        asked = f"{len(prompt)} in the prompt" + (f" and {wanted} for the answer" if wanted else "")
        limit = f"This model's maximum context length is {engine.context_length} tokens"
        raise ApiError(400, f"{limit}; you asked for {asked}", code="context_length_exceeded", param="messages")
    config = engine.model.generation_config
    chosen: dict[str, Any] = {}
    for name in ("temperature", "top_p", "top_k", "min_p", "repetition_penalty"):
        own = getattr(body, name)
        chosen[name] = defaults.get(name, getattr(config, name, None)) if own is None else own
    chosen |= {name: getattr(body, name) for name in ("presence_penalty", "frequency_penalty", "seed", "min_tokens")}
    if not all(key.isascii() and key.isdigit() and len(key) < 10 for key in body.logit_bias or ()):
        raise ApiError(400, "logit_bias: keys are token ids", param="logit_bias")
    bias = {int(key): max(-100.0, min(100.0, value)) for key, value in (body.logit_bias or {}).items()}
    for name, ids in (("logit_bias", bias), ("allowed_token_ids", body.allowed_token_ids or ()),
                      ("stop_token_ids", body.stop_token_ids or ())):  # fmt: skip
        check_ids(ids, engine.vocabulary, name)
    # Marks of tool calls may be special tokens; vLLM keeps them too where calls are read.
    keeps_special = body.skip_special_tokens is False or (isinstance(body, ChatRequest) and body.wants_calls)
    sampling = Sampling(
        # As with vLLM, the deployment's is also the most that a request gets.
        max_tokens=min(room if wanted is None else wanted, defaults.get("max_new_tokens") or room),
        logit_bias=bias,
        logprobs=body.alternatives,
        skip_special_tokens=not keeps_special,
        stop_ids=frozenset(ends),
        allowed_ids=None if body.allowed_token_ids is None else tuple(dict.fromkeys(body.allowed_token_ids)),
        banned=_banned(engine.encoder.tokenizer, body.bad_words or []),
        keep_stop=bool(body.include_stop_str_in_output),
        **{name: value for name, value in chosen.items() if value is not None},
    )
    if sampling.min_tokens > sampling.max_tokens:
        raise ApiError(400, f"min_tokens {sampling.min_tokens} is above max_tokens", param="min_tokens")
    if sampling.greedy and (body.n or 1) > 1:
        raise ApiError(400, "n must be 1 at temperature 0: the choices would be the same", param="n")
    return sampling


def _constraints(
    engine: TransformersEngine, body: GenerationRequest, encoder: Encoder, count: int
) -> list[Constraint | None]:  # fmt: skip
    """What each of the answers must be. Raises ApiError (400) where that is no schema, grammar and so on."""
    wanted, param = body.constraint, "response_format" if body.response_format else "structured_outputs"
    if isinstance(body, ChatRequest) and body.forced_tools:
        many = body.tool_choice == "required" and body.parallel_tool_calls is not False
        wanted, param = ("lark", call_grammar(encoder, body.forced_tools, many=many)), "tools"
    try:
        return [engine.grammars(*wanted) if wanted else None for _ in range(count)]
    except ValueError as error:
        raise ApiError(400, f"{param}: {error}", param=param) from None


def check_ids(ids: Any, vocabulary: int, param: str) -> None:
    """Raises ApiError (400) for ids that are no tokens."""
    if ids and max(ids) >= vocabulary:
        raise ApiError(400, f"token id {max(ids)} is out of the vocabulary of {vocabulary}", param=param)


def _banned(tokenizer: Any, words: list[str]) -> tuple[tuple[int, ...], ...]:
    """Token sequences of words, at the beginning of a text and after a space."""
    texts = [text for word in words for text in (word.lstrip(), f" {word.lstrip()}")]
    found = (tuple(tokenizer.encode(text, add_special_tokens=False)) for text in texts)
    return tuple(ids for ids in dict.fromkeys(found) if ids)

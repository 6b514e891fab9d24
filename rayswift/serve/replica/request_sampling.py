"""How the answers of a request are sampled: its fields, else the model's ``generation_config.json``."""

from __future__ import annotations

from typing import Any

from rayswift.generate.constraints import Constraint
from rayswift.generate.token_choice import Sampling
from rayswift.generate.transformers import TransformersEngine
from rayswift.serve.openai_errors import ApiError
from rayswift.serve.replica.openai_requests import ChatRequest, GenerationRequest


def sampling_of(
    engine: TransformersEngine, body: GenerationRequest, prompt: list[int], ends: set[int], vocabulary: int
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
        chosen[name] = getattr(config, name, None) if own is None else own
    chosen |= {name: getattr(body, name) for name in ("presence_penalty", "frequency_penalty", "seed", "min_tokens")}
    if not all(key.isascii() and key.isdigit() and len(key) < 10 for key in body.logit_bias or ()):
        raise ApiError(400, "logit_bias: keys are token ids", param="logit_bias")
    bias = {int(key): max(-100.0, min(100.0, value)) for key, value in (body.logit_bias or {}).items()}
    for name, ids in (("logit_bias", bias), ("allowed_token_ids", body.allowed_token_ids or ()),
                      ("stop_token_ids", body.stop_token_ids or ())):  # fmt: skip
        check_ids(ids, vocabulary, name)
    # Marks of tool calls may be special tokens; vLLM keeps them too where calls are read.
    keeps_special = body.skip_special_tokens is False or (isinstance(body, ChatRequest) and body.wants_calls)
    sampling = Sampling(
        max_tokens=room if wanted is None else wanted,
        logit_bias=bias,
        logprobs=body.alternatives,
        skip_special_tokens=not keeps_special,
        stop_ids=frozenset(ends),
        allowed_ids=None if body.allowed_token_ids is None else tuple(dict.fromkeys(body.allowed_token_ids)),
        banned=_banned(engine.encoder.tokenizer, body.bad_words or []),
        keep_stop=bool(body.include_stop_str_in_output),
        **{name: value for name, value in chosen.items() if value is not None},
    )
    if sampling.greedy and (body.n or 1) > 1:
        raise ApiError(400, "n must be 1 at temperature 0: the choices would be the same", param="n")
    return sampling


def constraints_of(
    engine: TransformersEngine, kind: str, value: Any, count: int, param: str
) -> list[Constraint]:  # fmt: skip
    """One constraint for each of the answers. Raises ApiError (400) where there is none of that kind."""
    try:
        return [engine.grammars(kind, value) for _ in range(count)]
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

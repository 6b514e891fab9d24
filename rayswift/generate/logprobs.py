"""Log probabilities in OpenAI's shape, and those of a prompt's own tokens."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from typing import Any

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"  # what decoding gives for the bytes of half a character
#: Tokens of a prompt that are scored in one pass: at 150,000 tokens of vocabulary that is 150 MB in bfloat16.
_PASS = 512


def logprob_entry(tokenizer: Any, likely: Iterable[tuple[int, float]]) -> dict[str, Any]:
    """OpenAI's entry of a token; ``likely`` has that token first, then the alternatives."""
    entries = []
    for token, logprob in likely:
        text = tokenizer.decode([token])
        entries.append({"token": text, "logprob": max(logprob, -9999.0), "bytes": list(token_bytes(tokenizer, token))})
    return {**entries[0], "top_logprobs": entries[1:]}


def token_bytes(tokenizer: Any, token: int) -> bytes:
    """The bytes of a token: those of its text, and of half a character its own, not those of U+FFFD."""
    text: str = tokenizer.decode([token])
    if REPLACEMENT not in text:
        return text.encode()
    piece: str = tokenizer.convert_ids_to_tokens(token) or ""
    if len(piece) == 6 and piece.startswith("<0x"):  # SentencePiece: a byte that has no piece of its own
        return bytes([int(piece[3:5], 16)])
    known = _byte_letters()
    return bytes(known[letter] for letter in piece) if all(letter in known for letter in piece) else text.encode()


def token_names(tokenizer: Any, tokens: Iterable[tuple[int, str]]) -> list[str]:
    """What OpenAI's completions call the tokens of one place, of which each comes with its text.

    That is the text, or ``bytes:\\xe4`` for bytes that are no characters by themselves. They are the keys of an object:
    of those with the same text the first keeps it, and the others are called ``token_id:N``, as vLLM calls tokens.
    """
    names: list[str] = []
    for token, text in tokens:
        name = text
        if not (text and text.isascii()):
            raw = token_bytes(tokenizer, token)
            try:
                own = raw.decode()
                name = text or own
            except UnicodeDecodeError:
                name = "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)
        names.append(f"token_id:{token}" if name in names else name)
    return names


@functools.cache
def _byte_letters() -> dict[str, int]:
    """The letters that byte-level tokenizers (GPT-2's and all after it) write bytes with."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    return {letter: byte for byte, letter in bytes_to_unicode().items()}


def prompt_logprobs(model: Any, prompt: Sequence[int], top: int) -> list[list[tuple[int, float, int]]]:
    """For each token of a prompt but the first: (token, log probability, rank) of itself, then of the likeliest."""
    import torch

    found: list[list[tuple[int, float, int]]] = []
    cache = None
    with torch.inference_mode():
        for start in range(0, len(prompt) - 1, _PASS):
            part = list(prompt[start : min(start + _PASS, len(prompt) - 1)])
            output = model(
                input_ids=torch.tensor([part], device=model.device), past_key_values=cache, use_cache=True
            )  # fmt: skip
            cache = output.past_key_values
            rows = output.logits[0].float().log_softmax(dim=-1)
            own = torch.tensor(prompt[start + 1 : start + 1 + len(part)], device=rows.device)[:, None]
            scores = rows.gather(1, own)
            ranks = (rows > scores).sum(dim=1) + 1
            likeliest = rows.topk(min(top, rows.shape[1]), dim=1)
            for index in range(len(part)):
                values, ids = likeliest.values[index].tolist(), likeliest.indices[index].tolist()
                likely = [(id_, value, rank) for rank, (id_, value) in enumerate(zip(ids, values, strict=True), 1)]
                found.append([(int(own[index]), float(scores[index]), int(ranks[index])), *likely])
    return found

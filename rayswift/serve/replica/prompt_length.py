"""A prompt that can never fit is refused by its characters: to tokenise megabytes takes many seconds, and all of them
for nothing. vLLM's renderer does so with texts; here for the prompts that RaySwift lays out."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from typing import Any


@functools.lru_cache(maxsize=16)
def _longest_token(tokenizer: Any) -> int:
    return max(map(len, tokenizer.get_vocab()), default=1)


def most_characters(tokenizer: Any, tokens: int) -> int:
    """Characters that a text of so many tokens has at most."""
    return tokens * _longest_token(tokenizer)


def check_characters(tokenizer: Any, tokens: int, characters: int) -> None:
    """Raises ValueError for a text that has more than ``tokens`` can have."""
    if characters > (most := most_characters(tokenizer, tokens)):
        raise ValueError(
            f"This model's maximum context length is {tokens} tokens; the prompt has {characters} characters, and no "
            f"{tokens} tokens have more than {most}"
        )


def characters_of(messages: Any) -> int:
    """Characters of the texts in messages; files do not count."""
    return sum(map(len, _texts(messages)))


def _texts(value: Any) -> Iterator[str]:
    for message in value if isinstance(value, list) else ():
        content = message.get("content") if isinstance(message, Mapping) else None
        for part in content if isinstance(content, list) else [content]:
            text = part.get("text") if isinstance(part, Mapping) else part
            if isinstance(text, str):
                yield text

"""Answers that a grammar allows: JSON of a schema, a regular expression, one of some texts, a tool's call.

llguidance keeps the state and says which tokens may come next. It was taken before xgrammar and outlines_core (all
three come with vLLM) because it is one wheel without dependencies, knows special tokens, and has limits: whatever the
schema or the expression, it is refused or ready in milliseconds.
"""

from __future__ import annotations

import functools
import json
from typing import Any, cast

MISSING = "this server's environment has no llguidance, which constrains answers: pip install llguidance"
#: llguidance's settings of a schema. What it does not know in one is left out, as xgrammar does, not refused. JSON
#: comes in one line, with or without spaces after its marks: where white space is free small models write it for ever.
SCHEMA_RULES = {"lenient": True, "whitespace_flexible": False, "item_separator": ",[ ]?", "key_separator": ":[ ]?"}


class Constraint:
    """What one answer must be; `allow` is asked for each of its tokens in turn."""

    def __init__(self, matcher: Any) -> None:
        self._matcher, self._taken = matcher, 0

    def allow(self, generated: list[int], scores: Any) -> Any:
        """``scores`` (shape (vocabulary,)) with those of the tokens that must not follow ``generated`` at −inf."""
        import numpy as np
        import torch

        self._matcher.consume_tokens(generated[self._taken :])
        self._taken = len(generated)
        if self._matcher.is_error():
            raise RuntimeError(f"the answer's grammar: {self._matcher.get_error()}")
        bits = np.unpackbits(np.frombuffer(self._matcher.compute_bitmask(), np.uint8), bitorder="little")
        allowed = torch.zeros(len(scores), dtype=torch.bool)
        known = min(len(bits), len(scores))
        allowed[:known] = torch.from_numpy(bits[:known]).bool()
        return scores.masked_fill(~allowed.to(scores.device), -torch.inf)


class GrammarCompiler:
    """Makes constraints for a tokenizer. ``vocabulary``: width of the scores; ``end_ids``: what ends an answer."""

    def __init__(self, tokenizer: Any, vocabulary: int, end_ids: list[int]) -> None:
        self._tokenizer, self._vocabulary, self._end_ids = tokenizer, max(vocabulary, len(tokenizer)), end_ids

    @functools.cached_property
    def _known(self) -> Any:
        from llguidance.hf import from_tokenizer

        return from_tokenizer(self._tokenizer, self._vocabulary, self._end_ids)

    def __call__(self, kind: Any, value: Any) -> Constraint:
        """A new answer's constraint: ``json`` (a schema or its text), ``regex``, ``choice`` (texts), ``grammar`` (GBNF
        or Lark) or ``lark``. Blocks for some milliseconds, the first time for a second.

        Raises:
            ValueError: the value is no such thing; says why.
        """
        try:
            from llguidance import LLMatcher, grammar_from
        except ImportError:
            raise ValueError(MISSING) from None
        if kind == "json":
            schema = json.loads(value) if isinstance(value, str) else value
            grammar = LLMatcher.grammar_from_json_schema(json.dumps(schema), overrides=cast("Any", SCHEMA_RULES))
        elif kind == "choice":
            grammar = LLMatcher.grammar_from_lark("start: " + " | ".join(map(quoted, value)))
        else:
            grammar = grammar_from(kind, value)
        failed, messages = LLMatcher.validate_grammar_with_warnings(grammar, self._known)
        if failed:
            raise ValueError(messages[0].strip().partition("\n")[0])
        return Constraint(LLMatcher(self._known, grammar, log_level=0))


def quoted(text: str) -> str:
    """A text as Lark writes it."""
    return json.dumps(text, ensure_ascii=False)

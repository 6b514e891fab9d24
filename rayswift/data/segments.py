"""Pieces of text to token ids: special tokens only where the template wrote them, many rows in one tokenizer call.

The model's own chat template is one text that is tokenised as a whole, so a `<|im_end|>` typed by a user ends the
turn. Here template text is split at the tokenizer's special tokens first; what stands between two of them is one run,
encoded with the parsing of special tokens switched off. For content without such strings the ids are the same.
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from rayswift.data.templates import Piece

if TYPE_CHECKING:
    from tokenizers import Tokenizer

#: Marks that belong to the content itself: replies hold them, and the model reads them as tokens. The model's own
#: tokenizers declare them as ordinary added tokens; a few fine-tuned ones declare them special.
CONTENT_TAG = re.compile(r"</?(think|thinking|reasoning|answer|tool|tools|tool_call|tool_calls|tool_response)>")


class Span(NamedTuple):
    """A token id (≥ 0) or a run (−1 − index into the runs), with its training weight."""

    ref: int
    weight: float


class SegmentTokenizer:
    """Wraps a Transformers tokenizer, which it leaves untouched; holds no state of its callers.

    Args:
        tokenizer: fast, or slow (then every call goes through its Python code).
        literals: the texts of the template; added tokens in them that are not marked special count as special.
        in_content: added tokens that are parsed in content too (`--new_special_tokens`).
    """

    def __init__(self, tokenizer: Any, literals: Iterable[str] = (), in_content: Iterable[str] = ()) -> None:
        self._tokenizer = tokenizer
        added = {str(token): (number, token) for number, token in tokenizer.added_tokens_decoder.items()}
        written = "\n".join(literals)
        content_marks = {text for text in added if CONTENT_TAG.fullmatch(text)} | set(in_content)
        special = {text for text, (_, token) in added.items() if token.special or text in written} - content_marks
        self._ids = {text: added[text][0] for text in special}
        self.strip_after = {added[text][0] for text in special if added[text][1].rstrip}
        self.strip_before = {added[text][0] for text in special if added[text][1].lstrip}
        longest_first = sorted(special, key=len, reverse=True)
        self._splitter = re.compile("|".join(map(re.escape, longest_first))) if special else None
        self._split_cache: dict[str, tuple[int | str, ...]] = {}
        #: Where the tokenizer puts a space before a text: `always` (at the start and after each special token),
        #: `first` (at the start only), "" (nowhere). `inner` is a copy that does not.
        self.prefixing = ""
        self.outer = self.inner = None
        if getattr(tokenizer, "is_fast", False):
            self.outer = _private_copy(tokenizer.backend_tokenizer, special)
            self.prefixing, self.inner = _without_prefix(self.outer)

    def batch(self) -> Batch:
        """Start a batch of rows."""
        return Batch(self)

    def split_literal(self, text: str) -> tuple[int | str, ...]:
        """Template text as token ids of its special tokens and the texts between them."""
        parts = self._split_cache.get(text)
        if parts is None:
            parts = self._split_cache[text] = tuple(self._split(text))
        return parts

    def _split(self, text: str) -> Iterable[int | str]:
        position = 0
        for found in self._splitter.finditer(text) if self._splitter else ():
            if found.start() > position:
                yield text[position : found.start()]
            yield self._ids[found.group()]
            position = found.end()
        if position < len(text):
            yield text[position:]

    def encode(self, texts: list[str], backend: Tokenizer | None) -> list[list[int]]:
        """Ids of plain texts by `outer` or `inner` (None: a slow tokenizer)."""
        if backend is None:
            encoded = self._tokenizer(texts, add_special_tokens=False, split_special_tokens=True)
            return [list(ids) for ids in encoded["input_ids"]]
        return [encoding.ids for encoding in backend.encode_batch_fast(texts, add_special_tokens=False)]


class Batch:
    """Rows laid out one by one (:meth:`plan`), then encoded together (:meth:`encode_runs`)."""

    def __init__(self, segments: SegmentTokenizer) -> None:
        self._segments = segments
        self._runs: dict[str, int] = {}
        self._inner_runs: dict[str, int] = {}
        self._count = 0

    def plan(self, pieces: Sequence[Piece]) -> list[Span]:
        """Lay out one row as token ids and runs."""
        split_literal = self._segments.split_literal
        spans: list[Span] = []
        run: list[str] = []
        run_weight = 0.0
        cut = True  # whether the next run starts at the start of the row or after a special token
        for text, literal, weight, hard in pieces:
            if run and (hard or weight != run_weight):
                self._close(run, run_weight, spans, cut)
                run, cut = [], False
            run_weight = weight
            if not literal:
                if text:
                    run.append(text)
                continue
            for part in split_literal(text):
                if isinstance(part, str):
                    run.append(part)
                    continue
                if run:
                    self._close(run, weight, spans, cut, before=part)
                    run = []
                cut = True
                spans.append(Span(part, weight))
        if run:
            self._close(run, run_weight, spans, cut)
        return spans

    def _close(self, run: list[str], weight: float, spans: list[Span], cut: bool, before: int = -1) -> None:
        text = "".join(run)
        segments = self._segments
        if segments.strip_after and cut and spans and spans[-1].ref in segments.strip_after:
            text = text.lstrip()
        if before in segments.strip_before:
            text = text.rstrip()
        if not text:
            return
        # A run that does not start where the tokenizer would put its leading space is encoded without that.
        inner = segments.prefixing and (not cut or (segments.prefixing == "first" and bool(spans)))
        runs = self._inner_runs if inner else self._runs
        index = runs.get(text)
        if index is None:
            index = runs[text] = self._count
            self._count += 1
        spans.append(Span(-1 - index, weight))

    def encode_runs(self) -> list[list[int]]:
        """Ids of all runs, by run index: one call of the tokenizer for the distinct texts of the batch."""
        ids: list[list[int]] = [[]] * self._count
        segments = self._segments
        for runs, backend in ((self._runs, segments.outer), (self._inner_runs, segments.inner)):
            if runs:
                for index, encoded in zip(runs.values(), segments.encode(list(runs), backend), strict=True):
                    ids[index] = encoded
        return ids


def _private_copy(backend: Tokenizer, special: set[str]) -> Tokenizer:
    """A copy that reads exactly the tokens in `special` as plain text."""
    from tokenizers import Tokenizer

    marked = backend.get_added_tokens_decoder().values()
    if special == {token.content for token in marked if token.special}:
        private = copy.deepcopy(backend)
    else:
        spec = json.loads(backend.to_str())
        for token in spec["added_tokens"]:
            token["special"] = token["content"] in special
        private = Tokenizer.from_str(json.dumps(spec))
    private.no_truncation()
    private.no_padding()
    private.encode_special_tokens = True
    return private


def _without_prefix(backend: Tokenizer) -> tuple[str, Tokenizer | None]:
    """Where the tokenizer puts a space before a text, and, if anywhere, a copy that does not."""
    from tokenizers import Tokenizer

    spec = {
        "normalizer": json.loads(backend.normalizer.__getstate__()) if backend.normalizer else {},
        "pre_tokenizer": json.loads(backend.pre_tokenizer.__getstate__()) if backend.pre_tokenizer else {},
    }
    found: list[str] = []
    parts = spec["normalizer"].get("normalizers", [spec["normalizer"]])
    if any(part.get("type") == "Prepend" for part in parts):
        found.append("always")
        kept = [part for part in parts if part.get("type") != "Prepend"]
        spec["normalizer"] = {"type": "Sequence", "normalizers": kept}
    for part in spec["pre_tokenizer"].get("pretokenizers", [spec["pre_tokenizer"]]):
        if part.get("type") == "Metaspace" and part.get("prepend_scheme", "always") != "never":
            found.append(part.get("prepend_scheme", "always"))
            part["prepend_scheme"] = "never"
        elif part.get("type") == "ByteLevel" and part.get("add_prefix_space"):
            found.append("always")
            part["add_prefix_space"] = False
    if not found:
        return "", None
    changed = {key: part or None for key, part in spec.items()}
    inner = Tokenizer.from_str(json.dumps({**json.loads(backend.to_str()), **changed}))
    inner.encode_special_tokens = True
    return found[0], inner

"""Spans of text to token ids: special tokens only where the template wrote them, many rows in one tokenizer call.

The model's own chat template is one text that is tokenised as a whole, so a `<|im_end|>` typed by a user ends the
turn. Here template text is split at the tokenizer's special tokens first; what stands between two of them is one
segment, encoded with the parsing of special tokens switched off. For content without such strings the ids are the same.
"""

from __future__ import annotations

import copy
import functools
import itertools
import json
import logging
import os
import re
import sys
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from rayswift.data.chat.families import TextSpan

if TYPE_CHECKING:
    from tokenizers import Tokenizer

logger = logging.getLogger("rayswift.data.tokens.segments")

#: Marks that belong to the content itself: replies hold them, and the model reads them as tokens. The model's own
#: tokenizers declare them as ordinary added tokens; a few fine-tuned ones declare them special.
CONTENT_TAG = re.compile(r"</?(think|thinking|reasoning|answer|tool|tools|tool_call|tool_calls|tool_response)>")


#: `RAYSWIFT_FAST_TOKENIZER=0` keeps to `tokenizers`.
FAST_TOKENIZER = "RAYSWIFT_FAST_TOKENIZER"

#: Texts to (token ids of all of them in a row, int32; number of tokens of each, int64).
Backend = Callable[[list[str]], "tuple[np.ndarray, np.ndarray]"]


class TemplateIds(NamedTuple):
    """Template text: the text before its first special token, the ids from there to its last one (none if it has no
    special token), and the text after that. `opens` and `closes` are these two tokens."""

    lead: str
    ids: tuple[int, ...]
    opens: int
    closes: int
    trail: str


class SegmentTokenizer:
    """Wraps a Transformers tokenizer, which it leaves untouched; holds no state of its callers.

    Args:
        tokenizer: fast, or slow (then every call goes through its Python code).
        literals: the texts of the template; added tokens in them that are not marked special count as special.
        in_content: added tokens that are parsed in content too (`--new_special_tokens`).
    """

    def __init__(self, tokenizer: Any, literals: Iterable[str] = (), in_content: Iterable[str] = ()) -> None:
        added = {str(token): (number, token) for number, token in tokenizer.added_tokens_decoder.items()}
        written = "\n".join(literals)
        content_marks = {text for text in added if CONTENT_TAG.fullmatch(text)} | set(in_content)
        special = {text for text, (_, token) in added.items() if token.special or text in written} - content_marks
        self._ids = {text: added[text][0] for text in special}
        self.strip_after = {added[text][0] for text in special if added[text][1].rstrip}
        self.strip_before = {added[text][0] for text in special if added[text][1].lstrip}
        longest_first = sorted(special, key=len, reverse=True)
        self._splitter = re.compile("|".join(map(re.escape, longest_first))) if special else None
        #: Where the tokenizer puts a space before a text: `always` (at the start and after each special token),
        #: `first` (at the start only), "" (nowhere). `inner` is the backend that does not.
        self.prefixing = ""
        self.outer: Backend
        self.inner: Backend
        if getattr(tokenizer, "is_fast", False):
            outer = _private_copy(tokenizer.backend_tokenizer, special)
            self.prefixing, inner = _without_prefix(outer)
            self.outer = _Adaptive(outer, list(added))
            self.inner = _Adaptive(inner, list(added)) if inner is not None else self.outer
        else:
            self.outer = self.inner = lambda texts: _ids_of(
                tokenizer(texts, add_special_tokens=False, split_special_tokens=True)["input_ids"]
            )
        #: Whether a segment is the same tokens wherever it stands.
        self.plain = not (self.prefixing or self.strip_after or self.strip_before)
        # Bounded: a chat template that rewrites its messages makes template text out of rows.
        self.template_ids = functools.lru_cache(maxsize=1024)(self._encode_template)

    def batch(self) -> Batch:
        """Start a batch of rows."""
        return Batch(self)

    def split_literal(self, text: str) -> list[int | str]:
        """Template text as token ids of its special tokens and the texts between them."""
        parts: list[int | str] = []
        position = 0
        for found in self._splitter.finditer(text) if self._splitter else ():
            if found.start() > position:
                parts.append(text[position : found.start()])
            parts.append(self._ids[found.group()])
            position = found.end()
        if position < len(text):
            parts.append(text[position:])
        return parts

    def _encode_template(self, text: str) -> TemplateIds:
        """Template text with what never changes in it encoded."""
        parts = self.split_literal(text)
        specials = [number for number, part in enumerate(parts) if not isinstance(part, str)]
        if not specials:
            return TemplateIds(text, (), -1, -1, "")
        first, last = specials[0], specials[-1]
        ids: list[int] = []
        for number in range(first, last + 1):
            part = parts[number]
            if not isinstance(part, str):
                ids.append(part)
                continue
            part = part.lstrip() if parts[number - 1] in self.strip_after else part
            part = part.rstrip() if parts[number + 1] in self.strip_before else part
            backend = self.inner if self.prefixing == "first" else self.outer
            ids += backend([part])[0].tolist() if part else []
        lead, trail = "".join(map(str, parts[:first])), "".join(map(str, parts[last + 1 :]))
        return TemplateIds(lead, tuple(ids), ids[0], ids[-1], trail)


class Batch:
    """Rows laid out one by one (:meth:`plan`), then encoded together (:meth:`assemble`).

    A row is a list of refs with weights: of a *segment* (text without special tokens; equal ones of a batch are encoded
    once) its number, of ids of the template a negative number.
    """

    def __init__(self, tokenizer: SegmentTokenizer) -> None:
        self._tokenizer = tokenizer
        #: Template text → text before its ids, their ref or 0, the first and the last of them, text after.
        self._templates: dict[str, tuple[str, int, int, int, str]] = {}
        self._template_ids: list[np.ndarray] = []
        self._segments: dict[str, int] = {}
        self._inner_segments: dict[str, int] = {}
        self._refs: list[int] = []
        self._weights: list[float] = []
        self._row_ends: list[int] = []

    def plan(self, spans: Iterable[TextSpan]) -> None:
        """Lay out one row."""
        templates, refs, weights = self._templates, self._refs, self._weights
        row_start = len(refs)
        segment, segment_weight = "", 0.0
        after = -1  # the special token that the segment stands behind
        cut = True  # whether the segment starts at the start of the row or after a special token
        for text, literal, weight, hard in spans:
            if segment and (hard or weight != segment_weight):
                self._close(segment, segment_weight, row_start, cut, after, -1)
                segment, cut, after = "", False, -1
            segment_weight = weight
            if not literal:
                segment += text
                continue
            known = templates.get(text)
            if known is None:
                lead, ids, opens, closes, trail = self._tokenizer.template_ids(text)
                if ids:
                    self._template_ids.append(np.array(ids, dtype=np.int32))
                templates[text] = known = (lead, -len(self._template_ids) if ids else 0, opens, closes, trail)
            lead, ref, opens, closes, trail = known
            segment += lead
            if ref:
                if segment:
                    self._close(segment, weight, row_start, cut, after, opens)
                refs.append(ref)
                weights.append(weight)
                segment, cut, after = trail, True, closes
        if segment:
            self._close(segment, segment_weight, row_start, cut, after, -1)
        self._row_ends.append(len(refs))

    def _close(self, text: str, weight: float, row_start: int, cut: bool, after: int, before: int) -> None:
        tokenizer, segments = self._tokenizer, self._segments
        if not tokenizer.plain:
            text = text.lstrip() if after in tokenizer.strip_after else text
            text = text.rstrip() if before in tokenizer.strip_before else text
            if not text:
                return
            # A segment that does not start where the tokenizer would put its leading space is encoded without that.
            at_start = row_start == len(self._refs)
            if tokenizer.prefixing and (not cut or (tokenizer.prefixing == "first" and not at_start)):
                segments = self._inner_segments
        ref = segments.get(text)
        if ref is None:
            ref = segments[text] = len(self._segments) + len(self._inner_segments)
        self._refs.append(ref)
        self._weights.append(weight)

    def assemble(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Encode the segments, each distinct text once, and put the rows together.

        Returns:
            ids: int32, shape (tokens,), the rows one after the other. weights: float32, shape (tokens,).
            offsets: int64, shape (rows + 1,): row i is `ids[offsets[i] : offsets[i + 1]]`.
        """
        pool, starts, sizes = self._encode_segments()
        # Ids of the template come first in the pool, in the order of falling refs; −1 − ref is their place.
        refs = np.array(self._refs, dtype=np.int64)
        index = np.where(refs < 0, -1 - refs, refs + len(self._template_ids))
        ref_sizes = sizes[index]
        ref_ends = np.cumsum(ref_sizes)
        token = np.arange(ref_ends[-1] if len(ref_ends) else 0)
        ids = pool[token + np.repeat(starts[index] - (ref_ends - ref_sizes), ref_sizes)]
        weights = np.repeat(np.array(self._weights, dtype=np.float32), ref_sizes)
        offsets = np.concatenate([[0], ref_ends])[[0, *self._row_ends]]
        return ids, weights, offsets

    def _encode_segments(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """All ids that refs stand for: (pool, start of each in the pool, size of each), the template's first."""
        pools = list(self._template_ids)
        sizes = [np.array([len(ids) for ids in pools], dtype=np.int64)]
        order = [np.arange(len(pools))]
        for segments, encode in (
            (self._segments, self._tokenizer.outer),
            (self._inner_segments, self._tokenizer.inner),
        ):
            if segments:
                ids, lengths = encode(list(segments))
                pools.append(ids)
                sizes.append(lengths)
                order.append(np.fromiter(segments.values(), np.int64, len(segments)) + len(self._template_ids))
        in_pool = np.concatenate(sizes)
        by_ref = np.argsort(np.concatenate(order))  # segments of the two backends are numbered together
        starts = np.cumsum(in_pool) - in_pool
        return np.concatenate([*pools, np.zeros(0, np.int32)]), starts[by_ref], in_pool[by_ref]


# --- backends ---------------------------------------------------------------------------------------------------


def _ids_of(lists: list[list[int]]) -> tuple[np.ndarray, np.ndarray]:
    lengths = np.fromiter(map(len, lists), np.int64, len(lists))
    return np.fromiter(itertools.chain.from_iterable(lists), np.int32, int(lengths.sum())), lengths


def _plain_ids(backend: Tokenizer, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
    return _ids_of([encoding.ids for encoding in backend.encode_batch_fast(texts, add_special_tokens=False)])


def _fast_ids(backend: Any, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
    ids, offsets = backend.encode_batch_flat(texts, add_special_tokens=False, split_special_tokens=True)
    return np.frombuffer(ids, np.int32), np.diff(np.frombuffer(offsets, np.int64))


class _Adaptive:
    """Encodes with `tokenizers`, and with `fastokens` once there is text enough to pay for loading that."""

    #: Loading takes as long as `tokenizers` takes for so many characters per vocabulary entry (measured, Qwen2.5).
    CHARACTERS_PER_ENTRY = 10

    def __init__(self, backend: Tokenizer, added: list[str]) -> None:
        self._backend, self._added = backend, added
        self._encode: Backend = functools.partial(_plain_ids, backend)
        self._plain_left = max(self.CHARACTERS_PER_ENTRY * backend.get_vocab_size(), 1)
        if os.environ.get(FAST_TOKENIZER) == "0":
            self._plain_left = sys.maxsize

    def __call__(self, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
        if self._plain_left > 0:
            self._plain_left -= sum(map(len, texts))
            if self._plain_left <= 0:
                self._encode = _fast_backend(self._backend, self._added) or self._encode
        try:
            return self._encode(texts)
        except (TypeError, UnicodeEncodeError):  # half a surrogate pair, as broken JSON escapes leave it, is no text
            return self._encode([text.encode("utf-16", "surrogatepass").decode("utf-16", "replace") for text in texts])


def _fast_backend(backend: Tokenizer, added: list[str]) -> Backend | None:
    """`fastokens` with this tokenizer, if it gives the ids of `tokenizers` on a varied sample (some milliseconds)."""
    try:
        import fastokens

        fast = functools.partial(_fast_ids, fastokens.Tokenizer.from_json_str(backend.to_str()))
        # Texts that tell two tokenizers apart: every kind of writing, and this tokenizer's own tokens.
        size = backend.get_vocab_size()
        own = [backend.decode([number, number + 1, number + 2], skip_special_tokens=False) for number in
               range(0, max(size - 3, 0), max(size // 300, 1))]  # fmt: skip
        around = [f"a{token}b {token} c" for token in added[:100]]
        texts = [text for text in (*_SAMPLE, *own, *around, " ".join(own), " ".join(added[:100])) if text]
        if all(np.array_equal(one, other) for one, other in zip(_plain_ids(backend, texts), fast(texts), strict=True)):
            return fast
        logger.debug("fastokens differs from tokenizers in the self-test: staying with tokenizers")
    except Exception as error:  # whatever it cannot load or encode, `tokenizers` can
        logger.debug("fastokens cannot take this tokenizer (%s): staying with tokenizers", error)
    return None


_SAMPLE = (
    "The quick brown fox can't jump over 13 lazy dogs; it's 3.14159 o'clock, isn't it? WE'LL SEE, I'd say -- \"yes\"!",
    "你好，世界。今天是2024年7月26日，气温２６℃。「引用」《书名》、顿号；以及：冒号！",
    "日本語のテキスト、カタカナ。한국어 텍스트입니다. Русский текст, Ελληνικά, العربية, עברית, हिन्दी, ไทย.",
    "def f(x: int) -> str:\n\tif x >= 10:\n        return f'{x!r}'  # comment\n\n\n    else:\r\n\t\tpass\n",
    "🙂 👨‍👩‍👧 🇩🇪 👍🏽 e\u0301 é ﬁ ½ \u200d \u200b\ufeff \xa0 \u3000 \u2028 \x00 \x07 \x1b[0m",
    " leading", "trailing ", "   three", "a  b   c    d", "\n", "\n\n\n", " \n \n", "\t\t", "\r\n\r\n", " ", "     ",
    "0 00 000 0000 12345678901234567890 1,234,567.89 0x1F 1e-9", "ÀÉÎÕÜ àéîõü ß ſ İ ı Ǆ", 
    "https://example.org/a?b=c&d=%20#e",
    "<|im_start|>user\n<|im_end|><|endoftext|><s></s>[INST] [/INST]",
    "<think>\n\n</think><tool_call>{\"name\": \"f\"}</tool_call>",
)  # fmt: skip


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

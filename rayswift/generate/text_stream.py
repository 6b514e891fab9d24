"""Token ids to text while they come: nothing half-decoded is shown, and nothing that may turn out a stop word."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from rayswift.generate.logprobs import REPLACEMENT


class TextStream:
    """Decodes tokens one by one into pieces of text that add up to the answer.

    A token is decoded together with a few before it, because a tokenizer may join pieces or open a word with a space.
    ``stopped_by`` is the stop word that has come; the text ends before it, or with it (``keep_stop``).
    """

    def __init__(
        self, decode: Callable[[Sequence[int]], str], stop_words: Sequence[str] = (), *, keep_stop: bool = False
    ) -> None:
        self.decode, self.stop_words, self.keep_stop = decode, stop_words, keep_stop
        self.emitted = ""
        self.stopped_by: str | None = None
        self._ids: list[int] = []
        self._start = self._read = 0  # ids before _read are decoded; those from _start on are decoded again
        self._held = ""

    def add(self, token: int) -> str:
        """Take one token; returns the text that is now certain."""
        self._ids.append(token)
        return self._emit(self._decoded(final=False), final=False)

    def end(self) -> str:
        """No more tokens: returns what was held back."""
        if self.finished:
            return ""
        return self._emit(self._decoded(final=True), final=True)

    @property
    def finished(self) -> bool:
        """Whether a stop word has come."""
        return self.stopped_by is not None

    def _decoded(self, *, final: bool) -> str:
        before, now = self.decode(self._ids[self._start : self._read]), self.decode(self._ids[self._start :])
        if len(now) <= len(before) or (now.endswith(REPLACEMENT) and not final):
            return ""
        self._start, self._read = self._read, len(self._ids)
        return now[len(before) :]

    def _emit(self, text: str, *, final: bool) -> str:
        self._held += text
        start, word = first_stop_word(self._held, self.stop_words)
        if word is not None:
            self.stopped_by, keep = word, 0
            self._held = self._held[: start + (len(word) if self.keep_stop else 0)]
        else:
            keep = 0 if final else longest_start_at_end(self._held, self.stop_words)
        split = len(self._held) - keep
        piece, self._held = self._held[:split], self._held[split:]
        self.emitted += piece
        return piece


def cut_at_stop_word(text: str, stop_words: Sequence[str]) -> str:
    """``text`` up to the first stop word in it."""
    return text[: first_stop_word(text, stop_words)[0]]


def first_stop_word(text: str, stop_words: Sequence[str]) -> tuple[int, str | None]:
    """Where in ``text`` the first stop word begins, and which it is; its end and None if there is none in it."""
    return min(((text.index(word), word) for word in stop_words if word in text), default=(len(text), None))


def longest_start_at_end(text: str, stop_words: Sequence[str]) -> int:
    """Length of the longest end of ``text`` that a stop word starts with."""
    longest = 0
    for word in stop_words:
        for length in range(min(len(word) - 1, len(text)), longest, -1):
            if text.endswith(word[:length]):
                longest = length
                break
    return longest

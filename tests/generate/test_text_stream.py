"""Streaming shows whole characters only, and never the start of a stop word."""

from __future__ import annotations

from collections.abc import Sequence

from rayswift.generate.text_stream import TextStream, cut_at_stop_word, longest_start_at_end


def decode_bytes(ids: Sequence[int]) -> str:
    """One token per byte: every Chinese character is three tokens."""
    return bytes(ids).decode("utf-8", errors="replace")


def pieces_of(text: str, stop_words: Sequence[str] = ()) -> tuple[list[str], TextStream]:
    stream = TextStream(decode_bytes, stop_words)
    pieces = []
    for byte in text.encode():
        pieces.append(stream.add(byte))
        if stream.finished:
            break
    return [*pieces, stream.end()], stream


def test_characters_of_several_tokens_come_whole() -> None:
    pieces, stream = pieces_of("我是 swift 🤖.")
    assert "".join(pieces) == stream.emitted == "我是 swift 🤖."
    assert "\N{REPLACEMENT CHARACTER}" not in "".join(pieces)
    assert pieces[:3] == ["", "", "我"]


def test_text_ends_before_a_stop_word_and_no_part_of_it_is_shown() -> None:
    pieces, stream = pieces_of("Paris.\nObservation: none", ["\nObservation:"])
    assert "".join(pieces) == "Paris."
    assert stream.finished


def test_what_only_looks_like_a_stop_word_is_shown_in_the_end() -> None:
    pieces, stream = pieces_of("a <|im_x <|im", ["<|im_end|>"])
    assert "".join(pieces) == "a <|im_x <|im"
    assert not stream.finished


def test_a_broken_character_at_the_end_is_shown_as_such() -> None:
    stream = TextStream(decode_bytes)
    shown = [stream.add(byte) for byte in "é".encode()[:1]]
    assert shown == [""]
    assert stream.end() == "\N{REPLACEMENT CHARACTER}"


def test_cut_at_the_first_of_several_stop_words() -> None:
    assert cut_at_stop_word("one two three", ["three", "two"]) == "one "
    assert cut_at_stop_word("one", []) == "one"
    assert longest_start_at_end("abcab", ["abd", "cabx"]) == 3
    assert longest_start_at_end("xyz", ["abc"]) == 0

"""``rayswift data``: commands about datasets; a second word names one."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from typing import TYPE_CHECKING, cast

from rayswift.errors import UserError

if TYPE_CHECKING:
    from rayswift.arguments.commands import PreviewArguments

_WORDS = {"preview": "rows before and after each stage, token lengths, and what is dropped and why"}


def data(argv: Sequence[str]) -> int:
    """Run ``rayswift data WORD ...``; without a word, list them. Returns the exit status."""
    if not argv or argv[0] in ("-h", "--help", "help"):
        words = "".join(f"  {word:<8} {text}\n" for word, text in _WORDS.items())
        print(
            f"usage: rayswift data WORD [--flag value ...]\n\n{words}\n"
            "rayswift data WORD --help lists its flags.\n"
            "Example: rayswift data preview --dataset train.jsonl --model Qwen/Qwen2.5-0.5B-Instruct"
        )
        return 0
    word, rest = argv[0].lower(), list(argv[1:])
    if word not in _WORDS:
        close = difflib.get_close_matches(word, _WORDS, n=1, cutoff=0.5)
        hint = f"did you mean {close[0]}?" if close else f"choose from {', '.join(_WORDS)}"
        raise UserError(f"unknown word {argv[0]}; {hint}")
    from rayswift.arguments import format_help, parse_arguments

    if {"-h", "--help"} & set(rest):
        print(format_help("data preview"), end="")
        return 0
    args = parse_arguments("data preview", rest)
    from rayswift.data.preview.command import preview

    preview(cast("PreviewArguments", args))
    return 0

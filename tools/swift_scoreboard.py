"""How many of SWIFT's command lines RaySwift takes: what parses, what is said to have no effect, what is refused.

    python tools/swift_scoreboard.py COMMAND_LINES.txt [--lines]

The file has one command line a row (``swift sft --model ...``); it stays outside this project. Files that a line names
and that are not here (plugins, prompts) are made, empty, in a temporary folder that the lines are parsed in.
Exceptions are counted apart: ``megatron`` lines, lines whose only refusal is a flag for pictures or sound, and lines
that need a configuration file, or a value that the author has left out.
"""

from __future__ import annotations

import argparse
import collections
import logging
import os
import re
import shlex
import tempfile
from pathlib import Path

from rayswift.arguments import parse_arguments
from rayswift.cli.main import find_command
from rayswift.errors import UserError

MULTIMODAL = ("freeze_vit", "freeze_aligner", "freeze_llm", "vit_lr", "aligner_lr", "max_pixels", "norm_bbox")


class _Kept(logging.Handler):
    """What a command line would say before anything starts."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        """Keep the line."""
        self.lines.append(record.getMessage())


def make_files(words: list[str]) -> None:
    """Empty files for the plugins and prompts that a line names."""
    for word in words:
        if re.fullmatch(r"[\w./-]+\.(py|txt)", word) and not os.path.isabs(word):
            Path(word).parent.mkdir(parents=True, exist_ok=True)
            Path(word).touch()


def exception(line: str, problems: list[str]) -> str:
    """Why a refused line does not count; empty where it does."""
    if line.startswith("megatron"):
        return "megatron"
    if any("cannot read this configuration file" in problem for problem in problems):
        return "needs a configuration file"
    if re.search(r"<\w+>", line):
        return "a value is left out"
    flags = {match for problem in problems for match in re.findall(r"^--(\w+)", problem)}
    return "pictures or sound" if flags and flags <= set(MULTIMODAL) else ""


def reason(problem: str) -> str:
    """A problem without the values of one line."""
    return re.sub(r"(, for example|; choose from|; did you mean).*", "", problem)


def main() -> None:
    """Parse every line and print the counts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    parser.add_argument("--lines", action="store_true", help="print each refused line's number and problems")
    options = parser.parse_args()
    lines = [line for line in options.file.read_text(encoding="utf-8").splitlines() if line.strip()]
    kept = _Kept()
    logger = logging.getLogger("rayswift")
    logger.addHandler(kept)
    logger.propagate = False
    parsed, noted = 0, 0
    refused: collections.Counter[str] = collections.Counter()
    said: collections.Counter[str] = collections.Counter()
    excepted: collections.Counter[str] = collections.Counter()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        for number, line in enumerate(lines, 1):
            words = shlex.split(line)
            make_files(words)
            kept.lines.clear()
            try:
                command, rest = find_command(words[1:] if words[0] == "swift" else words)
                parse_arguments(command, rest)
            except UserError as error:
                problems = str(error).split("\n")
                if why := exception(line, problems):
                    excepted[why] += 1
                else:
                    refused.update(map(reason, problems))
                if options.lines:
                    print(f"{number}: {f'({why}) ' if why else ''}{' | '.join(problems)}")
                continue
            parsed += 1
            told = [text.partition(" no effect here")[0] for text in kept.lines if " no effect here" in text]
            notes = [flag for text in told for flag in re.findall(r"--\w+", text)]
            said.update(notes)
            noted += bool(notes)
    counted = len(lines) - sum(excepted.values())
    print(f"command lines: {len(lines)}; excepted: {sum(excepted.values())} ({dict(excepted)})")
    print(f"parsed: {parsed} of {counted} ({parsed / max(counted, 1):.1%}), {noted} of them with a 'no effect' line")
    for title, counts in (("no effect", said), ("refused", refused)):
        print(f"\n{title}:")
        for text, count in counts.most_common():
            print(f"{count:5}  {text}")


if __name__ == "__main__":
    main()

"""A synthetic ``.jsonl.gz`` of any size out of real sentences, written by all cores as a gzip of many members."""

from __future__ import annotations

import gzip
import json
import multiprocessing
import random
import re
import sys
import zlib
from pathlib import Path

from harness.environments import CACHE, REPOSITORY
from harness.measure import cores

_TEXTS = REPOSITORY / "tests" / "data" / "pretrain_en.jsonl.gz"
#: Uncompressed bytes of one gzip member, about.
_MEMBER_BYTES = 16_000_000


def make_corpus(gigabytes: float) -> Path:
    """A file of about this many 10⁹ bytes of text before compression, made once below ``.cache/benchmarks``.

    Rows are ``{"query": …, "response": …}``: sentences of the repository's sample of C4, drawn at random, 1 to 2 of
    them as query and 3 to 12 as response. The same number of gigabytes gives the same file.
    """
    target = CACHE / f"stream-{gigabytes:g}g.jsonl.gz"
    if target.is_file():
        return target
    print(f"writing {target}", file=sys.stderr)
    target.parent.mkdir(parents=True, exist_ok=True)
    unfinished = target.with_suffix(".part")
    members = max(1, round(gigabytes * 1e9 / _MEMBER_BYTES))
    with multiprocessing.Pool(cores(), _load_sentences) as pool, unfinished.open("wb") as file:
        for member in pool.imap(_member, range(members)):
            file.write(member)
    unfinished.rename(target)
    return target


_sentences: list[str] = []


def _load_sentences() -> None:
    """In each writing process: the sentences as they stand inside a JSON string."""
    with gzip.open(_TEXTS, "rt", encoding="utf-8") as file:
        texts = [json.loads(line)["text"] for line in file]
    sentences = [part for text in texts for part in re.split(r"(?<=[.!?])\s+", text) if part]
    _sentences.extend(json.dumps(sentence, ensure_ascii=False)[1:-1] for sentence in sentences)


def _member(number: int) -> bytes:
    """One gzip member: whole rows, a function of its number alone."""
    draw = random.Random(number)
    lines: list[str] = []
    size = 0
    while size < _MEMBER_BYTES:
        query = " ".join(draw.choices(_sentences, k=draw.randint(1, 2)))
        response = " ".join(draw.choices(_sentences, k=draw.randint(3, 12)))
        lines.append(f'{{"query": "{query}", "response": "{response}"}}\n')
        size += len(lines[-1])
    packer = zlib.compressobj(1, zlib.DEFLATED, wbits=31)
    return packer.compress("".join(lines).encode()) + packer.flush()

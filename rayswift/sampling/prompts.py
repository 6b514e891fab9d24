"""The prompts of ``rayswift sample``: standard rows, each with its id, its reference and what is there already."""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
import os
import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from rayswift.data.files import Position, iter_raw_rows, locate, split_format
from rayswift.data.names import resolve_dataset_files
from rayswift.errors import UserError
from rayswift.generate.types import split_reference
from rayswift.inference.rows import BAD_ROW, media_check, placed_rows
from rayswift.modeling.resolved import ResolvedModel

if TYPE_CHECKING:
    from rayswift.arguments import SampleArguments

logger = logging.getLogger("rayswift.sampling")

Row = dict[str, Any]


@dataclass(frozen=True)
class Prompt:
    """A row to be answered.

    ``row``: the standard row; ``messages`` end with what is to be answered. ``reference``: the dataset's own answer.
    ``id``: SWIFT's, the MD5 of the row (with its reference) as JSON; equal rows get ``-2``, ``-3``, … behind it.
    ``cached``: answers of ``--cache_files``. ``place``: file and position.
    """

    id: str
    row: Row
    reference: str | None
    place: tuple[str, Position]
    cached: tuple[str, ...] = ()

    @property
    def where(self) -> str:
        """``file:line``."""
        return locate(*self.place)

    def answered(self, text: str) -> Row:
        """The row with an answer to it."""
        return {**self.row, "messages": [*self.row["messages"], {"role": "assistant", "content": text}]}

    def seed(self, seed: int, number: int) -> int:
        """The seed of an answer: its own, the same whatever else is in the dataset and on every restart."""
        return int.from_bytes(hashlib.sha256(f"{seed}:{self.id}:{number}".encode()).digest()[:4], "big") >> 1


def read_prompts(args: SampleArguments, model: ResolvedModel | None = None) -> list[Prompt]:
    """The prompts of ``--dataset``, or without one those of ``--cache_files``, as ``--data_range`` and
    ``--num_sampling_batches`` choose them. ``model``: what answers; None is an endpoint, or nobody.

    Raises:
        UserError: no prompts, a file that cannot be read, a cache that is none.
    """
    cache = read_cache(args.cache_files)
    if args.dataset:
        known = {text: tuple(answers) for text, (_, answers) in cache.items()}
        rows = numbered(dataset_prompts(args, model))
        prompts = [replace(prompt, cached=known.get(prompt.id, ())) for prompt in rows]
        if cache and not any(prompt.cached for prompt in prompts):
            raise UserError("--cache_files: no answer in there belongs to a row of --dataset; give the --dataset and "
                            "--system that they were sampled with")  # fmt: skip
    else:
        prompts = [replace(prompt, cached=tuple(answers)) for prompt, answers in cache.values()]
    prompts = chosen(args, prompts)
    if args.sampler_engine == "no":
        without = sum(not prompt.cached for prompt in prompts)
        if without:
            logger.warning("%d of %d prompts have no answer in --cache_files: left out", without, len(prompts))
        prompts = [prompt for prompt in prompts if prompt.cached]
    if not prompts:
        raise UserError(f"--dataset {' '.join(args.dataset)}: no prompts in it (after --data_range)")
    return prompts


def dataset_prompts(args: SampleArguments, model: ResolvedModel | None) -> Iterator[Prompt]:
    """The rows of each ``--dataset`` that are conversations; the others are counted and named."""
    bad: list[str] = []
    why_refused = media_check(model, args.sampler_engine)
    for text in args.dataset:
        resolved = resolve_dataset_files(text, args)
        rows = placed_rows(resolved, args.strict)
        for row, path, position in itertools.islice(rows, resolved.spec.num_samples):
            if BAD_ROW in row:
                bad.append(row[BAD_ROW])
            elif args.sampler_engine != "no" and (why := why_refused(row)):
                bad.append(f"{locate(path, position)}: {why}")
            else:
                yield make_prompt(with_system(row, args.system), path, position)
    if bad:
        logger.warning("%d rows cannot be prompts and are left out, the first: %s", len(bad), bad[0])


def make_prompt(row: Row, path: str, position: Position) -> Prompt:
    """A standard row as a prompt. ``rejected_response`` was the dataset's; ours are the worst answers."""
    digest = hashlib.md5(json.dumps(row, sort_keys=True).encode(), usedforsecurity=False).hexdigest()
    messages, reference = split_reference(row["messages"])
    kept = {key: value for key, value in row.items() if key not in ("id", "rejected_response", "rejected_messages")}
    return Prompt(digest, {**kept, "messages": messages}, reference, (path, position))


def with_system(row: Row, system: str | None) -> Row:
    """The row with ``--system`` as its system message, as SWIFT's output has it."""
    if system is None:
        return row
    messages = row["messages"]
    rest = messages[1:] if messages and messages[0]["role"] == "system" else messages
    return {**row, "messages": [{"role": "system", "content": system}, *rest]}


def numbered(prompts: Iterable[Prompt]) -> Iterator[Prompt]:
    """Give equal rows ids of their own: each is answered."""
    seen: dict[str, int] = {}
    for prompt in prompts:
        seen[prompt.id] = count = seen.get(prompt.id, 0) + 1
        yield prompt if count == 1 else replace(prompt, id=f"{prompt.id}-{count}")


def chosen(args: SampleArguments, prompts: Sequence[Prompt]) -> list[Prompt]:
    """The prompts of this run. Part I of N goes from I/N of them to (I+1)/N: no row belongs to no part."""
    prompts = list(prompts)
    if args.dataset_shuffle and args.is_set("dataset_shuffle"):
        random.Random(args.data_seed).shuffle(prompts)
    if args.data_range:
        part, parts = args.data_range
        prompts = prompts[len(prompts) * part // parts : len(prompts) * (part + 1) // parts]
    if args.num_sampling_batches is not None:
        prompts = prompts[: args.num_sampling_batches * args.num_sampling_batch_size]
    return prompts


def read_cache(paths: Sequence[str]) -> dict[str, tuple[Prompt, list[str]]]:
    """Earlier results by id: the prompt as far as they tell it, and the answers.

    Raises:
        UserError: no such file, or a row without id or answer; names file:line.
    """
    for path in paths:
        if not os.path.isfile(path):
            raise UserError(f"--cache_files {path}: no such file")
        if split_format(path) is None:
            raise UserError(f"--cache_files {path}: expected a .jsonl or .parquet file of rayswift sample")
    found: dict[str, tuple[Prompt, list[str]]] = {}
    for row, path, position in iter_raw_rows(list(paths)):
        messages = row.get("messages") if isinstance(row, dict) else None
        last = messages[-1] if isinstance(messages, list) and messages and isinstance(messages[-1], dict) else {}
        if not isinstance(row, dict) or not isinstance(row.get("id"), str) or last.get("role") != "assistant":
            raise UserError(f"--cache_files {locate(path, position)}: expected a row of rayswift sample, with an id "
                            "and messages that end with an answer")  # fmt: skip
        if row["id"] not in found:
            prompt = replace(make_prompt(row, path, position), id=row["id"], reference=None)
            found[row["id"]] = (prompt, [])
        if text := str(last.get("content") or "").strip() and str(last["content"]):
            found[row["id"]][1].append(text)
    return found

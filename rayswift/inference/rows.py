"""Rows of ``rayswift infer``: from the datasets to standard rows, and from answers to SWIFT's result rows."""

from __future__ import annotations

import functools
import itertools
import random
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from rayswift.data.files import Position, locate
from rayswift.data.flow.stage import read_files
from rayswift.data.names import ResolvedDataset, resolve_dataset_files
from rayswift.data.rows.standard import WARNINGS, Drop
from rayswift.errors import UserError
from rayswift.generate.media import has_media, why_refused
from rayswift.generate.sources import kinds_taken
from rayswift.generate.types import Answer, JsonRow, split_reference
from rayswift.modeling.resolved import ResolvedModel

if TYPE_CHECKING:
    from rayswift.arguments import InferArguments

HELD_OUT = "val_dataset.jsonl"  # of a run directory
BAD_ROW = "error"  # key of a row that could not be read or answered: why


def resolve_asked(args: InferArguments) -> list[ResolvedDataset]:
    """The files of ``--val_dataset`` (else ``--dataset``); none in a conversation.

    With ``--load_data_args true`` those of the checkpoint's run: its ``--val_dataset``, else what it held out.
    """
    found = []
    from_run = "dataset" in args.restored and not args.val_dataset
    for text in [held_out_rows(args)] if from_run else args.val_dataset or args.dataset:
        try:
            found.append(resolve_dataset_files(text, args))
        except UserError as error:  # it speaks of --dataset whichever flag named the data
            raise UserError(str(error).replace("--dataset", asking_flag(args), 1)) from None
    return found


def held_out_rows(args: InferArguments) -> str:
    """The file of the rows that the run of ``--adapters`` or ``--model`` held out of its training data.

    Raises:
        UserError: there is none.
    """
    checkpoint = Path(args.adapters[0] if args.adapters else args.model or "")
    folders = [checkpoint, *([checkpoint.parent] if checkpoint.name.startswith("checkpoint-") else [])]
    for path in (folder / HELD_OUT for folder in folders):
        if path.is_file():
            return str(path)
    raise UserError(f"--load_data_args true: no {HELD_OUT} in {folders[-1]}, so its run held no rows out of what it "
                    "trained; name the rows with --val_dataset")  # fmt: skip


def asking_flag(args: InferArguments) -> str:
    """The flag that names the rows to answer."""
    return "--val_dataset" if args.val_dataset else "--dataset"


def read_rows(datasets: list[ResolvedDataset], args: InferArguments) -> list[JsonRow]:
    """The standard rows of the datasets, each with its dataset's name as ``dataset``.

    ``NAME#N`` takes the first N rows, ``--val_dataset_sample`` the first N of all; with ``--val_dataset_shuffle true``
    N random ones (``--data_seed``). A row that is no conversation becomes ``{"error": why, "dataset": …}``, or with
    ``--strict true`` a UserError that names file and line.
    """
    rows: list[JsonRow] = []
    for dataset in datasets:
        found = (row | {"dataset": dataset.spec.name} for row, _, _ in placed_rows(dataset, args.strict))
        rows += take(found, dataset.spec.num_samples, args)
    if not rows:
        raise UserError(f"{asking_flag(args)} {' '.join(args.val_dataset or args.dataset)}: no rows in it")
    return take(rows, args.val_dataset_sample, args)


def placed_rows(resolved: ResolvedDataset, strict: bool) -> Iterator[tuple[JsonRow, str, Position]]:
    """Standard rows of one dataset, bad ones as ``{"error": …}``, each with its file and its position there (for
    :func:`locate`)."""
    for row, path, position in read_files(resolved.files, resolved.rules):
        if isinstance(row, Drop):
            where = locate(path, position)
            if strict:
                raise UserError(f"{where}: {row.reason} (--strict true stops at the first bad row)")
            row = {"messages": [], BAD_ROW: f"{where}: {row.reason}"}
        row.pop(WARNINGS, None)
        yield row, path, position


def take(rows: Iterable[JsonRow], count: int | None, args: InferArguments) -> list[JsonRow]:
    """The first ``count`` rows (None: all), of the shuffled rows with ``--val_dataset_shuffle true``."""
    if args.val_dataset_shuffle:
        rows = list(rows)
        random.Random(args.data_seed).shuffle(rows)
    return list(itertools.islice(rows, count))


def media_check(model: ResolvedModel | None, engine: str) -> Callable[[JsonRow], str | None]:
    """What says why a row's files cannot be given to the model (None: an endpoint), and None of a row that can."""
    otherwise = f"the engine {engine} gives to no model; vllm does"
    if model is not None and engine == "vllm":
        otherwise = f"{model.name} does not take"
    takes = functools.cache(lambda: kinds_taken(model, engine))
    return lambda row: why_refused(row, takes(), otherwise) if has_media(row) else None


def result_row(row: JsonRow, answer: Answer) -> JsonRow:
    """One row of the result file (SWIFT's keys in SWIFT's order, then the row's other columns)."""
    if answer.told is not None:  # numbers, beside what the row says of them
        told = {"response": answer.told, "labels": row.get("label"), "logprobs": None, "messages": row["messages"]}
        return told | {key: value for key, value in row.items() if key not in told and key != "label"}
    messages, labels = split_reference(row["messages"])
    if answer.error is None:
        messages = [*messages, answer.message]
    result = {"response": answer.text, "labels": labels, "logprobs": answer.logprobs, "messages": messages}
    result |= {key: value for key, value in row.items() if key not in result and key != BAD_ROW}
    return result if answer.error is None else result | {BAD_ROW: answer.error}

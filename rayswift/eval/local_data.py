"""Benchmark data on this machine: found by file name, checked row by row, laid out as EvalScope and lm-eval read it.

Both load their data with ``datasets``, by subset and split. A clone of the hub's repository is handed over as it is;
any other file or folder is read with our own reader, which names file and line of what is wrong, and written once to
the cache as jsonl beside a card (``README.md``) that says which file is which subset and split.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rayswift.data.files import COMPRESSIONS, FORMATS, iter_raw_rows, locate
from rayswift.data.rows.standard import Drop
from rayswift.data.tokens.arrow_files import default_root
from rayswift.errors import UserError, one_line
from rayswift.eval.benchmarks import Benchmark
from rayswift.files import atomic_file, write_whole

Row = dict[str, Any]
#: Makes a row what the benchmark needs, or raises ValueError with what is wrong with it.
RowCheck = Callable[[Row], Row]

_SUFFIX = re.compile(
    "(" + "|".join(map(re.escape, FORMATS)) + ")(" + "|".join(map(re.escape, COMPRESSIONS[1:])) + ")?$"
)
_SHARD = re.compile(r"_\d{5}_of_\d{5}$")


@dataclass(frozen=True)
class LocalData:
    """Data as a backend reads it. ``splits``: (subset, split) that are there; None for a clone, which may have any."""

    path: str
    splits: frozenset[tuple[str, str]] | None

    def has(self, subset: str, split: str | None) -> bool:
        """Whether a split can be read."""
        return self.splits is None or (subset, split) in self.splits


def lay_out(
    benchmark: Benchmark, subsets: Sequence[str], split: str, others: Sequence[str] = (), check: RowCheck | None = None
) -> LocalData:
    """The data of ``benchmark.local_path``: ``split`` of each subset, and those of ``others`` that are there.

    Raises:
        UserError: a subset's file is missing, or a row (named by file and line) cannot be used.
    """
    assert benchmark.local_path is not None
    path = Path(benchmark.local_path)
    card = path / "README.md"
    # Repositories of the hubs say themselves which of their files is what.
    if card.is_file() and re.search(r"^configs:", card.read_text("utf-8", "replace"), re.MULTILINE):
        return LocalData(str(path), None)
    files = _found(benchmark, path, subsets, split, others)
    if missing := [subset for subset in subsets if (subset, split) not in files]:
        more = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
        names, choose = [f"{benchmark.asked}_{split}.jsonl", f"{split}.jsonl"], ""
        if len(subsets) > 1:
            names, choose = [f"{missing[0]}_{split}.jsonl"], "; or choose subsets with its subset_list"
        raise UserError(
            f"--eval_dataset {benchmark.asked}: {path} has no file of subset {missing[0]}{more}, split {split}; "
            f"expected {' or '.join(names)} (csv, json or parquet as well){choose}"
        )
    return _cached(benchmark, files, check)


def _found(
    benchmark: Benchmark, path: Path, subsets: Sequence[str], split: str, others: Sequence[str]
) -> dict[tuple[str, str], list[str]]:
    """Files of each subset and split: ``SUBSET/SPLIT.*``, ``SUBSET_SPLIT.*``; of a lone one also ``NAME_SPLIT.*`` and
    ``SPLIT.*``; for the split that is evaluated also ``SUBSET.*`` and ``NAME.*``."""
    if path.is_file():
        if _SUFFIX.search(path.name) is None:
            raise UserError(f"{path}: not a data file; expected {', '.join(FORMATS)}, or a folder")
        return {(subsets[0], split): [str(path)]}
    by_stem: dict[str, list[str]] = {}
    for file in sorted(path.rglob("*")):
        if file.is_file() and _SUFFIX.search(file.name.lower()):
            by_stem.setdefault(_stem(str(file.relative_to(path))), []).append(str(file))
    found, alone = {}, len(subsets) == 1
    for subset in subsets:
        names = [subset, *(name for name in benchmark.file_names if name and alone)]
        for each in (split, *others):
            stems = [f"{name}{sep}{each}" for name in names for sep in "/_"]
            stems += [each] if alone else []
            stems += names if each == split else []
            stem = next((s for s in map(_stem, stems) if s in by_stem), None)
            if stem is not None:
                found[subset, each] = by_stem[stem]
    return found


def _stem(name: str) -> str:
    """A path without suffix and shard number, in one spelling."""
    return _SHARD.sub("", _SUFFIX.sub("", name.lower()).replace("-", "_"))


def _with_columns(columns: Sequence[str]) -> RowCheck:
    def check(row: Row) -> Row:
        if lacking := [name for name in columns if row.get(name) in (None, "")]:
            raise ValueError(f"no {', '.join(lacking)}; expected {', '.join(columns)}")
        return row

    return check


def checked_rows(paths: Sequence[str], check: RowCheck) -> Iterator[Row]:
    """Rows of some files through ``check``. Raises UserError that names file and line."""
    for raw, path, position in iter_raw_rows(list(paths)):
        try:
            if isinstance(raw, Drop):
                raise ValueError(raw.reason)
            if not isinstance(raw, dict):
                raise ValueError("expected an object in braces")
            yield check(raw)
        except ValueError as error:
            raise UserError(f"{locate(path, position)}: {error}") from None


def data_line(benchmark: Benchmark, error: Exception) -> str:
    """What to do about data that a backend cannot load."""
    one = one_line(error, 400)
    if benchmark.local_path:
        return f"--eval_dataset {benchmark.asked}: {benchmark.local_path} cannot be read as its data ({one})"
    example = f'--eval_dataset_args \'{{"{benchmark.asked}": {{"local_path": "DIR"}}}}\''
    return f"--eval_dataset {benchmark.asked}: its data cannot be loaded ({one}); a local copy: {example}"


# --- the laid-out copy ------------------------------------------------------------------------------------------


def _cached(benchmark: Benchmark, files: dict[tuple[str, str], list[str]], check: RowCheck | None) -> LocalData:
    """Check and write the rows once; the same files are found again next time (`datasets` caches by path, too).

    Parquet has types of its own and stays as it is, unless a ``check`` makes other rows of it.
    """
    digest = hashlib.sha256(repr((benchmark.asked, benchmark.columns, sorted(benchmark.settings.items()))).encode())
    for key, paths in sorted(files.items()):
        digest.update(repr((key, [(p, os.stat(p).st_size, os.stat(p).st_mtime_ns) for p in paths])).encode())
    folder = Path(default_root(), "eval", f"{benchmark.folder}-{digest.hexdigest()[:16]}")
    card = folder / "README.md"
    if not card.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        names = {}
        for (subset, split), paths in files.items():
            as_it_is = check is None and len(paths) == 1 and paths[0].lower().endswith(".parquet")
            names[subset, split] = f"{subset}_{split}{'.parquet' if as_it_is else '.jsonl'}"
            target = folder / names[subset, split]
            _write(target, paths, None if as_it_is else check or _with_columns(benchmark.columns))
        write_whole(card, _card(names))  # last: with the card the folder is whole
    return LocalData(str(folder), frozenset(files))


def _write(target: Path, paths: Sequence[str], check: RowCheck | None) -> None:
    """The checked rows of some files as one jsonl file; without a check a link to the file."""
    with atomic_file(target) as half:
        if check is None:
            half.symlink_to(paths[0])
            return
        count = 0
        with half.open("w", encoding="utf-8") as file:
            for count, row in enumerate(checked_rows(paths, check), 1):  # noqa: B007 (counted for the check below)
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
        if not count:
            raise UserError(f"{paths[0]}: no rows in it")


def _card(names: dict[tuple[str, str], str]) -> str:
    """The front matter with which ``datasets`` finds subsets and splits."""
    lines = ["---", "configs:"]
    for subset in dict.fromkeys(subset for subset, _ in names):
        lines += [f"- config_name: {json.dumps(subset)}", "  data_files:"]
        for (each, split), name in names.items():
            if each == subset:
                lines += [f"  - split: {json.dumps(split)}", f"    path: {json.dumps(name)}"]
    return "\n".join([*lines, "---", ""])

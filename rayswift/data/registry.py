"""Dataset names to files: SWIFT's ``--dataset`` syntax, ``dataset_info.json`` entries, local paths and hub ids."""

from __future__ import annotations

import difflib
import json
import os
import re
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from rayswift.data.rows import RowRules
from rayswift.data.sources import filesystem_of, split_format
from rayswift.errors import UserError

_BUILTIN_INFO = Path(__file__).with_name("dataset_info.json")
_HUB_ID = re.compile(r"^[\w.-]+/[\w.-]+$")


@dataclass(frozen=True)
class DatasetSpec:
    """One ``--dataset`` value taken apart: ``[HF::|MS::]name[:subset1/subset2][#N]`` (SWIFT 1.3)."""

    text: str
    name: str
    subsets: tuple[str, ...] = ()
    num_samples: int | None = None
    use_hf: bool | None = None


@dataclass(frozen=True)
class DatasetInfo:
    """One entry of a ``dataset_info.json``, SWIFT's keys."""

    dataset_name: str | None = None
    ms_dataset_id: str | None = None
    hf_dataset_id: str | None = None
    dataset_path: str | None = None
    subsets: tuple[Any, ...] = ("default",)
    split: tuple[str, ...] = ("train",)
    columns: dict[str, str] = field(default_factory=dict)
    strip_input_prefix: str = ""

    def names(self) -> list[str]:
        """Every name this entry answers to, most exact first."""
        ids = [self.dataset_name, self.ms_dataset_id, self.hf_dataset_id, self.dataset_path]
        exact = [name for name in ids if name]
        return exact + [name.rsplit("/", 1)[-1] for name in (self.ms_dataset_id, self.hf_dataset_id) if name]


@dataclass(frozen=True)
class ResolvedDataset:
    """A dataset ready to be read: its files in order and the rules that turn its rows into standard rows."""

    spec: DatasetSpec
    files: list[str]
    rules: RowRules


@dataclass(frozen=True)
class ResolvedDatasets:
    """Everything a run reads: ``--dataset`` and ``--val_dataset``."""

    train: list[ResolvedDataset]
    val: list[ResolvedDataset]


def resolve_datasets(args: Any) -> ResolvedDatasets:
    """Find every dataset before the first is read: a typing error in the last one costs nothing.

    Raises:
        UserError: as :func:`resolve_dataset_files`.
    """
    train = [resolve_dataset_files(text, args) for text in args.dataset]
    return ResolvedDatasets(train, [resolve_dataset_files(text, args) for text in args.val_dataset])


def parse_spec(text: str) -> DatasetSpec:
    """Take one ``--dataset`` value apart; an existing local path wins at each split, so ``#`` and ``:`` may be in it.

    Raises:
        UserError: when ``#N`` is no positive number.
    """
    name, use_hf, num_samples = text, None, None
    prefix = re.match(r"^(HF|MS)::", name, re.IGNORECASE)
    if prefix:
        name, use_hf = name[prefix.end() :], prefix.group(1).upper() == "HF"
    if not _exists(name) and "#" in name:
        name, _, count = name.rpartition("#")
        if not count.isdigit() or int(count) == 0:
            raise UserError(f"--dataset {text}: '#{count}' is no number of rows; write for example {name}#500")
        num_samples = int(count)
    subsets: tuple[str, ...] = ()
    if "://" not in name and not _exists(name) and ":" in name:
        name, _, listed = name.partition(":")
        subsets = tuple(part for part in listed.split("/") if part)
    return DatasetSpec(text, name, subsets, num_samples, use_hf)


def resolve_dataset_files(text: str, args: Any) -> ResolvedDataset:
    """Find the files of one ``--dataset`` value: local path, registered name, or hub id (in this order).

    Args:
        text: the value as typed.
        args: arguments with ``columns``, ``model_name``, ``model_author``, ``use_hf``, ``hub_token`` and
            ``custom_dataset_info``.

    Raises:
        UserError: unknown dataset, empty folder, unknown subset; nothing has been read yet.
    """
    spec = parse_spec(text)
    base = RowRules(
        columns=args.columns or {}, model_name=tuple(args.model_name), model_author=tuple(args.model_author)
    )
    info = None if _exists(spec.name) else _lookup(spec.name, tuple(args.custom_dataset_info))
    if info:
        rules = RowRules(
            {**_columns_of(info, spec), **base.columns}, base.model_name, base.model_author, info.strip_input_prefix
        )
        return ResolvedDataset(spec, _files_of_info(info, spec, args), rules)
    if _exists(spec.name) or "://" in spec.name:
        return ResolvedDataset(spec, list_data_files(spec.name), base)
    # data/train.jsonl has the form of a hub id, but is a path with a typing error in it.
    if split_format(spec.name) or not _HUB_ID.match(spec.name):
        raise UserError(_unknown(spec, tuple(args.custom_dataset_info)))
    return ResolvedDataset(spec, _hub_files(spec.name, spec, ("train",), args), base)


def list_data_files(path: str) -> list[str]:
    """The data files of a path or URI: itself, or every data file below a folder, sorted by name.

    Raises:
        UserError: nothing there, or a folder without any data file.
    """
    from pyarrow import fs

    local = "://" not in path
    filesystem, inner = filesystem_of(os.path.abspath(os.path.expanduser(path)) if local else path)
    try:
        info = filesystem.get_file_info(inner)
    except OSError as error:
        raise UserError(f"--dataset {path}: cannot be read ({str(error).splitlines()[0]})") from None
    if info.type == fs.FileType.NotFound:
        raise UserError(f"--dataset {path}: no such file or folder")
    if info.type == fs.FileType.File:
        found = [inner] if split_format(inner) else []
    else:
        listed = filesystem.get_file_info(fs.FileSelector(inner, recursive=True))
        names = sorted(entry.path for entry in listed if entry.type == fs.FileType.File and split_format(entry.path))
        found = [name for name in names if not os.path.basename(name).startswith((".", "dataset_info"))]
    if not found:
        raise UserError(f"--dataset {path}: no data file there (.jsonl .json .csv .txt .parquet, plain, .gz or .zst)")
    return found if local else [path.split("://", 1)[0] + "://" + name for name in found]


def _exists(path: str) -> bool:
    return bool(path) and "://" not in path and os.path.exists(os.path.expanduser(path))


@cache
def _registered(custom: tuple[str, ...]) -> list[DatasetInfo]:
    entries: list[DatasetInfo] = []
    for source in (*custom, str(_BUILTIN_INFO)):
        entries += _read_info(source)
    return entries


def _read_info(source: str) -> list[DatasetInfo]:
    """The entries of one ``--custom_dataset_info`` (a file, or literal JSON)."""
    literal = source.lstrip().startswith(("[", "{"))
    try:
        listed = json.loads(source if literal else Path(source).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"--custom_dataset_info {source}: {error.strerror}") from None
    except json.JSONDecodeError as error:
        raise UserError(f"--custom_dataset_info {source}:{error.lineno}: broken JSON: {error.msg}") from None
    base = Path.cwd() if literal else Path(source).resolve().parent
    known = set(DatasetInfo.__dataclass_fields__)
    entries = []
    for entry in [listed] if isinstance(listed, dict) else listed:
        values = {key: value for key, value in entry.items() if key in known}
        values.update({key: tuple(values[key]) for key in ("subsets", "split") if key in values})
        path = values.get("dataset_path")
        if path and "://" not in path:
            values["dataset_path"] = str(base / path)
        entries.append(DatasetInfo(**values))
    return entries


def _lookup(name: str, custom: tuple[str, ...]) -> DatasetInfo | None:
    return next((entry for entry in _registered(custom) if name in entry.names()), None)


def _columns_of(info: DatasetInfo, spec: DatasetSpec) -> dict[str, str]:
    columns = dict(info.columns)
    for subset in info.subsets:
        if isinstance(subset, dict) and (subset.get("name") or subset.get("subset")) in spec.subsets:
            columns.update(subset.get("columns") or {})
    return columns


def _files_of_info(info: DatasetInfo, spec: DatasetSpec, args: Any) -> list[str]:
    known = [s if isinstance(s, str) else s.get("name") or s.get("subset") for s in info.subsets]
    unknown = [subset for subset in spec.subsets if subset not in (*known, "all")]
    if unknown and known != ["default"]:
        raise UserError(f"--dataset {spec.text}: no subset {unknown[0]!r}; there are {', '.join(known)}")
    if info.dataset_path:
        return list_data_files(info.dataset_path)
    use_hf = args.use_hf if spec.use_hf is None else spec.use_hf
    dataset_id = (info.hf_dataset_id if use_hf else info.ms_dataset_id) or info.ms_dataset_id or info.hf_dataset_id
    assert dataset_id is not None
    if use_hf and not info.hf_dataset_id:
        raise UserError(f"--dataset {spec.text}: this dataset is on ModelScope only; leave out --use_hf true")
    return _hub_files(dataset_id, spec, info.split, args)


def _hub_files(dataset_id: str, spec: DatasetSpec, splits: tuple[str, ...], args: Any) -> list[str]:
    from rayswift import hub

    use_hf = args.use_hf if spec.use_hf is None else spec.use_hf
    named = [s for s in spec.subsets if s not in ("default", "all")]
    subsets: list[str | None] = [*named] or [None]
    files: list[str] = []
    for subset in subsets:
        for split in splits:
            files += hub.resolve_dataset(dataset_id, use_hf=use_hf, subset=subset, split=split, token=args.hub_token)
    return files


def _unknown(spec: DatasetSpec, custom: tuple[str, ...]) -> str:
    names = [name for entry in _registered(custom) for name in entry.names()]
    close = difflib.get_close_matches(spec.name, names, n=1)
    hint = f"; did you mean {close[0]}?" if close else "; give a file, a folder or a hub id such as org/name"
    return f"--dataset {spec.text}: no such local path or registered dataset{hint}"

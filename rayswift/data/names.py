"""Dataset names to files: SWIFT's ``--dataset`` syntax, ``dataset_info.json`` entries, local paths and hub ids.

An entry comes from :func:`register_dataset` (in a file of ``--external_plugins``, or a script), from a file of
``--custom_dataset_info``, or from the ``dataset_info.json`` beside this module; in this order.
"""

from __future__ import annotations

import difflib
import json
import logging
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path
from typing import Any

from rayswift.data.files import split_format
from rayswift.data.folders import list_data_files
from rayswift.data.plugins import PluginFile, note_entry, shippable
from rayswift.data.rows.messages import MessageNames
from rayswift.data.rows.standard import Preprocess, RowRules
from rayswift.errors import UserError

logger = logging.getLogger("rayswift.data.names")

_BUILTIN_INFO = Path(__file__).with_name("dataset_info.json")
#: Names of datasets whose rows are about the model itself.
_SELF_COGNITION = re.compile(r"self[-_]?cognition|identity", re.IGNORECASE)
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
class Subset:
    """One subset: ``name`` chooses it on the command line, ``subset`` is its name on the hub; ``options`` (some of
    :data:`READ_OPTIONS`, its own or else the dataset's) say how its rows are read."""

    name: str
    subset: str
    options: Mapping[str, Any]
    is_weak_subset: bool = False


@dataclass(frozen=True)
class DatasetInfo:
    """One registered dataset, in SWIFT's keys; ``options`` are those of a subset that it does not list."""

    subsets: tuple[Subset, ...]
    options: Mapping[str, Any]
    dataset_name: str | None = None
    ms_dataset_id: str | None = None
    hf_dataset_id: str | None = None
    dataset_path: str | None = None

    def names(self) -> tuple[list[str], list[str], list[str]]:
        """Every name this entry answers to: its own, its ids and path, the last parts of its ids."""
        ids = [name for name in (self.ms_dataset_id, self.hf_dataset_id) if name]
        paths = [self.dataset_path] if self.dataset_path else []
        return [self.dataset_name] if self.dataset_name else [], ids + paths, [name.rsplit("/", 1)[-1] for name in ids]


@dataclass(frozen=True)
class ResolvedDataset:
    """A dataset ready to be read: its files in order and the rules that turn its rows into standard rows."""

    spec: DatasetSpec
    files: list[str]
    rules: RowRules

    def describe(self) -> str:
        """Its name and files in one line."""
        count, more = len(self.files), f" and {len(self.files) - 5:,} more" if len(self.files) > 5 else ""
        return f"dataset {self.spec.text}: {count:,} file{'s' * (count != 1)}: {', '.join(self.files[:5])}{more}"


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
    train, val = ([resolve_dataset_files(text, args) for text in texts] for texts in (args.dataset, args.val_dataset))
    if args.model_name + args.model_author and not any(dataset.rules.self_cognition for dataset in train + val):
        logger.warning("--model_name and --model_author: no dataset is named self-cognition or identity, so that no "
                       "{{NAME}} or {{AUTHOR}} is filled in")  # fmt: skip
    return ResolvedDatasets(train, val)


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


def register_dataset(
    dataset_name: str | None = None,
    *,
    ms_dataset_id: str | None = None,
    hf_dataset_id: str | None = None,
    dataset_path: str | None = None,
    subsets: Sequence[str | Mapping[str, Any]] = ("default",),
    preprocess: Preprocess | None = None,
    **settings: Any,
) -> None:
    """Give a dataset a name and say how its rows are read; for files of ``--external_plugins`` and for scripts.

    Args:
        dataset_name: what ``--dataset`` calls it (its ids and the last parts of them work as well).
        ms_dataset_id: its id on ModelScope.
        hf_dataset_id: its id on Hugging Face.
        dataset_path: a file, folder or URI instead; relative to the working directory.
        subsets: names, or objects with ``subset`` and optionally ``name``, ``is_weak_subset`` and any of ``settings``.
        preprocess: called with each raw row (a dict, columns renamed); returns a row of any schema, a list of rows,
            or None to leave the row out. It runs in Ray tasks, many rows at a time, and must not keep state.
        **settings: the other keys of a ``dataset_info.json`` entry: ``split``, ``columns``, ``messages``, ``tags``,
            ``help``, ``huge_dataset``, ``strip_input_prefix``, ``remove_text``, ``query_suffix``, ``response_prefix``.

    Raises:
        UserError: an unknown key, or a value of the wrong kind.
    """
    named = {"dataset_name": dataset_name, "ms_dataset_id": ms_dataset_id, "hf_dataset_id": hf_dataset_id}
    given = {**named, "dataset_path": dataset_path, "subsets": list(subsets), "preprocess": preprocess, **settings}
    info = _parse_info(
        {key: value for key, value in given.items() if value is not None}, "register_dataset", Path.cwd()
    )
    if not note_entry(info):
        _SCRIPT_ENTRIES.insert(0, info)  # what was registered last wins


def resolve_dataset_files(text: str, args: Any) -> ResolvedDataset:
    """Find the files of one ``--dataset`` value: local path, registered name, or hub id (in this order).

    Args:
        text: the value as typed.
        args: arguments with ``columns``, ``model_name``, ``model_author``, ``use_hf``, ``hub_token``,
            ``remove_unused_columns``, ``custom_dataset_info`` and ``external_plugins``.

    Raises:
        UserError: unknown dataset, empty folder, unknown subset, a broken plugin; nothing has been read yet.
    """
    spec = parse_spec(text)
    # What the user gave comes before what ships.
    entries = [entry for path in args.external_plugins for entry in PluginFile.read(path).registered().entries]
    entries += _SCRIPT_ENTRIES
    for source in args.custom_dataset_info:
        entries += _read_info(source)
    entries += _builtin()
    if _exists(spec.name):
        info = next((entry for entry in entries if entry.dataset_path and _same(entry.dataset_path, spec.name)), None)
    else:
        # SWIFT's order: a dataset's own name, then ids and paths, then the last part of an id.
        info = next((entry for kind in range(3) for entry in entries if spec.name in entry.names()[kind]), None)
    if info:
        subsets = _chosen_subsets(info, spec)
        known_as = [spec.name, *(name for kind in info.names() for name in kind)]
        rules = [_rules(subset.options, args, known_as) for subset in subsets]
        if any(other != rules[0] for other in rules):
            each = " ".join(f"{spec.name}:{subset.name}" for subset in subsets)
            raise UserError(f"--dataset {spec.text}: its subsets are read differently; give each by itself: {each}")
        return ResolvedDataset(spec, _files_of_info(info, spec, subsets, args), rules[0])
    if _exists(spec.name) or "://" in spec.name:
        return ResolvedDataset(spec, _files_of_path(spec.name, _named_subsets(spec)), _rules({}, args, [spec.name]))
    # data/train.jsonl has the form of a hub id, but is a path with a typing error in it.
    if split_format(spec.name) or not _HUB_ID.match(spec.name):
        known = [name for entry in entries for kind in entry.names() for name in kind]
        close = difflib.get_close_matches(spec.name, known, n=1)
        hint = f"did you mean {close[0]}?" if close else "give a file, a folder or a hub id such as org/name"
        raise UserError(f"--dataset {spec.text}: no such local path or registered dataset; {hint}")
    return ResolvedDataset(spec, _hub_files(spec, spec.name, _named_subsets(spec), args), _rules({}, args, [spec.name]))


def _exists(path: str) -> bool:
    return bool(path) and "://" not in path and os.path.exists(os.path.expanduser(path))


def _same(path: str, other: str) -> bool:
    return os.path.realpath(path) == os.path.realpath(os.path.expanduser(other))


#: What is wanted of a dataset: subsets (None: the default one), each with its splits (empty: ``train``).
_Wanted = list[tuple[str | None, tuple[str, ...]]]


def _named_subsets(spec: DatasetSpec) -> _Wanted:
    """The subsets that a value names, for a dataset without an entry."""
    named = [name for name in spec.subsets if name not in ("default", "all")]
    return [(name, ()) for name in named] or [(None, ())]


#: What scripts registered in this process.
_SCRIPT_ENTRIES: list[DatasetInfo] = []


@cache
def _builtin() -> list[DatasetInfo]:
    from rayswift.data.builtin.recipes import ENTRIES

    return _read_info(str(_BUILTIN_INFO)) + [_parse_info(entry, "recipes", Path.cwd()) for entry in ENTRIES]


def _read_info(source: str) -> list[DatasetInfo]:
    """The entries of one ``--custom_dataset_info`` (a file, or literal JSON)."""
    literal = source.lstrip().startswith(("[", "{"))
    shown = "the JSON" if literal else source
    try:
        listed = json.loads(source if literal else Path(source).read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise UserError(f"--custom_dataset_info {shown}: {error.strerror}") from None
    except json.JSONDecodeError as error:
        raise UserError(f"--custom_dataset_info {shown}:{error.lineno}: broken JSON: {error.msg}") from None
    except UnicodeDecodeError:
        raise UserError(f"--custom_dataset_info {shown}: not UTF-8 text") from None
    base = Path.cwd() if literal else Path(source).resolve().parent
    listed = [listed] if isinstance(listed, dict) else listed
    if not isinstance(listed, list):
        raise UserError(f"--custom_dataset_info {shown}: not a list of objects")
    return [_parse_info(entry, f"--custom_dataset_info {shown}, entry {n}", base) for n, entry in enumerate(listed, 1)]


#: What says how the rows of a dataset or of one of its subsets are read.
READ_OPTIONS = ("split", "columns", "messages", "strip_input_prefix", "remove_text", "query_suffix",
                "response_prefix", "preprocess")  # fmt: skip
_INFO_KEYS = ("dataset_name", "ms_dataset_id", "hf_dataset_id", "dataset_path", "subsets", "tags", "help",
              "huge_dataset", *READ_OPTIONS)  # fmt: skip
_SUBSET_KEYS = ("name", "subset", "is_weak_subset", *READ_OPTIONS)
_MESSAGE_KEYS = tuple(f.name for f in fields(MessageNames))


def _parse_info(entry: Any, where: str, base: Path) -> DatasetInfo:
    """One entry of a ``dataset_info.json``; paths are relative to ``base``."""
    _check_keys(entry, _INFO_KEYS, where)
    path = entry.get("dataset_path")
    if not path and not any(entry.get(key) for key in ("ms_dataset_id", "hf_dataset_id")):
        raise UserError(f"{where}: no ms_dataset_id, hf_dataset_id or dataset_path says where the data is")
    if path and "://" not in path:
        path = str(base / os.path.expanduser(path))
    options = _parse_options(entry, where)
    subsets = []
    for subset in _listed(entry.get("subsets") or ["default"]):
        if isinstance(subset, str):
            subsets.append(Subset(subset, subset, options))
            continue
        _check_keys(subset, _SUBSET_KEYS, f"{where}, subset")
        on_hub, own = subset.get("subset") or "default", _parse_options(subset, where)
        columns = {**options.get("columns", {}), **own.get("columns", {})}
        own = {**options, **own, "columns": columns}
        subsets.append(Subset(subset.get("name") or on_hub, on_hub, own, bool(subset.get("is_weak_subset"))))
    names = {key: entry[key] for key in ("dataset_name", "ms_dataset_id", "hf_dataset_id") if entry.get(key)}
    return DatasetInfo(tuple(subsets), options, **names, dataset_path=path)


def _parse_options(entry: Mapping[str, Any], where: str) -> dict[str, Any]:
    options = {key: entry[key] for key in READ_OPTIONS if entry.get(key) is not None}
    if "split" in options:
        options["split"] = tuple(_listed(options["split"]))
    for key in ("columns", "messages"):
        table = options.get(key, {})
        if not isinstance(table, Mapping) or not all(isinstance(text, str) for item in table.items() for text in item):
            raise UserError(f"{where}: {key} is not an object of names")
    if "messages" in options:
        _check_keys(options["messages"], _MESSAGE_KEYS, f"{where}, messages")
    if "preprocess" in options:
        if not callable(options["preprocess"]):
            raise UserError(f"{where}: preprocess is a function, which only register_dataset can take")
        options["preprocess"] = shippable(options["preprocess"])
    return options


def _listed(value: Any) -> list[Any]:
    return list(value) if isinstance(value, (list, tuple)) else [value]


def _check_keys(entry: Any, known: Sequence[str], where: str) -> None:
    if not isinstance(entry, Mapping):
        raise UserError(f"{where}: not an object")
    unknown = next((key for key in entry if key not in known), None)
    if unknown is not None:
        close = difflib.get_close_matches(str(unknown), known, n=1)
        hint = f"did you mean {close[0]}?" if close else f"there are {', '.join(known)}"
        raise UserError(f"{where}: no key {unknown!r}; {hint}")


def _rules(options: Mapping[str, Any], args: Any, known_as: list[str]) -> RowRules:
    """How rows become standard rows; what the command line says comes last and wins."""
    names = ("strip_input_prefix", "remove_text", "query_suffix", "response_prefix", "preprocess")
    return RowRules(
        columns={**options.get("columns", {}), **(args.columns or {})},
        self_cognition=any(_SELF_COGNITION.search(os.path.basename(name.rstrip("/"))) for name in known_as),
        model_name=tuple(args.model_name),
        model_author=tuple(args.model_author),
        message_names=MessageNames(**options.get("messages", {})),
        keep_extra=not args.remove_unused_columns,
        **{name: options[name] for name in names if name in options},
    )


def _chosen_subsets(info: DatasetInfo, spec: DatasetSpec) -> list[Subset]:
    """The subsets a value names; without a name the only one, else ``default``; ``all``: every one that is not weak."""
    known = {subset.name: subset for subset in info.subsets}
    if not spec.subsets:
        if len(known) > 1 and "default" not in known:
            raise UserError(f"--dataset {spec.text}: choose a subset: {', '.join(f'{spec.name}:{n}' for n in known)}")
        return [known.get("default") or next(iter(known.values()))]
    if spec.subsets == ("all",):
        return [subset for subset in info.subsets if not subset.is_weak_subset]
    unknown = next((name for name in spec.subsets if name not in known), None)
    if unknown is not None and list(known) != ["default"]:
        raise UserError(f"--dataset {spec.text}: no subset {unknown!r}; there are {', '.join(known)}")
    # An entry that lists none leaves them to the hub.
    return [known.get(name) or Subset(name, name, info.options) for name in spec.subsets]


def _files_of_info(info: DatasetInfo, spec: DatasetSpec, subsets: list[Subset], args: Any) -> list[str]:
    wanted: _Wanted = [
        (None if subset.subset == "default" else subset.subset, subset.options.get("split") or ()) for subset in subsets
    ]
    if info.dataset_path:
        # The subsets of an entry for a file are ways to read it.
        one_file = os.path.isfile(info.dataset_path)
        return [info.dataset_path] if one_file else _files_of_path(info.dataset_path, wanted)
    use_hf = args.use_hf if spec.use_hf is None else spec.use_hf
    dataset_id = info.hf_dataset_id if use_hf else info.ms_dataset_id
    if dataset_id is None:
        only, mend = ("ModelScope", "leave out --use_hf true") if use_hf else ("Hugging Face", "add --use_hf true")
        raise UserError(f"--dataset {spec.text}: this dataset is on {only} only; {mend}")
    return _hub_files(spec, dataset_id, wanted, args)


def _files_of_path(path: str, wanted: _Wanted) -> list[str]:
    if wanted != [(None, ())] and os.path.isfile(os.path.expanduser(path)):
        raise UserError(f"--dataset {path}: is a file, and has no subsets or splits; give it alone")
    files = [file for subset, splits in wanted for split in splits or (None,)
             for file in list_data_files(path, subset, split)]  # fmt: skip
    return list(dict.fromkeys(files))


def _hub_files(spec: DatasetSpec, dataset_id: str, wanted: _Wanted, args: Any) -> list[str]:
    from rayswift import hub

    use_hf = args.use_hf if spec.use_hf is None else spec.use_hf
    files = [
        file
        for subset, splits in wanted
        for split in splits or ("train",)
        for file in hub.resolve_dataset(dataset_id, use_hf=use_hf, subset=subset, split=split, token=args.hub_token)
    ]
    return list(dict.fromkeys(files))

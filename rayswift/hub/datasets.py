"""Which files of a dataset repository are a subset and a split.

In: the paths of a repository and a reader of its small text files. Out: the paths that are wanted. Nothing is
downloaded here, and a loading script is never run.
"""

from __future__ import annotations

import fnmatch
import json
import logging
import os
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from rayswift.errors import UserError
from rayswift.files import parse_yaml

logger = logging.getLogger("rayswift.hub")

#: Data formats, the preferred first where a repository holds as many files of each.
_FORMATS = {
    "parquet": (".parquet",),
    "json": (".jsonl", ".json"),
    "csv": (".csv", ".tsv"),
    "arrow": (".arrow",),
    "txt": (".txt",),
}
_NOT_DATA = re.compile(
    r"(dataset_infos?|dataset_dict|configuration|config|state|requirements|licen[sc]e|readme)\.\w+"
    r"|cache-[0-9a-f]+(_\d+_of_\d+)?\.arrow"  # what `datasets` keeps of maps beside a saved dataset
)
_SPLIT_WORDS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}


@dataclass
class _Config:
    """One subset as the repository declares it: split → patterns, or None where only its folder is given."""

    name: str
    is_default: bool = False
    folder: str = ""
    splits: dict[str, list[str]] | None = None


def choose_data_files(
    dataset_id: str,
    paths: list[str],
    read: Callable[[str], str],
    *,
    subset: str | None = None,
    split: str = "train",
    only_split: bool = False,
) -> list[str]:
    """The data files among ``paths`` that are this subset and split, sorted; see :func:`resolve_dataset`.

    ``only_split``: where all of them are one other split, take that.
    """
    label = f"--dataset {dataset_id}"
    data = [path for path in paths if _format_of(path) and not _NOT_DATA.fullmatch(os.path.basename(path).lower())]
    configs = _front_matter_configs(label, read("README.md")) if "README.md" in paths else []
    structure = dataset_id.rpartition("::")[2].rpartition("/")[2] + ".json"
    if not configs and structure in paths:
        configs = _structure_configs(read(structure))
        data = [path for path in data if not configs or path != structure]
    if not data:
        script = any(path.endswith(".py") for path in paths)
        why = "its data is behind a loading script, which is never run" if script else "no data file there"
        raise UserError(
            f"{label}: {why}; give files in .jsonl .json .csv .tsv .txt .parquet or .arrow (plain, .gz or .zst)"
        )
    if configs:
        config = _choose_config(label, dataset_id, configs, subset)
        if config.splits is not None:
            return _declared_files(label, config, data, split, only_split)
        data = [path for path in data if path.startswith(config.folder)]
    elif subset and subset != "default":
        data = _subset_by_name(label, data, subset)
    data = _split_by_name(label, data, split, only_split)
    # The same rows are often there in several formats: keep the one with most files, and .txt only if alone.
    groups = {name: [path for path in data if _format_of(path) == name] for name in _FORMATS}
    ranked = sorted((n for n in groups if groups[n]), key=lambda n: (n == "txt", -len(groups[n])))
    if len(ranked) > 1:
        logger.warning("%s: holds %s; taking the %s files", label, " and ".join(ranked), ranked[0])
    return sorted(groups[ranked[0]])


def _format_of(path: str) -> str | None:
    base = re.sub(r"\.(gz|zst)$", "", path.lower())
    return next((name for name, suffixes in _FORMATS.items() if base.endswith(suffixes)), None)


def _front_matter_configs(label: str, readme: str) -> list[_Config]:
    """``configs`` of the YAML between the ``---`` lines that open a README (Hugging Face's and ModelScope's format)."""
    import yaml

    match = re.match(r"\s*---[ \t]*\r?\n(.*?)\r?\n---[ \t]*(\r?\n|$)", readme, re.DOTALL)
    try:
        listed = (parse_yaml(match[1]) or {}).get("configs") if match else None
    except (yaml.YAMLError, AttributeError, ValueError):
        logger.warning("%s: the YAML at the head of its README.md is broken; going by file names", label)
        return []
    configs = []
    for entry in listed if isinstance(listed, list) else []:
        if not isinstance(entry, dict) or not (entry.get("data_files") or entry.get("data_dir")):
            continue
        folder = _name(entry.get("data_dir")).removeprefix("./").rstrip("/")
        config = _Config(
            _name(entry.get("config_name", "default")), bool(entry.get("default")), folder and folder + "/"
        )
        for given_split, path in _split_items(entry.get("data_files")):
            config.splits = config.splits or {}
            config.splits.setdefault(given_split, []).append(config.folder + path.removeprefix("./"))
        configs.append(config)
    return configs


def _split_items(data_files: Any) -> Iterator[tuple[str, str]]:
    """``data_files`` in each of its spellings: a pattern, patterns, {split: patterns}, [{split, path}]."""
    if isinstance(data_files, dict):
        data_files = [{"split": split, "path": path} for split, path in data_files.items()]
    for item in data_files if isinstance(data_files, list) else [data_files] if data_files else []:
        path = item.get("path") if isinstance(item, dict) else item
        for pattern in path if isinstance(path, list) else [path]:
            yield _name(item.get("split", "train")) if isinstance(item, dict) else "train", _name(pattern)


def _name(value: Any) -> str:
    """A name or pattern of the YAML; empty for what is none (a list of lists of aliases has no end as a text)."""
    return str(value) if isinstance(value, (str, int, float)) else ""


def _structure_configs(text: str) -> list[_Config]:
    """ModelScope's ``<name>.json``: ``{subset: {split: {"meta": data file, "file": archive}}}``; else no configs."""
    try:
        return [
            _Config(name, name == "default", "", {split: [entry["meta"]] for split, entry in splits.items()})
            for name, splits in json.loads(text).items()
        ]
    except (ValueError, AttributeError, TypeError, KeyError):
        return []  # a data file that happens to carry the repository's name


def _choose_config(label: str, dataset_id: str, configs: list[_Config], subset: str | None) -> _Config:
    names = ", ".join(config.name for config in configs)
    chosen = [config for config in configs if subset and config.name == subset]
    if subset and not chosen and subset != "default":
        raise UserError(f"{label}: no subset {subset!r}; there are {names}")
    chosen = chosen or [c for c in configs if c.is_default] or [c for c in configs if c.name == "default"]
    if not chosen and len(configs) > 1:
        raise UserError(f"{label}: has several subsets; choose one as {dataset_id}:NAME from {names}")
    return (chosen or configs)[0]


def _declared_files(label: str, config: _Config, data: list[str], split: str, only_split: bool) -> list[str]:
    assert config.splits is not None
    if only_split and len(config.splits) == 1:
        split = next(iter(config.splits))
    if split not in config.splits:
        raise UserError(f"{label}: subset {config.name!r} has no split {split!r}; there are {', '.join(config.splits)}")
    found = [path for path in data if any(_is_meant(path, pattern.rstrip("/")) for pattern in config.splits[split])]
    if not found:
        raise UserError(
            f"{label}: {', '.join(config.splits[split])} of subset {config.name!r} are not in the repository as"
            " .jsonl .json .csv .tsv .txt .parquet or .arrow; choose another subset or give the files"
        )
    return found


def _is_meant(path: str, pattern: str) -> bool:
    """Hub globs: ``*`` stays in a folder, ``**`` is any number of them, a folder means everything in it.

    Part by part, so that a stranger's pattern of many stars takes no longer than another.
    """
    if not set(pattern) & set("*?["):
        return path == pattern or path.startswith(f"{pattern}/")
    wanted = pattern.split("/")
    is_folder = not set(wanted[-1]) & set("*?[")

    def from_here(places: Iterable[int]) -> set[int]:
        """With those behind a ``**``, which may be no folder at all."""
        found = set(places)
        for place in range(min(found, default=len(wanted)), len(wanted)):
            if place in found and wanted[place] == "**":
                found.add(place + 1)
        return found

    places = from_here([0])  # parts of the pattern that may come next
    for part in path.split("/"):
        places = from_here(
            place if wanted[place] == "**" else place + 1
            for place in places
            if place < len(wanted) and fnmatch.fnmatchcase(part, wanted[place])
        )
        if is_folder and len(wanted) in places:
            return True
    return len(wanted) in places


def _subset_by_name(label: str, data: list[str], subset: str) -> list[str]:
    """Files in a folder of the subset's name, else files named after it (``name.jsonl``, ``name-00000.parquet``)."""
    named = re.compile(rf"(?:.*/)?{re.escape(subset)}[-_.][^/]*")
    found = [path for path in data if subset in path.split("/")[:-1]] or [p for p in data if named.fullmatch(p)]
    if not found:
        known = sorted({path.split("/")[-2] for path in data if "/" in path} or {path.split(".")[0] for path in data})
        raise UserError(f"{label}: no subset {subset!r}; there are {', '.join(known[:20])}")
    return found


def _split_by_name(label: str, data: list[str], split: str, only_split: bool) -> list[str]:
    """Files whose name, or else nearest folder, says the split; files that say none are the train split."""
    words = {split: _SPLIT_WORDS.get(split, (split,)), **{k: v for k, v in _SPLIT_WORDS.items() if k != split}}
    alternatives = {name: "|".join(map(re.escape, spelt)) for name, spelt in words.items()}
    patterns = {name: re.compile(rf"(?<![a-z0-9])(?:{spelt})(?![a-z])") for name, spelt in alternatives.items()}

    def split_of(path: str) -> str | None:
        for part in reversed(path.lower().split("/")):
            for name, pattern in patterns.items():
                if pattern.search(part):
                    return name
        return None

    found = [path for path in data if split_of(path) == split]
    if not found and split == "train":
        found = [path for path in data if split_of(path) is None]
    if not found:
        known = sorted({split_of(path) or "train" for path in data})
        if only_split and len(known) == 1:
            return data
        raise UserError(f"{label}: no split {split!r}; there are {', '.join(known)}")
    return found

"""Benchmarks by the names that SWIFT's users type, and what each backend calls them (``benchmarks.json``)."""

from __future__ import annotations

import difflib
import functools
import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rayswift.errors import UserError
from rayswift.eval.results import folder_name

if TYPE_CHECKING:
    from rayswift.arguments import EvalArguments

#: Benchmarks whose questions are the user's own file.
QUESTION_SETS = ("general_mcq", "general_qa")


@dataclass(frozen=True)
class Benchmark:
    """One benchmark to run.

    ``asked``: the name that was typed, which names it everywhere. ``name``: the backend's. ``settings``: what
    ``--eval_dataset_args`` says about it over what its name means (``ARC_c`` is one subset of ``arc``).
    ``local_path``: where its data is on this machine (None: the hub). ``file_names``: how its files may be called.
    ``columns``: what each row of its data must have.
    """

    asked: str
    name: str
    settings: dict[str, Any] = field(default_factory=dict)
    local_path: str | None = None
    file_names: tuple[str, ...] = ()
    columns: tuple[str, ...] = ()

    @property
    def folder(self) -> str:
        """Name of its folder in a run."""
        return folder_name(self.asked)


@functools.cache
def known_names() -> dict[str, dict[str, Any]]:
    """The table of names."""
    table: dict[str, dict[str, Any]] = json.loads(Path(__file__).with_name("benchmarks.json").read_text("utf-8"))
    return table


def read_benchmarks(args: EvalArguments) -> list[Benchmark]:
    """The benchmarks of ``--eval_dataset``, in order, each once.

    Raises:
        UserError: settings for a benchmark that is not run, or local data that is not there.
    """
    asked = list(dict.fromkeys(args.eval_dataset))
    for name, settings in args.eval_dataset_args.items():
        if name not in asked and not any(name == _entry(each, args.eval_backend)["name"] for each in asked):
            raise UserError(f"--eval_dataset_args: {name} is not among --eval_dataset {' '.join(asked)}")
        if not isinstance(settings, dict):
            example = f'\'{{"{name}": {{"local_path": "DIR"}}}}\''
            raise UserError(
                f"--eval_dataset_args: {name} is {settings!r}, expected its settings, for example {example}"
            )
    return [_benchmark(name, args) for name in asked]


def _entry(asked: str, backend: str) -> dict[str, Any]:
    """What a name means to a backend, as ``{"name": …, settings …}``; a name we do not know is the backend's own."""
    exact = known_names().get(asked)
    entry = exact or next((row for name, row in known_names().items() if name.lower() == asked.lower()), {})
    meant = entry.get(backend, asked)
    return dict(meant) if isinstance(meant, dict) else {"name": meant}


def _benchmark(asked: str, args: EvalArguments) -> Benchmark:
    meant = _entry(asked, args.eval_backend)
    name = str(meant.pop("name"))
    given = args.eval_dataset_args.get(asked, args.eval_dataset_args.get(name, {}))
    settings = {**meant, **given}
    local_path = settings.pop("local_path", None) or args.local_dataset
    if asked in QUESTION_SETS and local_path is None:
        example = f'\'{{"{asked}": {{"local_path": "questions.csv"}}}}\''
        raise UserError(f"--eval_dataset {asked}: your own questions need a file, --eval_dataset_args {example}")
    if local_path is not None and not isinstance(local_path, str):
        raise UserError(f"--eval_dataset_args: local_path of {asked} is {local_path!r}, expected a file or a folder")
    if local_path is not None and not Path(local_path).expanduser().exists():
        flag = "--eval_dataset_args: local_path of " + asked if "local_path" in given else "--local_dataset"
        raise UserError(f"{flag} {local_path}: no such file or folder")
    entry = known_names().get(asked, {})
    return Benchmark(
        asked,
        name,
        settings,
        str(Path(local_path).expanduser().resolve()) if local_path else None,
        tuple(dict.fromkeys(["" if asked in QUESTION_SETS else asked, name, *entry.get("files", [])])),
        tuple(entry.get("columns", [])),
    )


def require_known(benchmark: Benchmark, backend: str, names: Iterable[str]) -> None:
    """UserError, with the nearest names, for a benchmark that the backend does not have."""
    known = set(names)
    if benchmark.name in known:
        return
    ours = [name for name, row in known_names().items() if backend in row]
    near = difflib.get_close_matches(benchmark.asked, sorted({*known, *ours}), n=3, cutoff=0.6)
    hint = f"did you mean {' or '.join(near)}?" if near else f"it has for example {', '.join(ours[:8])}"
    raise UserError(f"--eval_dataset {benchmark.asked}: --eval_backend {backend} has no such benchmark; {hint}")

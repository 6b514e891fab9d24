"""Imports go down only: the line of the house plan, ``cli → commands → generate → data … → hub … → files``."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[2] / "rayswift"

#: Floors from the top; a room imports from its own floor and those below it.
FLOORS = (
    ("cli", "__main__"),
    ("train", "serve", "inference", "chat_page", "sampling", "eval", "exporting", "plan"),
    ("generate",),
    ("data", "modeling", "rewards"),
    ("hub", "cluster", "arguments"),
    ("files", "journal", "errors", "private", "redaction", "console"),
)
#: What passes between these two is the run directory.
NEVER = {("train", "serve"), ("serve", "train")}
#: The order of the rooms of one package; each imports from itself and from those after it.
INSIDE = {
    "data": ("preview", "flow", "tokens", "chat", "names", "plugins", "builtin", "files", "rows", "json_text"),
    "serve": ("running", "deploy", "application", "gateway", "replica"),
}
LEVEL = {room: level for level, rooms in enumerate(FLOORS) for room in rooms}


def imports(path: Path) -> Iterator[tuple[int, str]]:
    """Line and dotted name of every import of this package, also of those for type checkers and inside functions."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "rayswift":
            if node.module == "rayswift":
                yield from ((node.lineno, f"rayswift.{alias.name}") for alias in node.names)
            else:
                yield node.lineno, node.module
        elif isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names if alias.name.startswith("rayswift."))


def wrong(source: str, target: str) -> bool:
    """Whether a module of this dotted name may not import that one (both without ``rayswift.``)."""
    (room, *inner), (other, *deeper) = source.split("."), target.split(".")
    if other not in LEVEL:  # the package's own face: its version
        return other != "__version__"
    if room == other:
        order = INSIDE.get(room, ())
        places = [order.index(part[0]) for part in (inner, deeper) if part and part[0] in order]
        return len(places) == 2 and places[1] < places[0]
    return LEVEL[other] < LEVEL[room] or (room, other) in NEVER


def modules() -> list[tuple[str, Path]]:
    found = [(path, path.relative_to(PACKAGE).with_suffix("").parts) for path in sorted(PACKAGE.rglob("*.py"))]
    return [(".".join(part for part in parts if part != "__init__"), path) for path, parts in found
            if parts != ("__init__",)]  # fmt: skip


def test_every_room_is_on_a_floor() -> None:
    assert {name.split(".")[0] for name, _ in modules()} - set(LEVEL) == set()


def test_imports_go_down_only() -> None:
    up = [
        f"{path.relative_to(PACKAGE.parent)}:{line}: {name} imports {target}"
        for name, path in modules()
        for line, target in imports(path)
        if wrong(name, target.removeprefix("rayswift."))
    ]
    assert up == [], "\n".join(up)


def test_files_of_a_package_do_not_import_in_a_circle() -> None:
    import graphlib

    known = {name for name, _ in modules()}

    def module(target: str) -> str:
        return target if target in known else target.rpartition(".")[0]

    edges = {
        name: {module(target.removeprefix("rayswift.")) for _, target in imports(path)} & known - {name}
        for name, path in modules()
        if path.name != "__init__.py"
    }
    try:
        graphlib.TopologicalSorter(edges).prepare()
    except graphlib.CycleError as error:
        pytest.fail(f"a circle of imports: {' → '.join(error.args[1])}")


@pytest.mark.parametrize(
    ("source", "target", "refused"),
    [
        ("train.driver", "serve.deploy", True),
        ("serve.deploy", "train.driver", True),
        ("generate.pool", "serve.running", True),
        ("data.files", "generate.types", True),
        ("errors", "files", False),
        ("serve.deploy", "generate.model_spec", False),
        ("data.tokens.encoder", "data.flow.cache", True),
        ("data.flow.cache", "data.tokens.encoder", False),
        ("cli.main", "train.driver", False),
    ],
)
def test_the_rule_itself(source: str, target: str, refused: bool) -> None:
    assert wrong(source, target) is refused

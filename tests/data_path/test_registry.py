"""What ``--dataset`` values mean: paths, registered names, subsets, ``#N``, and what is said about wrong ones."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from rayswift.arguments import Arguments, make_arguments
from rayswift.data.registry import DatasetSpec, list_data_files, parse_spec, resolve_dataset_files
from rayswift.errors import UserError


def arguments(**given: Any) -> Arguments:
    return make_arguments("sft", model="org/model", dataset=["x"], **given)


def refusal(text: str, **given: Any) -> str:
    with pytest.raises(UserError) as caught:
        resolve_dataset_files(text, arguments(**given))
    return str(caught.value)


def touch(path: Path, text: str = '{"text": "a"}\n') -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return str(path)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("org/name", DatasetSpec("org/name", "org/name")),
        ("org/name#500", DatasetSpec("org/name#500", "org/name", (), 500)),
        (
            "swift/self-cognition:qwen3#2",
            DatasetSpec("swift/self-cognition:qwen3#2", "swift/self-cognition", ("qwen3",), 2),
        ),
        ("org/name:a/b", DatasetSpec("org/name:a/b", "org/name", ("a", "b"))),
        ("HF::org/name:a#1", DatasetSpec("HF::org/name:a#1", "org/name", ("a",), 1, True)),
        ("ms::org/name", DatasetSpec("ms::org/name", "org/name", (), None, False)),
        ("s3://bucket/a.jsonl#9", DatasetSpec("s3://bucket/a.jsonl#9", "s3://bucket/a.jsonl", (), 9)),
        ("oss://bucket/dir", DatasetSpec("oss://bucket/dir", "oss://bucket/dir")),
    ],
)
def test_dataset_syntax(text: str, expected: DatasetSpec) -> None:
    assert parse_spec(text) == expected


def test_number_and_colon_may_be_part_of_a_real_path(tmp_path: Path) -> None:
    hashed = touch(tmp_path / "run#3.jsonl")
    coloned = touch(tmp_path / "12:30.jsonl")
    folder = touch(tmp_path / "v1:a#2" / "x.jsonl").rsplit("/", 1)[0]
    for path in (hashed, coloned, folder):
        assert parse_spec(path) == DatasetSpec(path, path)
        assert parse_spec(f"{path}#7") == DatasetSpec(f"{path}#7", path, (), 7)
    assert resolve_dataset_files(f"{hashed}#7", arguments()).files == [hashed]


@pytest.mark.parametrize("count", ["0", "", "many", "-3", "1.5"])
def test_a_wrong_number_of_rows(count: str) -> None:
    with pytest.raises(UserError, match=r"is no number of rows; write for example org/name#500"):
        parse_spec(f"org/name#{count}")


def test_a_folder_gives_its_data_files_in_order(tmp_path: Path) -> None:
    names = ["b.jsonl", "a.csv.gz", "deep/c.parquet", "README.md", "dataset_info.json", ".hidden.jsonl", "d.jsonl.tmp"]
    for name in names:
        touch(tmp_path / name)
    found = [str(Path(path).relative_to(tmp_path)) for path in list_data_files(str(tmp_path))]
    assert found == ["a.csv.gz", "b.jsonl", "deep/c.parquet"]
    assert list_data_files(f"file://{tmp_path}") == [f"file://{tmp_path}/{name}" for name in found]


@pytest.mark.parametrize("name", ["", "notes.md"])
def test_a_path_without_data(tmp_path: Path, name: str) -> None:
    touch(tmp_path / "notes.md")
    path = str(tmp_path / name)
    assert (
        refusal(path) == f"--dataset {path}: no data file there (.jsonl .json .csv .txt .parquet, plain, .gz or .zst)"
    )


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("identty", "did you mean identity?"),
        ("self-cognitoin", "did you mean self-cognition?"),
        ("/no/such/folder", "give a file, a folder or a hub id such as org/name"),
        ("zzzzzzzz", "give a file, a folder or a hub id such as org/name"),
        ("data/train.jsonl", "no such local path or registered dataset"),
        ("file:///no/such/folder", "no such file or folder"),
        ("nosuch://bucket/a.jsonl", "s3://, oss://, gs:// and file:// are known"),
    ],
)
def test_unknown_dataset(text: str, expected: str) -> None:
    message = refusal(text)
    assert text in message
    assert expected in message
    assert "\n" not in message


def test_rules_come_from_the_arguments(tmp_path: Path) -> None:
    args = arguments(columns={"a": "query"}, model_name=["甲", "A"], model_author=["B"])
    rules = resolve_dataset_files(touch(tmp_path / "x.jsonl"), args).rules
    assert (rules.columns, rules.model_name, rules.model_author) == ({"a": "query"}, ("甲", "A"), ("B",))


def test_the_data_that_ships_is_registered() -> None:
    for name in ("identity", "identity#5"):
        resolved = resolve_dataset_files(name, arguments())
        assert [Path(path).name for path in resolved.files] == ["identity.json"]
    assert resolved.spec.num_samples == 5


def custom(tmp_path: Path) -> str:
    touch(tmp_path / "data" / "mine.jsonl")
    entries = [
        {
            "dataset_name": "mine",
            "dataset_path": "data/mine.jsonl",
            "columns": {"frage": "query", "antwort": "response"},
            "subsets": ["default", {"subset": "swapped", "columns": {"antwort": "query", "frage": "response"}}],
            "tags": ["qa"],
            "help": "ignored",
        },
        {"ms_dataset_id": "org/hub-only", "subsets": ["a", {"name": "b", "subset": "b2"}]},
    ]
    return touch(tmp_path / "info.json", json.dumps(entries))


def test_custom_dataset_info(tmp_path: Path) -> None:
    args = arguments(custom_dataset_info=[custom(tmp_path)])
    resolved = resolve_dataset_files("mine#3", args)
    assert resolved.files == [str(tmp_path / "data" / "mine.jsonl")]
    assert resolved.rules.columns == {"frage": "query", "antwort": "response"}
    assert resolved.spec.num_samples == 3
    swapped = resolve_dataset_files("mine:swapped", args).rules.columns
    assert swapped == {"antwort": "query", "frage": "response"}


def test_columns_flag_overrides_custom_dataset_info(tmp_path: Path) -> None:
    args = arguments(custom_dataset_info=[custom(tmp_path)], columns={"frage": "_"})
    assert resolve_dataset_files("mine", args).rules.columns == {"frage": "_", "antwort": "response"}


def test_custom_dataset_info_as_literal_json(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    touch(tmp_path / "x.jsonl")
    monkeypatch.chdir(tmp_path)
    literal = json.dumps({"dataset_name": "here", "dataset_path": "x.jsonl"})
    assert resolve_dataset_files("here", arguments(custom_dataset_info=[literal])).files == [str(tmp_path / "x.jsonl")]


def test_wrong_subset_and_near_miss_of_a_custom_name(tmp_path: Path) -> None:
    info = [custom(tmp_path)]
    assert refusal("mine:nosuch", custom_dataset_info=info).endswith("no subset 'nosuch'; there are default, swapped")
    assert refusal("org/hub-only:c", custom_dataset_info=info).endswith("no subset 'c'; there are a, b")
    assert refusal("mime", custom_dataset_info=info).endswith("did you mean mine?")


def test_a_dataset_of_modelscope_alone_is_not_looked_for_elsewhere(tmp_path: Path) -> None:
    message = refusal("org/hub-only", custom_dataset_info=[custom(tmp_path)], use_hf=True)
    assert message.endswith("this dataset is on ModelScope only; leave out --use_hf true")


@pytest.mark.parametrize(
    ("text", "expected"), [('[\n{"dataset_name": }]', ":2: broken JSON"), (None, ": no such file")]
)
def test_broken_custom_dataset_info(tmp_path: Path, text: str | None, expected: str) -> None:
    path = tmp_path / "info.json"
    if text is not None:
        touch(path, text)
    assert refusal("mine", custom_dataset_info=[str(path)]).startswith(f"--custom_dataset_info {path}{expected}")

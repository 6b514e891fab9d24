"""What ``--dataset`` values mean: paths, registered names, subsets, ``#N``, and what is said about wrong ones."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from rayswift.arguments import Arguments, make_arguments
from rayswift.data import names as registry
from rayswift.data.files import iter_raw_rows
from rayswift.data.folders import list_data_files
from rayswift.data.names import DatasetSpec, parse_spec, register_dataset, resolve_dataset_files, resolve_datasets
from rayswift.data.rows.standard import Drop, standardise_rows
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
    names = ["b.jsonl", "a.json.gz", "deep/c.jsonl", "README.md", "dataset_info.json", ".hidden.jsonl", "d.jsonl.tmp"]
    for name in names:
        touch(tmp_path / name)
    found = [str(Path(path).relative_to(tmp_path)) for path in list_data_files(str(tmp_path))]
    assert found == ["a.json.gz", "b.jsonl", "deep/c.jsonl"]
    assert list_data_files(f"file://{tmp_path}") == [f"file://{tmp_path}/{name}" for name in found]


README = """---
configs:
- config_name: default
  data_files:
  - {split: train, path: data/a-*.jsonl}
  - {split: test, path: data/b.jsonl}
- config_name: hard
  data_files: hard.jsonl
---
"""
FOLDERS: list[tuple[str, str, str]] = [
    # files; what is asked (the folder, a subset of it, a split of its entry); files that are read, or what is said
    ("train.jsonl test.jsonl", "f", "train.jsonl"),
    ("train.jsonl test.jsonl dev.jsonl", "f:default", "train.jsonl"),
    ("data/train-0.parquet data/train-1.parquet data/validation-0.parquet", "f",
     "data/train-0.parquet data/train-1.parquet"),
    ("training/a.jsonl valid/a.jsonl testing/a.jsonl", "f", "training/a.jsonl"),
    ("rows.jsonl rows_eval.jsonl", "f", "rows.jsonl"),
    ("a.jsonl b/c.jsonl", "f", "a.jsonl b/c.jsonl"),
    ("zh/train.jsonl zh/test.jsonl en/train.jsonl", "f:zh", "zh/train.jsonl"),
    ("zh/train.jsonl zh/test.jsonl en/train.jsonl", "f:zh/en", "zh/train.jsonl en/train.jsonl"),
    ("zh/train.jsonl en/train.jsonl", "f:fr", "no subset 'fr'; there are en, zh"),
    ("README.md data/a-1.jsonl data/a-2.jsonl data/b.jsonl hard.jsonl", "f", "data/a-1.jsonl data/a-2.jsonl"),
    ("README.md data/a-1.jsonl data/b.jsonl hard.jsonl", "f:hard", "hard.jsonl"),
    ("train.jsonl test.jsonl validation.jsonl", "validation", "validation.jsonl"),
    ("train.jsonl test.jsonl validation.jsonl", "train validation", "train.jsonl validation.jsonl"),
    ("train.jsonl test.jsonl", "validation", "no split 'validation'; there are test, train"),
    # A folder of one split is asked for that split.
    ("test-0.jsonl test-1.jsonl", "f", "test-0.jsonl test-1.jsonl"),
    ("test.jsonl validation.jsonl", "f", "no split 'train'; there are test, validation"),
    # Hidden files and folders, and what is no data.
    ("a.jsonl .ipynb_checkpoints/a.jsonl .cache/b.jsonl .b.jsonl x/.git/c.jsonl", "f", "a.jsonl"),
    ("a.jsonl dataset_infos.json state.json requirements.txt", "f", "a.jsonl"),
    ("train.csv train.parquet train-1.parquet", "f", "train-1.parquet train.parquet"),
    ("train.tsv", "f", "train.tsv"),
    ("dataset_dict.json train/data-0-of-1.arrow train/state.json test/data-0-of-1.arrow", "f",
     "train/data-0-of-1.arrow"),
]  # fmt: skip


@pytest.mark.parametrize(("names", "asked", "expected"), FOLDERS)
@pytest.mark.parametrize("uri", [False, True])
def test_a_local_folder_is_read_as_a_repository_is(
    tmp_path: Path, names: str, asked: str, expected: str, uri: bool
) -> None:
    folder = tmp_path / "f"
    for name in names.split():
        touch(folder / name, README if name == "README.md" else '{"text": "a"}\n')
    name, _, subsets = asked.partition(":")
    given: dict[str, Any] = {}
    text = f"{folder}:{subsets}" if subsets else str(folder)
    if name != "f":
        given["custom_dataset_info"] = [json.dumps({"dataset_path": str(folder), "split": asked.split()})]
    elif uri and not subsets:
        text = f"file://{folder}"
    if expected.startswith("no s"):
        assert refusal(text, **given).endswith(expected)
    else:
        found = [path.partition(f"{folder}/")[2] for path in resolve_dataset_files(text, arguments(**given)).files]
        assert found == expected.split()


def test_an_entry_applies_to_its_path_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    args = arguments(custom_dataset_info=[custom(tmp_path)])
    monkeypatch.chdir(tmp_path)
    for path in ("data/mine.jsonl", "./data/mine.jsonl#3", str(tmp_path / "data" / "mine.jsonl")):
        resolved = resolve_dataset_files(path, args)
        assert resolved.rules.columns == {"frage": "query", "antwort": "response"}
        assert [Path(file).name for file in resolved.files] == ["mine.jsonl"]
    swapped = resolve_dataset_files("data/mine.jsonl:swapped", args)
    assert swapped.rules.columns == {"antwort": "query", "frage": "response"}
    touch(tmp_path / "other.jsonl")
    assert refusal("other.jsonl:zh").endswith("is a file, and has no subsets or splits; give it alone")


def test_the_files_that_are_read_are_said(tmp_path: Path) -> None:
    for number in range(7):
        touch(tmp_path / "f" / f"{number}.jsonl")
    said = resolve_dataset_files(str(tmp_path / "f"), arguments()).describe()
    files = ", ".join(str(tmp_path / "f" / f"{number}.jsonl") for number in range(5))
    assert said == f"dataset {tmp_path}/f: 7 files: {files} and 2 more"


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("identity", True),
        ("swift/self-cognition", True),
        ("self-cognition:qwen3", True),
        ("my_self_cognition.jsonl", True),
        ("Identity.json", True),
        ("identity/code.jsonl", False),
        ("jinja.jsonl", False),
        ("AI-ModelScope/alpaca-gpt4-data-zh", False),
    ],
)
def test_placeholders_are_filled_in_self_cognition_data_alone(
    name: str, expected: bool, tmp_path: Path, downloads: list[Any], caplog: pytest.LogCaptureFixture
) -> None:
    text = name if "." not in name else touch(tmp_path / name)
    args = arguments(model_name=["Bee"], model_author=["Hive"])
    args.dataset = [text]
    (resolved,) = resolve_datasets(args).train
    assert resolved.rules.self_cognition is expected
    assert ("no dataset is named self-cognition or identity" in caplog.text) is not expected


@pytest.mark.parametrize("name", ["", "notes.md"])
def test_a_path_without_data(tmp_path: Path, name: str) -> None:
    touch(tmp_path / "notes.md")
    path = str(tmp_path / name)
    assert (
        refusal(path)
        == f"--dataset {path}: no data file there (.jsonl .json .csv .tsv .txt .parquet .arrow, plain, .gz or .zst)"
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
    message = refusal("org/hub-only:a", custom_dataset_info=[custom(tmp_path)], use_hf=True)
    assert message.endswith("this dataset is on ModelScope only; leave out --use_hf true")


@pytest.mark.parametrize(
    ("text", "expected"), [('[\n{"dataset_name": }]', ":2: broken JSON"), (None, ": no such file")]
)
def test_broken_custom_dataset_info(tmp_path: Path, text: str | None, expected: str) -> None:
    path = tmp_path / "info.json"
    if text is not None:
        touch(path, text)
    assert refusal("mine", custom_dataset_info=[str(path)]).startswith(f"--custom_dataset_info {path}{expected}")


@pytest.mark.parametrize(
    ("entry", "expected"),
    [
        ({"dataset_path": "x.jsonl", "colums": {}}, "entry 1: no key 'colums'; did you mean columns?"),
        ({"dataset_name": "x"}, "entry 1: no ms_dataset_id, hf_dataset_id or dataset_path says where the data is"),
        ({"dataset_path": "x.jsonl", "columns": ["a"]}, "entry 1: columns is not an object of names"),
        ({"dataset_path": "x.jsonl", "subsets": [{"subset": "a", "splits": []}]}, "subset: no key 'splits'"),
        ({"dataset_path": "x.jsonl", "messages": {"role": "who"}}, "messages: no key 'role'; did you mean role_key?"),
        ({"dataset_path": "x.jsonl", "preprocess": "f"}, "preprocess is a function, which only register_dataset"),
        ("x.jsonl", "entry 1: not an object"),
    ],
)
def test_a_wrong_entry_is_named(entry: Any, expected: str) -> None:
    assert expected in refusal("x", custom_dataset_info=[json.dumps([entry])])


def test_messages_settings_of_an_entry(tmp_path: Path) -> None:
    turns = [{"who": "student", "said": "u"}, {"who": "teacher", "said": "a"}]
    touch(tmp_path / "x.jsonl", json.dumps({"messages": turns}))
    names = {"role_key": "who", "content_key": "said", "user_role": "student", "assistant_role": "teacher"}
    entry = {"dataset_name": "school", "dataset_path": "x.jsonl", "messages": names}
    info = touch(tmp_path / "info.json", json.dumps([entry]))
    assert texts_of("school", custom_dataset_info=[info]) == [["u", "a"]]


def texts_of(text: str, **given: Any) -> list[Any]:
    """The texts of every row of a dataset, or the reason it was dropped."""
    resolved = resolve_dataset_files(text, arguments(**given))
    found = [row for raw, _, _ in iter_raw_rows(resolved.files) for row in standardise_rows(raw, resolved.rules)]
    return [row.reason if isinstance(row, Drop) else [m["content"] for m in row["messages"]] for row in found]


def test_names_are_looked_up_in_the_order_of_swift(tmp_path: Path) -> None:
    """A dataset's own name, then ids, then the last part of an id, whichever entry comes first."""
    for name in ("own", "id", "last"):
        touch(tmp_path / f"{name}.jsonl", json.dumps({"text": name}))
    entries = [
        {"ms_dataset_id": "org/x", "dataset_path": "last.jsonl"},
        {"ms_dataset_id": "x", "dataset_path": "id.jsonl"},
        {"dataset_name": "x", "dataset_path": "own.jsonl"},
    ]
    for count, expected in ((3, "own"), (2, "id"), (1, "last")):
        info = touch(tmp_path / f"info{count}.json", json.dumps(entries[:count]))
        assert texts_of("x", custom_dataset_info=[info]) == [[expected]]


@pytest.fixture
def downloads(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """What is asked of the hub: (id, use_hf, subset, split)."""
    asked = []

    def resolve(dataset_id: str, *, use_hf: bool, subset: str | None, split: str, token: str | None) -> list[str]:
        asked.append((dataset_id, use_hf, subset, split))
        return [f"{dataset_id}/{subset}/{split}.jsonl"]

    monkeypatch.setattr("rayswift.hub.resolve_dataset", resolve)
    return asked


@pytest.mark.parametrize(
    ("text", "use_hf", "expected"),
    [
        ("chinese-c4", False, [("swift/chinese-c4", False, None, "train")]),
        ("chinese-c4", True, [("shjwudp/chinese-c4", True, None, "train")]),
        ("HF::swift/chinese-c4", False, [("shjwudp/chinese-c4", True, None, "train")]),
        ("swift/self-cognition:qwen3#2", False, [("swift/self-cognition", False, None, "train")]),
        (
            "hh-rlhf:helpful-base",
            False,
            [("AI-ModelScope/hh-rlhf", False, "helpful-base", s) for s in ("train", "test")],
        ),
        ("org/unknown:a/b", True, [("org/unknown", True, s, "train") for s in ("a", "b")]),
        ("swift/medical_zh:en", False, [("swift/medical_zh", False, "en", s) for s in ("train", "val", "test")]),
        (
            "swift/Infinity-Instruct:3M/Gen",
            False,
            [("swift/Infinity-Instruct", False, s, "train") for s in ("3M", "Gen")],
        ),
        (
            "swift/Infinity-Instruct:all",
            False,
            [("swift/Infinity-Instruct", False, s, "train") for s in ("3M", "7M", "0625", "Gen", "7M_domains")],
        ),
        ("gsm8k", False, [("modelscope/gsm8k", False, "main", "train")]),
    ],
)
def test_what_is_downloaded(downloads: list[Any], text: str, use_hf: bool, expected: list[Any]) -> None:
    resolve_dataset_files(text, arguments(use_hf=use_hf))
    assert downloads == expected


@pytest.mark.parametrize(
    ("text", "use_hf", "expected"),
    [
        ("swift/medical_zh", False, "choose a subset: swift/medical_zh:en, swift/medical_zh:zh"),
        ("swift/medical_zh:en/zh", False, "give each by itself: swift/medical_zh:en swift/medical_zh:zh"),
        ("fineweb", False, "this dataset is on Hugging Face only; add --use_hf true"),
        ("iic/ms_agent", True, "this dataset is on ModelScope only; leave out --use_hf true"),
    ],
)
def test_what_is_refused_before_a_download(downloads: list[Any], text: str, use_hf: bool, expected: str) -> None:
    assert refusal(text, use_hf=use_hf).endswith(expected)
    assert downloads == []


THINK = "<think>\n\n</think>\n\n"


@pytest.mark.parametrize(
    ("text", "row", "expected"),
    [
        (
            "alpaca-gpt4-data-zh",
            {"instruction": "翻译", "input": "输入：你好", "output": "hello"},
            ["翻译\n你好", "hello"],
        ),
        (
            "alpaca-gpt4-data-en",
            {"instruction": "i", "input": "", "output": "o", "text": "Below is an instruction i o"},
            ["i", "o"],
        ),
        ("chinese-c4", {"url": "u", "date_download": "d", "text": "网页"}, ["网页"]),
        (
            "shareAI-Llama3-DPO-zh-en-emoji",
            {"question": "❤\ufe0f?", "answer_zh": "是❤\ufe0f", "answer_en": "yes", "prompt": None},
            ["❤?", "是❤"],
        ),
        ("self-cognition", {"query": "你是？", "response": "我是{{NAME}}", "tag": "zh"}, ["你是？", "我是小黄"]),
        (
            "self-cognition:qwen3",
            {"query": "who?", "response": "{{NAME}}", "tag": "en"},
            ["who? /no_think", f"{THINK}Bee"],
        ),
        ("self-cognition:empty_think", {"query": "who?", "response": "{{NAME}}", "tag": "en"}, ["who?", f"{THINK}Bee"]),
        ("databricks-dolly-15k", {"instruction": "i", "context": "c", "response": "r"},
         ["Here gives some useful information:\nc\ni", "r"]),
        ("LongAlpaca-12k", {"instruction": "i", "input": "", "output": "Answer:  o ", "file": "f"}, ["i", "o"]),
        (
            "hh-rlhf:helpful-base",
            {"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "\n\nHuman: a\n\nAssistant: c"},
            ["a", "b"],
        ),
        (
            "xlam-function-calling-60k",
            {"id": 1, "query": "q", "answers": '[{"name": "f", "arguments": {"x": 1}}]', "tools": "[]"},
            ["q", '{"name": "f", "arguments": {"x": 1}}'],
        ),
        (
            "sql-create-context",
            {"question": "how many?", "context": "CREATE TABLE t", "answer": "SELECT 1"},
            ["how many?\nCREATE TABLE t", "SELECT 1"],
        ),
    ],
)  # fmt: skip
def test_special_rules_of_known_datasets(downloads: list[Any], text: str, row: Any, expected: list[str]) -> None:
    rules = resolve_dataset_files(text, arguments(model_name=["小黄", "Bee"], model_author=["蜂", "Hive"])).rules
    (found,) = standardise_rows(row, rules)
    assert isinstance(found, dict), found
    assert [message["content"] for message in found["messages"]] == expected


def test_known_preference_datasets_keep_the_rejected_side(downloads: list[Any]) -> None:
    rules = resolve_dataset_files("shareAI-Llama3-DPO-zh-en-emoji", arguments()).rules
    (found,) = standardise_rows({"question": "q", "answer_zh": "好", "answer_en": "yes\ufe0f"}, rules)
    assert isinstance(found, dict)
    assert found["rejected_response"] == "yes"
    rules = resolve_dataset_files("orpo-dpo-mix-40k", arguments()).rules
    chosen, rejected = ([{"role": "user", "content": "q"}, {"role": "assistant", "content": c}] for c in "ab")
    row = {"chosen": chosen, "rejected": rejected, "source": "x", "prompt": "q", "question": "q"}
    assert standardise_rows(row, rules) == [{"messages": chosen, "rejected_messages": rejected}]
    (dropped,) = standardise_rows({**row, "source": "toxic-dpo-v0.2"}, rules)
    assert dropped == Drop("the dataset's preprocess function returned None")


PLUGIN = """
from functools import partial

from rayswift.data.names import register_dataset

PREFIX = "Q: "


def repeat(row, times):
    if row["frage"] == "leave me out":
        return None
    return [{"query": PREFIX + row["frage"], "response": str(n)} for n in range(times)]


register_dataset("plugged", dataset_path="DATA", columns={"Frage": "frage"}, preprocess=partial(repeat, times=2))
register_dataset("shouting", dataset_path="DATA", preprocess=lambda row: {"text": row["Frage"].upper()})
"""


@pytest.fixture
def plugin(tmp_path: Path) -> str:
    rows = [{"Frage": "one"}, {"Frage": "leave me out"}, {"Other": "two"}]
    data = touch(tmp_path / "data.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    return touch(tmp_path / "my_plugin.py", PLUGIN.replace("DATA", data))


def test_external_plugins_register_datasets(plugin: str) -> None:
    none, failed = "preprocess function returned None", "preprocess function failed: KeyError: 'frage'"
    found = texts_of("plugged", external_plugins=[plugin])
    assert found[:2] == [["Q: one", "0"], ["Q: one", "1"]]
    assert [reason.removeprefix("the dataset's ") for reason in found[2:]] == [none, failed]
    assert texts_of("shouting#1", external_plugins=[plugin])[0] == ["ONE"]
    assert refusal("pluged", external_plugins=[plugin]).endswith("did you mean plugged?")


def test_plugin_functions_run_in_processes_that_never_saw_the_file(plugin: str) -> None:
    """As a Ray task on another node does: nothing but the pickled rules arrives."""
    rules = resolve_dataset_files("plugged", arguments(external_plugins=[plugin])).rules
    Path(plugin).unlink()
    code = (
        "import pickle, sys; from rayswift.data.rows.standard import standardise_rows;"
        "rules = pickle.loads(sys.stdin.buffer.read());"
        "print([row['messages'][0]['content'] for row in standardise_rows({'Frage': 'x'}, rules)])"
    )
    done = subprocess.run([sys.executable, "-c", code], input=pickle.dumps(rules), capture_output=True, check=True)
    assert done.stdout.decode().strip() == "['Q: x', 'Q: x']"


def test_functions_of_a_script_travel_by_value(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from ray import cloudpickle

    monkeypatch.setattr(registry, "_SCRIPT_ENTRIES", [])
    suffix = "!"
    for mark in ("!", "?"):
        register_dataset(f"scripted{mark}", dataset_path=touch(tmp_path / "x.jsonl"),
                         preprocess=lambda row, mark=mark: {"text": row["text"] + suffix + mark})  # fmt: skip
    rules = {mark: resolve_dataset_files(f"scripted{mark}", arguments()).rules for mark in "!?"}
    arrived = cloudpickle.loads(cloudpickle.dumps(rules["!"]))
    (row,) = standardise_rows({"text": "a"}, arrived)
    assert isinstance(row, dict)
    assert row["messages"][0]["content"] == "a!!"
    # What is cached for a dataset is found again for the same code only.
    assert repr(arrived) == repr(rules["!"])
    assert repr(arrived) != repr(rules["?"])


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        (
            "x = 1\nimport no_such_module_anywhere\n",
            ":2: ModuleNotFoundError: No module named 'no_such_module_anywhere'",
        ),
        ("x = 1\n\nif x\n", ":3: expected ':'"),
        (
            "from rayswift.data.names import register_dataset\nregister_dataset('x')\n",
            "register_dataset: no ms_dataset_id",
        ),
    ],
)
def test_a_broken_plugin_is_named_with_its_line(tmp_path: Path, source: str, expected: str) -> None:
    path = touch(tmp_path / "broken.py", source)
    assert expected in refusal("x", external_plugins=[path])


def test_datasets_of_vectors_classes_and_ranks_are_known() -> None:
    from rayswift.data.builtin.recipes import reranking, sentence_label, stsb, stsb_alike, stsb_regression

    pair = {"sentence1": "a", "sentence2": "b", "score": 0.5}
    assert stsb(pair) == {
        "messages": [{"role": "user", "content": "a"}],
        "positive_messages": [[{"role": "user", "content": "b"}]],
        "label": 0.5,
    }
    assert stsb_alike(pair) is None and stsb_alike({**pair, "score": 0.75}) is not None
    assert stsb_regression(pair)["label"] == 0.5
    assert sentence_label({"sentence": "good", "label": 1.0}) == {"query": "good", "label": 1}
    row = reranking({"query": "q", "positive": ["p"], "negative": ["n", "m"]})
    assert [len(row[f"{side}_messages"]) for side in ("positive", "negative")] == [1, 2]
    found = {info.ms_dataset_id: [subset.name for subset in info.subsets] for info in registry._builtin()}
    assert found["sentence-transformers/stsb"] == ["default", "positive", "generate", "reg"]
    assert found["DAMO_NLP/jd"] == ["cls"]

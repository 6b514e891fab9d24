"""What is encoded once is not encoded again, and nothing stale is ever used."""

from __future__ import annotations

import importlib
import json
import os
import pickle
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from rayswift.arguments import make_arguments
from rayswift.data import files as sources
from rayswift.data.flow import encode_tasks, stage
from rayswift.data.flow.cache import TokenCache
from rayswift.data.flow.prepare import TrainData, load_train_data
from rayswift.data.names import resolve_dataset_files, resolve_datasets
from rayswift.data.plugins import ScriptFunction
from rayswift.data.rows.standard import RowRules, standardise_rows
from rayswift.data.tokens.encoder import Encoder
from rayswift.data.tokens.table import TokenRows
from rayswift.errors import UserError


@pytest.fixture
def encoder(smollm2_dir: str) -> Encoder:
    return Encoder(smollm2_dir)


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    folder = tmp_path / "dataset"
    folder.mkdir()
    for name in "ab":
        rows = [{"query": f"What is {name}{n}?", "response": f"It is {n}."} for n in range(30)]
        rows[3]["response"] = 7  # type: ignore[assignment]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture
def root(tmp_path: Path) -> str:
    return str(tmp_path / "cache")


def load(dataset: Path | str, encoder: Encoder, root: str, **given: Any) -> TrainData:
    args = make_arguments("sft", model="m/m", dataset=[str(dataset)], **given)
    cache = TokenCache(root, args.load_from_cache_file)
    return load_train_data(args, resolve_datasets(args), encoder, lambda *_: None, cache)


def contents(data: TrainData) -> list[list[int]]:
    assert data.train is not None
    rows = TokenRows(data.train)
    return [rows[number].input_ids.tolist() for number in range(len(rows))]


class Counter:
    """Counts what is read and encoded in this process."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.read = self.encoded = 0
        iter_rows, encode_rows = stage.iter_rows, stage.encode_rows

        def counted_rows(chunk: Any) -> Any:
            for row in iter_rows(chunk):
                self.read += 1
                yield row

        def counted_encode(rows: Any, *rest: Any) -> Any:
            self.encoded += len(rows)
            return encode_rows(rows, *rest)

        monkeypatch.setattr(stage, "iter_rows", counted_rows)
        monkeypatch.setattr(encode_tasks, "encode_rows", counted_encode)

    def take(self) -> tuple[int, int]:
        found = self.read, self.encoded
        self.read = self.encoded = 0
        return found


@pytest.fixture
def counter(monkeypatch: pytest.MonkeyPatch) -> Counter:
    return Counter(monkeypatch)


def test_an_unchanged_dataset_is_neither_read_nor_encoded_again(
    dataset: Path, encoder: Encoder, root: str, counter: Counter
) -> None:
    first = load(dataset, encoder, root)
    usable = 60 - sum(first.drops.counts.values())
    assert counter.take() == (60, usable)
    again = load(dataset, encoder, root)
    assert counter.take() == (0, 0)
    assert contents(again) == contents(first)
    assert again.val_rows == first.val_rows
    assert (again.drops.rows_in, again.drops.lines()) == (first.drops.rows_in, first.drops.lines())
    # Another seed, split and number of samples take other rows of the same entries.
    load(dataset, encoder, root, data_seed=7, split_dataset_ratio=0.5)
    assert counter.take() == (0, 0)


def test_a_moved_file_is_known_and_a_changed_one_is_not(
    dataset: Path, encoder: Encoder, root: str, counter: Counter, tmp_path: Path
) -> None:
    load(dataset, encoder, root)
    counter.take()
    moved = tmp_path / "moved"
    shutil.move(dataset, moved)
    os.utime(moved / "a.jsonl", (1, 1))
    load(moved, encoder, root)
    assert counter.take() == (0, 0)
    # The same size, and its old time put back.
    text = (moved / "a.jsonl").read_text()
    (moved / "a.jsonl").write_text(text.replace("It is 5.", "It is 6."))
    os.utime(moved / "a.jsonl", (1, 1))
    changed = load(moved, encoder, root)
    assert counter.take()[0] == 30
    assert any("It is 6." in encoder.tokenizer.decode(ids) for ids in contents(changed))


def test_other_settings_encode_the_rows_that_were_read(
    dataset: Path, encoder: Encoder, root: str, counter: Counter
) -> None:
    load(dataset, encoder, root)
    counter.take()
    load(dataset, Encoder(encoder.model_dir, system="Be brief."), root)
    read, encoded = counter.take()
    assert read == 0
    assert encoded > 50


def test_load_from_cache_file_false_makes_everything_anew(
    dataset: Path, encoder: Encoder, root: str, counter: Counter
) -> None:
    first = load(dataset, encoder, root)
    counted = counter.take()
    again = load(dataset, encoder, root, load_from_cache_file=False)
    assert counter.take() == counted
    assert contents(again) == contents(first)


def test_number_of_samples_encodes_no_more_than_that(
    dataset: Path, encoder: Encoder, root: str, counter: Counter
) -> None:
    some = load(f"{dataset}#10", encoder, root, split_dataset_ratio=0)
    assert counter.take() == (60, 10)
    again = load(f"{dataset}#10", encoder, root, split_dataset_ratio=0)
    assert counter.take() == (0, 0)
    assert contents(again) == contents(some)


@pytest.mark.parametrize("left", [".json", ".arrow"])
def test_a_half_written_entry_is_made_anew(
    left: str, dataset: Path, encoder: Encoder, root: str, counter: Counter
) -> None:
    first = load(dataset, encoder, root)
    counter.take()
    for summary in Path(root).rglob("*.json"):
        if "rows" in json.loads(summary.read_text()):
            summary.unlink() if left == ".arrow" else summary.write_text("{")
    assert contents(load(dataset, encoder, root)) == contents(first)
    assert counter.take()[0] == 60


@pytest.mark.parametrize("harm", ["a flipped bit", "cut", "empty", "gone"])
@pytest.mark.parametrize("column", ["row", "input_ids"])
def test_an_entry_that_came_to_harm_is_made_anew(
    harm: str, column: str, dataset: Path, encoder: Encoder, root: str
) -> None:
    before = contents(load(dataset, encoder, root))
    harmed = [path for path in Path(root).rglob("*.arrow") if column in pa.ipc.open_file(str(path)).schema.names]
    assert len(harmed) == 2
    for path in harmed:
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        path.unlink()
        if harm != "gone":
            path.write_bytes({"cut": data[:-20], "empty": b""}.get(harm, data))
    assert contents(load(dataset, encoder, root)) == before


def test_a_full_disk_names_the_cache(dataset: Path, encoder: Encoder, tmp_path: Path) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    load(dataset, encoder, str(tmp_path / "small"))  # what is imported on the way is compiled
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))  # as a full disk: a write fails in the middle
    try:
        with pytest.raises(UserError, match=r"^the token cache \S*/full: .* RAYSWIFT_CACHE names another folder"):
            load(dataset, encoder, str(tmp_path / "full"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert contents(load(dataset, encoder, str(tmp_path / "full")))


def test_a_cache_in_storage_is_the_same(dataset: Path, encoder: Encoder, root: str, tmp_path: Path) -> None:
    stored = load(dataset, encoder, f"file://{tmp_path}/storage")
    assert contents(stored) == contents(load(dataset, encoder, root))


def test_large_datasets_go_through_ray_data_to_the_same_rows(
    ray_cluster: None,
    dataset: Path,
    encoder: Encoder,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    counter: Counter,
) -> None:
    here = load(dataset, encoder, str(tmp_path / "here"), dataset_shuffle=False)
    assert counter.take()[0] == 60
    monkeypatch.setattr(encode_tasks, "RAY_DATA_START_BYTES", 0)
    monkeypatch.setattr(encode_tasks, "CPUS_HERE", 0)
    monkeypatch.setattr(sources, "CHUNK_BYTES", 700)
    there = load(dataset, encoder, str(tmp_path / "there"), dataset_shuffle=False)
    assert counter.take() == (0, 0)
    assert there.train is not None
    assert len(there.train.files) > 4
    assert contents(there) == contents(here)
    assert there.drops.lines() == here.drops.lines()
    # What stops a run says so in the words it has in this process.
    with (dataset / "b.jsonl").open("a") as file:
        file.write("{\n")
    with pytest.raises(UserError, match=r"^\S*b.jsonl:31: broken JSON"):
        load(dataset, encoder, str(tmp_path / "there"))


def test_other_cores_encode_the_same_and_the_loss_of_one_costs_nothing(
    ray_cluster: None, dataset: Path, encoder: Encoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = load(dataset, encoder, str(tmp_path / "here"), dataset_shuffle=False)
    monkeypatch.setattr(encode_tasks, "ACTOR_START_BYTES", 1)
    monkeypatch.setattr(encode_tasks, "most_cpus", lambda: 2)
    monkeypatch.setattr(sources, "CHUNK_BYTES", 100)
    made_here: list[Any] = []
    whole = encode_tasks.encode_chunk

    def after_the_actor(task: Any, *args: Any) -> dict[str, Any]:
        """Encodes here once the actor has made its first entry: however busy the machine, it gets its share."""
        deadline = time.monotonic() + 60
        while not list((tmp_path / "there").rglob("*.json")) and time.monotonic() < deadline:
            time.sleep(0.05)
        made_here.append(task)
        return whole(task, *args)

    monkeypatch.setattr(encode_tasks, "encode_chunk", after_the_actor)
    there = load(dataset, encoder, str(tmp_path / "there"), dataset_shuffle=False)
    shared = len(made_here)
    assert contents(there) == contents(here)
    assert there.drops.lines() == here.drops.lines()
    made_here.clear()
    die = type("Dies", (), {"__init__": lambda self, *_: os._exit(1), "encode": lambda self, task: None})
    monkeypatch.setattr(encode_tasks, "_ChunkEncoder", die)
    monkeypatch.setattr(encode_tasks, "encode_chunk", lambda *args: made_here.append(args[0]) or whole(*args))
    lost = load(dataset, encoder, str(tmp_path / "lost"), dataset_shuffle=False)
    made_keys = [task.key for task in made_here]
    assert 0 < shared < len(set(made_keys)) == len(made_keys)
    assert contents(lost) == contents(here)


@pytest.mark.parametrize(
    ("cpus", "chunks", "megabytes", "worth"),
    [(0, 100, 10**6, False), (4, 100, 10**6, False), (8, 100, 500, False), (8, 100, 600, True), (16, 100, 300, False),
     (16, 100, 400, True), (16, 1, 10**6, False)],
)  # fmt: skip
def test_a_small_dataset_or_machine_waits_for_no_other_process(
    cpus: int, chunks: int, megabytes: int, worth: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    size = megabytes * 2**20 // chunks
    tasks = [encode_tasks.EncodeTask(sources.Chunk("a.jsonl"), RowRules(), "key", size=size)] * chunks
    monkeypatch.setattr(encode_tasks, "most_cpus", lambda: float(cpus))
    monkeypatch.setattr("ray.is_initialized", lambda: True)
    assert encode_tasks._is_work_for_ray_data(tasks) is worth
    monkeypatch.setattr("ray.is_initialized", lambda: False)
    assert not encode_tasks._is_work_for_ray_data(tasks)


def test_a_cache_that_cannot_be_written(dataset: Path, encoder: Encoder, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="RAYSWIFT_CACHE names another folder"):
        load(dataset, encoder, str(tmp_path / "file" / "cache"))


def test_rules_that_have_seen_rows_are_the_same_rules() -> None:
    """Else a second process finds nothing in the cache, and a checkpoint's data is never the data of a new driver."""
    from rayswift.data.flow.cache import rules_hash
    from rayswift.data.rows.standard import RowRules, standardise_rows

    rules = RowRules()
    before = rules_hash(rules)
    raw = [
        {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}], "extra": 1},
        {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
        {"instruction": "q", "input": "", "output": "a"},
    ]
    assert all(list(standardise_rows(row, rules)) for row in raw)
    assert rules_hash(rules) == before


PLUGIN = """
from rayswift.data.names import register_dataset

def preprocess(row):
    import tidy.text  # noqa: only when it is called
    return tidy.text.tidy(row)

register_dataset("tidied", dataset_path="DATA", preprocess=preprocess)
"""


def write_plugin(folder: Path, data: Path, mark: str) -> str:
    """A plugin with a package beside it; ``mark`` stands in the module that the package imports."""
    (folder / "tidy").mkdir(parents=True, exist_ok=True)
    (folder / "tidy" / "__init__.py").write_text("")
    (folder / "tidy" / "text.py").write_text(
        "import importlib\n"
        "marks = importlib.import_module('marks')\n"
        "def tidy(row):\n"
        "    return {'query': row['query'], 'response': str(row['response']) + marks.MARK}\n"
    )
    (folder / "marks.py").write_text(f"MARK = {mark!r}\n")
    (folder / "unrelated.py").write_text(f"'{mark}'\n")
    (folder / "plugin.py").write_text(PLUGIN.replace("DATA", str(data)))
    return str(folder / "plugin.py")


def test_rows_are_made_anew_when_a_module_of_a_plugin_has_changed(
    dataset: Path, encoder: Encoder, root: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    counter = Counter(monkeypatch)

    def trained(mark: str) -> str:
        plugin = write_plugin(tmp_path / "plugins", dataset / "a.jsonl", mark)
        args = make_arguments("sft", model="m/m", dataset=["tidied"], external_plugins=[plugin])
        data = load_train_data(args, resolve_datasets(args), encoder, lambda *_: None, TokenCache(root))
        return encoder.tokenizer.decode(contents(data)[0])

    assert "It is 0.one" in trained("one")
    counter.take()
    assert "one" in trained("one")
    assert counter.take() == (0, 0)
    assert "two" in trained("two")
    assert counter.take()[0] == 30


def test_the_modules_of_a_plugin_travel_with_it(dataset: Path, tmp_path: Path) -> None:
    """As to another node, where the folder is not."""
    plugin = write_plugin(tmp_path / "plugins", dataset / "a.jsonl", "far")
    args = make_arguments("sft", model="m/m", dataset=["tidied"], external_plugins=[plugin])
    rules = resolve_dataset_files("tidied", args).rules
    shutil.rmtree(tmp_path / "plugins")
    code = (
        "import pickle, sys; from rayswift.data.rows.standard import standardise_rows;"
        "rules = pickle.loads(sys.stdin.buffer.read());"
        "rows = standardise_rows({'query': 'q', 'response': 'r'}, rules);"
        "print([row['messages'][1]['content'] for row in rows])"
    )
    done = subprocess.run([sys.executable, "-c", code], input=pickle.dumps(rules), capture_output=True, check=True)
    assert done.stdout.decode().strip() == "['rfar']"


def test_two_plugins_may_have_modules_of_one_name(dataset: Path, tmp_path: Path) -> None:
    found = []
    for name in ("one", "two"):
        plugin = write_plugin(tmp_path / name, dataset / "a.jsonl", name)
        args = make_arguments("sft", model="m/m", dataset=["tidied"], external_plugins=[plugin])
        (row,) = standardise_rows({"query": "q", "response": "r"}, resolve_dataset_files("tidied", args).rules)
        found.append(row["messages"][1]["content"])
    assert found == ["rone", "rtwo"]


def test_a_function_of_a_script_counts_with_the_modules_beside_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "cleaning_of_the_test.py").write_text("import marks_of_the_test\ndef clean(row):\n    return row\n")
    (tmp_path / "marks_of_the_test.py").write_text("MARK = 1\n")
    clean = importlib.import_module("cleaning_of_the_test").clean
    before = repr(ScriptFunction(clean))
    assert repr(ScriptFunction(clean)) == before
    (tmp_path / "marks_of_the_test.py").write_text("MARK = 2\n")
    assert repr(ScriptFunction(clean)) != before

"""The data path: files to token rows through the cache, in this process and on a real Ray Data, and streamed."""

from __future__ import annotations

import dataclasses
import gzip
import itertools
import json
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from rayswift.arguments import Arguments, make_arguments
from rayswift.data import files as sources
from rayswift.data.flow import plan as planning
from rayswift.data.flow.plan import StreamMix, StreamPlan, plan_stream, plan_streams
from rayswift.data.flow.prepare import TrainData, first_usable_row, load_train_data
from rayswift.data.flow.stream import read_stream, start_stream_readers, stream_tokens, task_tokens
from rayswift.data.names import resolve_datasets
from rayswift.data.tokens.encoder import Encoder
from rayswift.data.tokens.row_index import LazyRows, RowIndex, blend, interleave, sample_rows, split_rows
from rayswift.data.tokens.table import LazyItems, StreamPosition, TokenRows
from rayswift.errors import UserError
from rayswift.train.events import start_event_queue

GSM8K = Path(__file__).resolve().parents[1] / "data" / "gsm8k_40.jsonl"


def arguments(dataset: str | Path | list[str], **given: Any) -> Arguments:
    names = dataset if isinstance(dataset, list) else [str(dataset)]
    return make_arguments("sft", model="org/model", dataset=names, **given)


def load(args: Arguments, encoder: Encoder) -> TrainData:
    return load_train_data(args, resolve_datasets(args), encoder, lambda stage, done: None)


def write(path: Path, rows: list[Any]) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def ids_of(rows: RowIndex | None) -> list[list[int]]:
    """What training reads, row by row."""
    assert rows is not None
    read = TokenRows(rows)
    ids = [read[number].input_ids.tolist() for number in range(len(read))]
    assert rows.lengths.tolist() == [len(row) for row in ids]
    return ids


def texts_of(rows: RowIndex | None, encoder: Encoder) -> list[str]:
    return encoder.tokenizer.batch_decode(ids_of(rows), skip_special_tokens=True)


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each test starts with nothing cached."""
    monkeypatch.setenv("RAYSWIFT_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def plain(family_dir: Callable[[str], str]) -> Encoder:
    """Pre-training: a text and eos."""
    return Encoder(family_dir("no_template"), use_chat_template=False, loss_scale="all")


@pytest.fixture(scope="module")
def chat(family_dir: Callable[[str], str]) -> Encoder:
    return Encoder(family_dir("llama3"))


def refusal(call: Callable[[], object]) -> str:
    with pytest.raises(UserError) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message
    return message


# --- arithmetic on row numbers ----------------------------------------------------------------------------------


def numbered(count: int) -> RowIndex:
    index = np.column_stack([np.zeros(count, np.int64), np.arange(count)])
    return RowIndex([], index, np.zeros(count, np.int64))


def rng() -> np.random.RandomState:
    return np.random.RandomState(42)


@pytest.mark.parametrize(
    ("rows", "ratio", "expected"),
    [(48818, 0.01, (48330, 488)), (100, 0.1, (90, 10)), (50, 0.01, (49, 1)), (2, 0.5, (1, 1)), (1, 0.5, (1, 0)),
     (10, 0.0, (10, 0))],
)  # fmt: skip
def test_split(rows: int, ratio: float, expected: tuple[int, int]) -> None:
    train, val = split_rows(numbered(rows), ratio, None, arguments("x"), rng())
    assert (len(train), len(val)) == expected
    assert sorted([*train.index[:, 1], *val.index[:, 1]]) == list(range(rows))


@pytest.mark.parametrize(
    ("wanted", "ratio", "expected"),
    [(25, 0.1, (24, 1)), (25, 0.3, (22, 3)), (5, 0.4, (3, 2)), (1, 0.5, (1, 0)), (10, 0.1, (9, 1))],
)
@pytest.mark.parametrize("shuffle", [True, False])
def test_rows_are_split_before_they_are_repeated(
    wanted: int, ratio: float, expected: tuple[int, int], shuffle: bool
) -> None:
    args = arguments("x", dataset_shuffle=shuffle)
    train, val = (rows.index[:, 1].tolist() for rows in split_rows(numbered(10), ratio, wanted, args, rng()))
    assert (len(train), len(val)) == expected
    assert not set(train) & set(val)
    counts = Counter(train)
    assert max(counts.values()) - min(counts.values()) <= 1  # whole repeats and a rest


@pytest.mark.parametrize(
    ("given", "held_out"),
    [
        ({}, 2),
        ({"eval_strategy": "no"}, 0),
        ({"save_strategy": "no"}, 0),
        ({"save_strategy": "no", "eval_strategy": "epoch"}, 2),
        ({"eval_strategy": "no", "eval_on_start": True}, 2),
    ],
)
def test_nothing_is_held_out_that_is_never_evaluated(
    given: dict[str, Any], held_out: int, plain: Encoder, tmp_path: Path
) -> None:
    path = write(tmp_path / "a.jsonl", [{"text": f"t{n}"} for n in range(20)])
    data = load(arguments(path, split_dataset_ratio=0.1, **given), plain)
    assert data.train is not None
    assert (len(data.train), len(data.val or ()), len(data.val_rows)) == (20 - held_out, held_out, held_out)


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("wanted", [1, 7, 20, 33, 60])
def test_number_of_samples(wanted: int, shuffle: bool) -> None:
    args = arguments("x", dataset_shuffle=shuffle)
    picked = sample_rows(numbered(20), wanted, args, rng()).index[:, 1].tolist()
    counts = Counter(picked)
    assert len(picked) == wanted
    # Whole repeats and a rest without replacement.
    assert {counts[n] for n in range(20)} <= {wanted // 20, wanted // 20 + 1}
    if not shuffle:
        assert picked == [n % 20 for n in range(wanted)]


def test_interleave_follows_the_probabilities_and_stops() -> None:
    first = interleave([1000, 1000], [0.7, 0.3], "first_exhausted", rng())
    taken = (first < 1000).sum(), (first >= 1000).sum()
    assert max(taken) == 1000
    assert taken[1] / len(first) == pytest.approx(0.3, abs=0.03)
    # Each dataset is read in its own order, none twice.
    assert first[first < 1000].tolist() == list(range(taken[0]))
    every = interleave([100, 10], [0.5, 0.5], "all_exhausted", rng())
    assert set(every) == set(range(110))
    assert Counter(every.tolist())[100] > 1


def test_a_dataset_with_probability_zero_is_not_waited_for() -> None:
    assert set(interleave([10, 10], [1.0, 0.0], "all_exhausted", rng())) == set(range(10))


def test_blend_without_shuffling_concatenates() -> None:
    parts = [numbered(3), RowIndex(["rows.arrow"], numbered(2).index, numbered(2).lengths)]
    assert len(blend(parts, arguments("x", dataset_shuffle=False), rng())) == 5


# --- materialised -----------------------------------------------------------------------------------------------


def test_the_split_of_the_specified_run(plain: Encoder, tmp_path: Path) -> None:
    """48,818 alpaca rows → 48,330 to train on and 488 to validate, none in both."""
    rows = [{"instruction": f"i{n}", "input": "", "output": f"o{n}"} for n in range(48818)]
    seen: dict[str, int] = {}
    args = arguments(write(tmp_path / "alpaca.jsonl", rows))
    data = load_train_data(args, resolve_datasets(args), plain, seen.__setitem__)
    assert data.val is not None
    assert (len(data.train), len(data.val), len(data.val_rows)) == (48330, 488, 488)
    assert (data.drops.rows_in, data.drops.lines()) == (48818, [])
    found = [tuple(ids) for part in (data.train, data.val) for ids in ids_of(part)]
    assert len(set(found)) == 48818
    assert seen[f"read {args.dataset[0]}"] == 48818


def test_rows_and_their_order_are_the_same_in_every_run(chat: Encoder, tmp_path: Path) -> None:
    rows = [json.loads(line) for line in GSM8K.read_text(encoding="utf-8").splitlines()]
    write(tmp_path / "a.jsonl", rows[:15])
    (tmp_path / "b.json").write_text(json.dumps(rows[15:]), encoding="utf-8")
    orders = []
    for _ in range(2):
        data = load(arguments(tmp_path, split_dataset_ratio=0.1), chat)
        orders.append((texts_of(data.train, chat), texts_of(data.val, chat)))
    assert orders[0] == orders[1]
    train, val = orders[0]
    assert (len(train), len(val)) == (36, 4)
    expected = [f"user\n\n{row['question']}assistant\n\n{row['answer']}" for row in rows]
    assert sorted(train + val) == sorted(expected)
    assert train != [text for text in expected if text in train]
    other = load(arguments(tmp_path, split_dataset_ratio=0.1, data_seed=7), chat)
    assert texts_of(other.train, chat) != train


def test_unshuffled_rows_keep_file_order_however_files_are_cut(
    plain: Encoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sources, "CHUNK_BYTES", 200)
    expected = [f"row {n}" for n in range(60)]
    write(tmp_path / "a.jsonl", [{"text": text} for text in expected[:40]])
    write(tmp_path / "b.jsonl", [{"text": text} for text in expected[40:]])
    data = load(arguments(tmp_path, dataset_shuffle=False, split_dataset_ratio=0), plain)
    assert texts_of(data.train, plain) == expected
    assert data.val is None
    assert data.val_rows == []


def test_number_of_samples_end_to_end(plain: Encoder, tmp_path: Path) -> None:
    small = write(tmp_path / "small.jsonl", [{"text": f"s{n}"} for n in range(4)])
    large = write(tmp_path / "large.jsonl", [{"text": f"l{n}"} for n in range(50)])
    data = load(arguments([f"{small}#10", f"{large}#6"], split_dataset_ratio=0), plain)
    counts = Counter(texts_of(data.train, plain))
    assert {counts[f"s{n}"] for n in range(4)} == {2, 3}
    assert sum(count for text, count in counts.items() if text.startswith("s")) == 10
    assert [count for text, count in counts.items() if text.startswith("l")] == [1] * 6


BAD_ROWS = [{"text": "fine"}, {"foo": "x"}, {"text": "x" * 400}, {"foo": "y"}, {"messages": []}, {"text": "also fine"}]


def test_dropped_rows_are_counted_by_reason_with_their_place(plain: Encoder, tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", BAD_ROWS)
    encoder = Encoder(plain.model_dir, use_chat_template=False, loss_scale="all", max_length=50)
    data = load(arguments(path, split_dataset_ratio=0, dataset_shuffle=False), encoder)
    assert texts_of(data.train, encoder) == ["fine", "also fine"]
    assert data.drops.rows_in == 6
    assert sorted(data.drops.lines()) == [
        f"1 rows dropped: longer than --max_length 50 (first at {path}:3)",
        f"1 rows dropped: the messages column is empty or not a list (first at {path}:5)",
        f"2 rows dropped: no column holds text (columns: foo); name it with --columns (first at {path}:2)",
    ]
    message = refusal(lambda: load(arguments(path, split_dataset_ratio=0, strict=True), encoder))
    assert message.startswith(f"{path}:2: no column holds text")
    assert "--strict true" in message


def test_files_that_stop_a_run(plain: Encoder, tmp_path: Path) -> None:
    broken = write(tmp_path / "broken.jsonl", [{"text": f"row {n}"} for n in range(40)])
    lines = Path(broken).read_text(encoding="utf-8").splitlines(keepends=True)
    lines[16] = '{"text": "row\n'
    Path(broken).write_text("".join(lines), encoding="utf-8")
    textless = write(tmp_path / "textless.jsonl", [{"foo": n} for n in range(3)])
    empty = write(tmp_path / "empty.jsonl", [])
    expected = {
        broken: f"{broken}:17: broken JSON: ",
        textless: f"--dataset {textless}: none of its 3 rows can be used: 3 rows dropped: no column holds text",
        empty: f"--dataset {empty}: none of its 0 rows can be used: it is empty",
    }
    for path, start in expected.items():
        assert refusal(lambda path=path: load(arguments(path), plain)).startswith(start)
    too_long = Encoder(plain.model_dir, use_chat_template=False, loss_scale="all", max_length=2)
    path = write(tmp_path / "long.jsonl", [{"text": "a long text"}] * 3)
    message = refusal(lambda: load(arguments(path, split_dataset_ratio=0), too_long))
    assert "no row is left to train on; " in message
    assert f"longer than --max_length 2 (first at {path}:1)" in message


def test_an_empty_file_beside_others_is_no_matter(plain: Encoder, tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", [])
    write(tmp_path / "b.jsonl", [{"text": "b"}])
    write(tmp_path / "c.jsonl", [{"foo": "c"}])
    data = load(arguments(tmp_path, split_dataset_ratio=0), plain)
    assert texts_of(data.train, plain) == ["b"]


def test_truncation_split_gives_the_pieces_of_a_row_in_order(plain: Encoder, tmp_path: Path) -> None:
    rows = [{"text": f"{n} " + " ".join(f"{n}{k}" for k in range(n * 7))} for n in range(1, 9)]
    args = arguments(write(tmp_path / "a.jsonl", rows), split_dataset_ratio=0, dataset_shuffle=False)
    cutting = Encoder(
        plain.model_dir, use_chat_template=False, loss_scale="all", max_length=20, truncation_strategy="split"
    )
    pieces = load(args, cutting)
    assert len(pieces.train) > len(rows)
    assert pieces.train.lengths.max() == 20
    assert "".join(texts_of(pieces.train, plain)) == "".join(row["text"] for row in rows)


def test_validation_rows_can_be_read_back(chat: Encoder, tmp_path: Path) -> None:
    """SWIFT 4.6 writes a val_dataset.jsonl that it cannot read itself."""
    data = load(arguments(GSM8K, split_dataset_ratio=0.2, system="You are careful."), chat)
    assert len(data.val_rows) == 8
    assert [message["role"] for message in data.val_rows[0]["messages"]] == ["user", "assistant"]
    written = write(tmp_path / "val_dataset.jsonl", data.val_rows)
    again = load(arguments(f"{GSM8K}#32", val_dataset=[written]), chat)
    assert texts_of(again.val, chat) == texts_of(data.val, chat)
    # --val_dataset given: nothing is split off.
    assert (len(again.train), again.val_rows) == (32, [])


def test_interleave_end_to_end(plain: Encoder, tmp_path: Path) -> None:
    names = [write(tmp_path / f"{name}.jsonl", [{"text": f"{name}{n}"} for n in range(200)]) for name in "ab"]
    args = arguments(names, interleave_prob=[0.8, 0.2], split_dataset_ratio=0)
    texts = texts_of(load(args, plain).train, plain)
    taken = [[text for text in texts if text[0] == name] for name in "ab"]
    assert taken[0] == [f"a{n}" for n in range(200)]
    assert taken[1] == [f"b{n}" for n in range(len(taken[1]))]
    assert 25 < len(taken[1]) < 80


def test_interleaving_by_tokens_gives_each_dataset_its_share_of_the_tokens(plain: Encoder, tmp_path: Path) -> None:
    short = write(tmp_path / "short.jsonl", [{"text": f"s{n}"} for n in range(2000)])
    long = write(tmp_path / "long.jsonl", [{"text": f"l{n}" + " and" * 40} for n in range(200)])
    shares = {}
    for by in ("rows", "tokens"):
        args = arguments([short, long], interleave_prob=[0.5, 0.5], interleave_by=by, split_dataset_ratio=0)
        lengths = load(args, plain).train.lengths
        shares[by] = lengths[lengths > 20].sum() / lengths.sum()
    assert shares["tokens"] == pytest.approx(0.5, abs=0.05)
    assert shares["rows"] > 0.8


def test_a_dataset_of_which_nothing_is_left_cannot_be_mixed(plain: Encoder, tmp_path: Path) -> None:
    good = write(tmp_path / "good.jsonl", [{"text": "a"}])
    long = write(tmp_path / "long.jsonl", [{"text": "a long text of many words"}])
    limited = Encoder(plain.model_dir, use_chat_template=False, loss_scale="all", max_length=4)
    args = arguments([good, long], interleave_prob=[0.5, 0.5], split_dataset_ratio=0)
    assert refusal(lambda: load(args, limited)) == (
        f"--dataset {long}: no row is left to mix in; 1 rows dropped: longer than --max_length 4 (first at {long}:1)"
    )


def test_lazy_rows_are_those_that_would_be_encoded_before(plain: Encoder, tmp_path: Path) -> None:
    rows = [{"text": f"{n} " + "and " * (n % 7)} for n in range(50)]
    path = write(tmp_path / "a.jsonl", rows)
    limited = Encoder(plain.model_dir, use_chat_template=False, loss_scale="all", max_length=8)
    eager = load(arguments(path, split_dataset_ratio=0.1), limited)
    lazy = load(arguments(path, split_dataset_ratio=0.1, lazy_tokenize=True), limited)
    assert isinstance(lazy.train, LazyRows)
    assert texts_of(lazy.val, limited) == texts_of(eager.val, limited)
    said: list[str] = []
    units = LazyItems(lazy.train, limited, said.append)
    samples = [row for unit in range(len(units)) for row in units[unit]]
    expected = TokenRows(eager.train)
    assert sorted(row.input_ids.tolist() for row in samples) == sorted(
        expected[number].input_ids.tolist() for number in range(len(expected))
    )
    # What an earlier encoding counts as dropped is said, with its place, when the row comes up.
    assert len(said) == len(units) - len(samples) > 0
    assert all(f"{path}:" in line and "longer than --max_length 8: the row trains nothing" in line for line in said)


def test_the_first_usable_row(tmp_path: Path) -> None:
    def first(*names: str, strict: bool = False) -> dict[str, Any]:
        return first_usable_row(resolve_datasets(arguments(list(names))).train, strict)

    good = write(tmp_path / "good.jsonl", [{"foo": 1}, {"text": "one"}, {"text": "two"}])
    other = write(tmp_path / "other.jsonl", [{"text": "three"}])
    bad = write(tmp_path / "bad.jsonl", [{"foo": 1}] * 3)
    empty = write(tmp_path / "empty.jsonl", [])
    assert first(good, other) == {"messages": [{"role": "assistant", "content": "one"}]}
    assert first(other, good)["messages"][0]["content"] == "three"
    assert refusal(lambda: first(good, strict=True)).startswith(f"{good}:1: no column holds text")
    message = refusal(lambda: first(good, bad))
    assert message.startswith(f"--dataset {bad}: no usable row: 3 rows dropped: no column holds text")
    assert refusal(lambda: first(empty)) == f"--dataset {empty}: no usable row: it is empty"


# --- streamed ---------------------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def few_epochs(monkeypatch: pytest.MonkeyPatch) -> None:
    """A plan of ten thousand epochs takes seconds."""
    monkeypatch.setattr(planning, "MAX_PLANNED_EPOCHS", 100)


@pytest.fixture
def stream_dir(tmp_path: Path) -> Path:
    """Three files of 20 rows, each row with its name."""
    for name in "abc":
        write(tmp_path / "stream" / f"{name}.jsonl", [{"text": f"{name}{n}"} for n in range(20)])
    return tmp_path / "stream"


def stream_plan(dataset: str | Path | list[str], **given: Any) -> StreamPlan:
    args = arguments(dataset, streaming=True, max_steps=10, **given)
    return plan_stream(args, resolve_datasets(args).train, args.packing_length)


def decoded(tables: Iterable[pa.Table], encoder: Encoder) -> list[str]:
    ids = [row for table in tables for row in table["input_ids"].to_pylist()]
    return encoder.tokenizer.batch_decode(ids, skip_special_tokens=True)


def epoch_texts(plan: StreamPlan, encoder: Encoder, epoch: int) -> list[str]:
    """The rows of one epoch in the order that the plan gives them."""
    tasks = tuple(tuple(entry for entry in task if entry[0] == epoch) for task in plan.tasks)
    alone = dataclasses.replace(plan, tasks=tasks)
    return decoded(
        (table for task in range(len(tasks)) for table in task_tokens(alone, task, 0, encoder, None)), encoder
    )


EVERY_ROW = sorted(f"{name}{n}" for name in "abc" for n in range(20))


def test_every_row_comes_once_per_epoch_and_each_epoch_in_its_own_order(plain: Encoder, stream_dir: Path) -> None:
    plan = stream_plan(stream_dir)
    epochs = [epoch_texts(plan, plain, epoch) for epoch in range(3)]
    assert [sorted(epoch) for epoch in epochs] == [EVERY_ROW] * 3
    assert epochs[0] != epochs[1] != epochs[2]
    assert all(epoch != EVERY_ROW for epoch in epochs)
    assert epoch_texts(stream_plan(stream_dir), plain, 1) == epochs[1]
    assert epoch_texts(stream_plan(stream_dir, data_seed=43), plain, 0) != epochs[0]


def test_an_unshuffled_stream_is_in_file_order(plain: Encoder, stream_dir: Path) -> None:
    plan = stream_plan(stream_dir, dataset_shuffle=False)
    expected = [f"{name}{n}" for name in "abc" for n in range(20)]
    assert epoch_texts(plan, plain, 0) == epoch_texts(plan, plain, 1) == expected


@pytest.mark.parametrize("buffer", [1, 7, 64, 1000])
def test_the_shuffle_buffer_loses_no_row(
    plain: Encoder, stream_dir: Path, buffer: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Small shards too: a dataset of many shards is shuffled shard by shard.
    monkeypatch.setattr(sources, "CHUNK_BYTES", 100)
    monkeypatch.setattr(planning, "SHARD_BYTES", 150)
    plan = stream_plan(stream_dir, shuffle_buffer_size=buffer)
    assert len(plan.shards) > 3
    assert sorted(epoch_texts(plan, plain, 0)) == EVERY_ROW


def test_number_of_samples_in_a_stream(plain: Encoder, stream_dir: Path) -> None:
    plan = stream_plan([f"{stream_dir}/a.jsonl#5", f"{stream_dir}/b.jsonl"])
    counts = Counter(text[0] for text in epoch_texts(plan, plain, 0))
    assert counts == {"a": 5, "b": 20}


def test_a_stream_through_ray_data_is_the_plan_exactly(
    ray_cluster: None, plain: Encoder, stream_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(planning, "SHARD_BYTES", 300)
    monkeypatch.setattr(planning, "MAX_PLANNED_TASKS", 5)
    plan = stream_plan(stream_dir)
    epochs = len({epoch for task in plan.tasks for epoch, _ in task})
    assert epochs >= 2
    expected = [text for epoch in range(epochs) for text in epoch_texts(plan, plain, epoch)]
    for skipped in (0, 5):  # from a place in the first task on, too
        dataset = stream_tokens(plan, plain, start=StreamPosition(0, skipped))
        assert decoded(dataset.iter_batches(batch_size=None, batch_format="pyarrow"), plain) == expected[skipped:]


def test_streams_are_read_side_by_side_by_every_worker_at_its_own_pace(
    ray_cluster: None, plain: Encoder, stream_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import ray

    monkeypatch.setattr(planning, "SHARD_BYTES", 300)
    monkeypatch.setattr(planning, "MAX_PLANNED_TASKS", 5)
    names = [f"{stream_dir}/{name}.jsonl" for name in "ab"]
    args = arguments(names, streaming=True, max_steps=10, interleave_prob=[0.5, 0.5])
    mix = plan_streams(args, resolve_datasets(args).train, None)
    # The second stream from a place in the middle on: nothing before it is read.
    start = (StreamPosition(), StreamPosition(1, 3))
    readers = start_stream_readers(mix, plain, None, start, num_workers=2)
    for plan, reader, place in zip(mix.plans, readers, start, strict=True):
        tables = [list(task_tokens(plan, task, 0, plain, None)) for task in range(len(plan.tasks))]
        before = sum(len(table) for task in tables[: place.task] for table in task)
        expected = decoded(itertools.chain(*tables), plain)[before + place.item :]
        slow, fast = read_stream(reader, 0), read_stream(reader, 1)
        first = next(slow)
        assert decoded(fast, plain) == expected
        assert decoded([first, *slow], plain) == expected
        ray.kill(reader)


def test_which_stream_gives_the_next_unit_is_a_function_of_its_number(tmp_path: Path) -> None:
    names = [write(tmp_path / f"{name}.jsonl", [{"text": name}]) for name in "abc"]
    args = arguments(names, streaming=True, max_steps=10, interleave_prob=[0.7, 0.0, 0.3])
    mix = plan_streams(args, resolve_datasets(args).train, None)
    assert [plan.shards[0].chunks[0].path for plan in mix.plans] == [names[0], names[2]]
    order = list(itertools.islice(mix.order(0), 5000))
    assert order.count(0) / 5000 == pytest.approx(0.7, abs=0.03)
    for first in (1, 1023, 1024, 3000):
        assert list(itertools.islice(mix.order(first), 100)) == order[first : first + 100]
    # Without --interleave_prob the datasets are one stream.
    together = arguments(names, streaming=True, max_steps=10)
    single = plan_streams(together, resolve_datasets(together).train, None)
    assert (len(single.plans), list(itertools.islice(single.order(7), 3))) == (1, [0, 0, 0])


@pytest.fixture(scope="module")
def drop_log() -> Any:
    """What readers tell of dropped rows."""
    return start_event_queue()


def test_a_stream_reads_on_behind_a_broken_line(drop_log: Any, plain: Encoder, tmp_path: Path) -> None:

    path = tmp_path / "a.jsonl.gz"
    lines = [json.dumps({"text": f"row {n}"}) for n in range(40)]
    lines[16] = '{"text": "row'
    path.write_bytes(gzip.compress("\n".join(lines).encode()))
    plan = dataclasses.replace(stream_plan(path), tasks=(((0, 0),),))
    texts = decoded(task_tokens(plan, 0, 0, plain, drop_log), plain)
    reported = [line for event in drop_log.ask("drain") for line in event["lines"]]
    assert sorted(texts) == sorted(f"row {n}" for n in range(40) if n != 16)
    assert len(reported) == 1
    assert reported[0].startswith("1 rows dropped: broken JSON: ")
    assert reported[0].endswith(f"(first at {path}:17)")


def test_what_stops_a_stream_reaches_the_worker(ray_cluster: None, plain: Encoder, tmp_path: Path) -> None:
    import ray

    path = write(tmp_path / "a.jsonl", BAD_ROWS)
    mix = StreamMix((stream_plan(path, strict=True),))
    (reader,) = start_stream_readers(mix, plain, None, mix.start(), num_workers=1)
    with pytest.raises(ray.exceptions.RayError, match="no column holds text"):
        list(read_stream(reader, 0))
    ray.kill(reader)


def test_rows_that_a_stream_drops_are_reported(drop_log: Any, plain: Encoder, tmp_path: Path) -> None:

    path = write(tmp_path / "a.jsonl", BAD_ROWS)
    encoder = Encoder(plain.model_dir, use_chat_template=False, loss_scale="all", max_length=50)
    one_epoch = dataclasses.replace(stream_plan(path), tasks=(((0, 0),),))
    tables = list(task_tokens(one_epoch, 0, 0, encoder, drop_log))
    assert sum(map(len, tables)) == 2
    reported = [line for event in drop_log.ask("drain") for line in event["lines"]]
    assert sorted(reported) == [
        f"1 rows dropped: longer than --max_length 50 (first at {path}:3)",
        f"1 rows dropped: the messages column is empty or not a list (first at {path}:5)",
        f"2 rows dropped: no column holds text (columns: foo); name it with --columns (first at {path}:2)",
    ]
    strict = stream_plan(path, strict=True)
    assert refusal(lambda: list(task_tokens(strict, 0, 0, encoder, None))).startswith(f"{path}:2: no column holds text")

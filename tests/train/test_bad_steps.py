"""Steps whose loss or gradients are no numbers train nothing; steps whose loss jumps are told; every worker's rows."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_trainer import Run, fast, row  # noqa: F401 (a fixture)

from rayswift.arguments import make_arguments
from rayswift.data.flow.cache import TokenCache
from rayswift.data.flow.plan import plan_streams
from rayswift.data.flow.prepare import load_train_data
from rayswift.data.flow.stream import task_tokens
from rayswift.data.names import resolve_datasets
from rayswift.data.tokens.encoder import Encoder
from rayswift.data.tokens.packing import pack
from rayswift.data.tokens.table import LazyItems, TrainItems, place_of
from rayswift.errors import RunFailedError
from rayswift.train.collate import Collator
from rayswift.train.loader import EpochLoader, Rank, StreamLoader
from rayswift.train.schedule import StepSchedule
from rayswift.train.trainers.spikes import Spikes

GOOD = [[[row(0)], [row(1)]], [[row(2)], [row(3)]], [[row(4)], [row(5)]]]
#: The second micro-batch of step 2 has no number for a loss.
BAD = [GOOD[0], [[row(2)], [row(3, scale=math.nan)]], GOOD[2]]


def weights(run: Run) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in run.trainer.model.state_dict().items()}


def told(run: Run) -> list[dict[str, Any]]:
    return [event for event in run.events if event["event"] == "bad_step"]


def spoil_gradients(step: int) -> Any:
    """Make one weight's gradient infinite at a step, whatever the loss is."""

    def prepare(trainer: Any) -> None:
        weight = trainer.model.model.layers[0].mlp.up_proj.weight
        weight.register_hook(lambda grad: grad * math.inf if trainer.state.global_step == step - 1 else grad)

    return prepare


@pytest.mark.parametrize("flags", [{}, {"optim": "adamw_torch", "weight_decay": 0.1, "learning_rate": 0.01}])
def test_a_step_that_is_left_out_changes_nothing(tmp_path: Path, flags: dict[str, Any]) -> None:
    without = Run(tmp_path, [GOOD[0], GOOD[2]], **flags)
    for steps, prepare in ((BAD, lambda trainer: None), (GOOD, spoil_gradients(2))):
        run = Run(tmp_path, steps, on_nan="skip", prepare=prepare, **flags)
        assert run.trainer.state.global_step == 3
        assert all(torch.equal(value, weights(without)[name]) for name, value in weights(run).items())
        assert ["loss" in entry for entry in run.log_rows] == [True, False, True]
        assert [entry["loss"] for entry in run.log_rows if "loss" in entry] == [entry["loss"] for entry in without.log]
        assert all(math.isfinite(value) for entry in run.log_rows for value in entry.values())


def test_the_mean_loss_is_that_of_the_steps_that_were_trained(tmp_path: Path) -> None:
    flags = {"learning_rate": 0, "logging_first_step": False}
    run = Run(tmp_path, BAD, on_nan="skip", logging_steps=3, **flags)
    without = Run(tmp_path, [GOOD[0], GOOD[2]], logging_steps=2, **flags)
    assert run.log[0]["loss"] == pytest.approx(without.log[0]["loss"], rel=1e-6)
    assert run.log[0]["token_acc"] == without.log[0]["token_acc"]


def test_the_rows_of_a_bad_step_are_told(tmp_path: Path) -> None:
    """Those of the micro-batch whose loss is no number; where all are, those of the step."""
    by_loss = told(Run(tmp_path, BAD, on_nan="skip"))
    by_gradients = told(Run(tmp_path, GOOD, on_nan="skip", prepare=spoil_gradients(2)))
    (event,) = by_loss
    assert (event["step"], event["what"], event["then"]) == (2, "its loss is nan", "skip")
    assert [(one["worker"], one["micro_batch"], one["row"]) for one in event["rows"]] == [(0, 1, 11)]
    assert event["rows"][0]["text"].split() == [f"w{number}" for number in row(3).input_ids]
    (event,) = by_gradients
    assert event["what"] == "its gradients are not finite, though its loss is"
    assert [one["row"] for one in event["rows"]] == [10, 11]


@pytest.mark.parametrize(("steps", "prepare"), [(BAD, lambda trainer: None), (GOOD, spoil_gradients(2))])
def test_a_run_ends_before_a_bad_step_by_default(tmp_path: Path, steps: Any, prepare: Any) -> None:
    found: list[Any] = []

    def keep(trainer: Any) -> None:
        found.append(trainer)
        prepare(trainer)

    with pytest.raises(RunFailedError, match="step 2: its "):
        Run(tmp_path, steps, prepare=keep)
    one = weights(Run(tmp_path, GOOD[:1]))
    assert all(torch.equal(value, one[name]) for name, value in found[0].model.state_dict().items())


def test_the_device_is_waited_for_once_a_step(tmp_path: Path) -> None:
    """Transformers' filter would look at every micro-batch."""
    assert Run(tmp_path, GOOD).trainer.args.logging_nan_inf_filter is False
    assert Run(tmp_path, GOOD, logging_nan_inf_filter=True).trainer.args.logging_nan_inf_filter is False


@pytest.mark.parametrize(
    ("losses", "last", "spike"),
    [
        ([2.0 + 0.01 * (n % 3) for n in range(30)], 4.0, True),
        ([2.0 + 0.01 * (n % 3) for n in range(30)], 2.5, False),
        ([4.0 - 0.1 * n for n in range(30)], 4.0, False),
        ([2.0] * 19, 100.0, False),
        ([0.001] * 30, 0.0012, False),
    ],
)
def test_a_spike_stands_far_above_the_losses_before_it(losses: list[float], last: float, spike: bool) -> None:
    found = Spikes()
    assert not any([found.is_spike(loss) for loss in losses])
    assert found.is_spike(last) is spike


def test_a_loss_that_jumps_is_told_and_trained(tmp_path: Path) -> None:
    steps = [[[row(0)]]] * 22 + [[[row(0, scale=30.0)]], [[row(0)]]]
    run = Run(tmp_path, steps, learning_rate=0.001)
    (event,) = told(run)
    assert (event["step"], event["then"], len(event["rows"])) == (23, "goes on", 1)
    assert event["what"].startswith("the loss jumps to ")
    assert run.trainer.state.global_step == 24


# --- where rows are from ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two files whose rows say their place; one row of each is dropped."""
    folder = tmp_path_factory.mktemp("files")
    lines = {name: [json.dumps({"text": f"{name}:{number}"}) for number in range(1, 7)] for name in ("a", "b")}
    lines["a"][1] = '{"other": 1}'
    lines["b"][2] = '{"other": 1}'
    for name, found in lines.items():
        (folder / f"{name}.jsonl").write_text("".join(f"{line}\n" for line in found))
    return folder


@pytest.fixture(scope="module")
def encoder(smollm2_dir: str) -> Encoder:
    return Encoder(smollm2_dir, use_chat_template=False, loss_scale="all")


@pytest.mark.parametrize(("lazy", "packed"), [(False, False), (False, True), (True, False)])
def test_the_place_of_a_row(files: Path, encoder: Encoder, tmp_path: Path, lazy: bool, packed: bool) -> None:
    """Shuffled, over two epochs, on two workers: each row is where its text says."""
    args = make_arguments("sft", model="m/m", dataset=[str(files)], split_dataset_ratio=0, lazy_tokenize=lazy)
    data = load_train_data(args, resolve_datasets(args), encoder, lambda *_: None, TokenCache(str(tmp_path)))
    assert data.train is not None
    items: Any = LazyItems(data.train, encoder, str) if lazy else TrainItems(  # type: ignore[arg-type]
        data.train, pack(data.train.lengths, 24) if packed else None)  # fmt: skip
    plan = StepSchedule(4, 1, 4, 2)
    seen = []
    for step in range(4):
        for rank in range(2):
            loader = EpochLoader(items, plan, Rank(rank, 2), Collator(0), 0, 1, True)
            for rows, expected in zip(loader.rows_of(step), loader.micro_batch_items(step), strict=True):
                assert len(rows) == sum(len(items[item]) for item in expected)
                for number, one in rows:
                    place = place_of(data.train, number, data.origins)  # type: ignore[arg-type]
                    name, line = encoder.tokenizer.decode(one.input_ids, skip_special_tokens=True).split(":")
                    assert place == f"{files}/{name}.jsonl:{line}"
                    seen.append(place)
    assert len(seen) == 20
    assert len(set(seen)) == 10


def test_a_row_of_an_encoded_dataset_is_named_by_its_own_file(files: Path, encoder: Encoder, tmp_path: Path) -> None:
    args = make_arguments("sft", model="m/m", dataset=[str(files / "a.jsonl")], split_dataset_ratio=0)
    data = load_train_data(args, resolve_datasets(args), encoder, lambda *_: None,
                           TokenCache(str(tmp_path)))  # fmt: skip
    assert data.train is not None
    one = data.train.select(np.array([3]))
    assert place_of(one, 0, {}) == f"{data.train.files[0]}, row {data.train.index[3, 1] + 1}"


def test_the_place_of_a_row_of_a_stream(files: Path, encoder: Encoder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rayswift.data.flow.stream.STREAM_PACKING_WINDOW", 8)
    monkeypatch.setattr("rayswift.data.flow.plan.MAX_PLANNED_EPOCHS", 4)
    flags = {"streaming": True, "max_steps": 10, "shuffle_buffer_size": 5}
    args = make_arguments("sft", model="m/m", dataset=[str(files)], **flags)
    streams = plan_streams(args, resolve_datasets(args).train, 24)
    (plan,) = streams.plans
    tables = (table for task in range(len(plan.tasks)) for table in task_tokens(plan, task, 0, encoder, None))
    loader = StreamLoader(lambda: [tables], streams.start(), streams.order(0), StepSchedule(2, 1, 2, None),
                          Rank(0, 1), Collator(0), 0)  # fmt: skip
    trained = loader.micro_batches()
    for _ in range(2):
        micro_batches = [next(trained), next(trained)]
        rows = loader.rows_of(0)
        assert [[one.input_ids.tolist() for _, one in batch] for batch in rows] == [
            [one.input_ids.tolist() for one in batch] for batch in micro_batches]  # fmt: skip
        for (path, position), one in [found for batch in rows for found in batch]:  # type: ignore[misc]
            name, line = encoder.tokenizer.decode(one.input_ids, skip_special_tokens=True).split(":")
            text = Path(path).read_text()
            assert path == str(files / f"{name}.jsonl")
            found = text[: position.number].count("\n") + 1 if position.kind == "byte" else position.number
            assert found == int(line)

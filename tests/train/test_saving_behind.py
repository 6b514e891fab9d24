"""Checkpoints that are written while training goes on: as whole, and as exact, as those that it waits for."""

from __future__ import annotations

import errno
import filecmp
import json
import os
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from test_ending import Queue, whole
from test_trainer import Run, fast, plain_steps  # noqa: F401 -- a fixture
from tiny_models import llama

from rayswift.train.checkpoints import store as stores
from rayswift.train.checkpoints.store import CheckpointStore
from rayswift.train.loader import Rank

SETTINGS = {"optim": "adamw_torch", "lr_scheduler_type": "cosine", "save_strategy": "steps", "save_steps": 2}


class Stored(Run):
    """A training of five steps whose checkpoints go the way that a worker's go. ``told``: does something to the store
    before the first step."""

    def __init__(self, folder: Path, told: Callable[[CheckpointStore], None] = lambda store: None, **flags: Any):
        self.queue = Queue()
        self._told = told
        super().__init__(folder, plain_steps(5), **{**SETTINGS, **flags})

    def model(self) -> Any:
        if self.args.train_type == "full":
            return llama()
        return get_peft_model(llama(), LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "down_proj"]))

    def prepare(self, folder: Path) -> None:
        data, schedule = SimpleNamespace(fingerprint="d"), SimpleNamespace(global_batch_size=1)
        config: Any = SimpleNamespace(args=self.args, run_uri=str(folder), events=self.queue, data=data,
                                      schedule=schedule, model_fingerprint="m")  # fmt: skip
        self.store = CheckpointStore(config, Rank(0, 1), 0, 1)
        self._told(self.store)
        self.trainer.save, self.trainer.settle = self.store.save, self.store.settle
        self.trainer.loader = WithPlaces(self.trainer.loader)

    @property
    def said(self) -> list[dict[str, Any]]:
        return [event for event in self.queue.drain() if event["event"] in ("checkpoint", "note")]


class WithPlaces(list[Any]):
    def stream_places(self, step: int) -> None:
        return None


@pytest.mark.parametrize("flags", [{}, {"train_type": "lora", "save_only_model": True}])
def test_a_checkpoint_that_is_written_meanwhile_is_the_one_that_is_written_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flags: dict[str, Any]
) -> None:
    """Every file of it, though each is written when the run has long gone on."""
    gate = threading.Event()

    def late(store: CheckpointStore) -> None:
        begin = store._begin
        monkeypatch.setattr(store, "_begin", lambda name: (gate.wait(20), begin(name)))
        settle = store.settle
        monkeypatch.setattr(store, "settle", lambda trainer: (gate.set(), settle(trainer)))

    behind = Stored(tmp_path / "behind", late, **flags)
    with monkeypatch.context() as patched:
        patched.setattr("ray.train.report", lambda *_, **__: None)
        patched.setattr(stores, "take_snapshot", lambda *_: None)
        Stored(tmp_path / "now", **flags)
    assert gate.is_set()
    assert whole(tmp_path / "behind") == whole(tmp_path / "now") == [2, 4, 5]
    for step in (2, 4, 5):
        one, other = (tmp_path / name / f"checkpoint-{step}" for name in ("behind", "now"))
        names = sorted(path.name for path in other.iterdir())
        assert sorted(path.name for path in one.iterdir()) == names
        assert ("optimizer.pt" in names) == ("save_only_model" not in flags)
        # Times, and the folder's own name, are not the same.
        own = {"training_args.bin", "args.json", "manifest.json", "trainer_state.json"}
        differing = [name for name in names if not filecmp.cmp(one / name, other / name, shallow=False)]
        assert set(differing) <= own
        states = [json.loads((folder / "trainer_state.json").read_text()) for folder in (one, other)]
        for state in states:
            for row in state["log_history"]:
                for name in ("memory(GiB)", "tokens/s", "train_runtime"):
                    row.pop(name, None)
        assert states[0] == states[1]
    assert [event["step"] for event in behind.said] == [2, 4, 5]


def test_a_disk_that_fills_meanwhile_costs_that_checkpoint(tmp_path: Path) -> None:
    def full_at_four(store: CheckpointStore) -> None:
        finish = store._finish

        def fails(name: str, step: int, files: Any) -> None:
            if step == 4:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            finish(name, step, files)

        store._finish = fails  # type: ignore[method-assign]

    run = Stored(tmp_path, full_at_four)
    assert whole(tmp_path) == [2, 5]
    assert not (tmp_path / "checkpoint-4").exists()
    notes = [event["line"] for event in run.said if event["event"] == "note"]
    assert notes == ["checkpoint-4 was not saved (No space left on device); training goes on, the last whole "
                     "checkpoint: checkpoint-2"]  # fmt: skip


def test_the_best_that_found_no_room_is_not_the_best(tmp_path: Path) -> None:
    def full_at_four(store: CheckpointStore) -> None:
        begin = store._begin

        def fails(name: str) -> None:
            begin(name)
            if name == "checkpoint-4":
                raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))

        store._begin = fails  # type: ignore[method-assign]

    run = Stored(tmp_path, full_at_four, losses=[0.5, 0.1, 0.4], eval_steps=2)
    assert (run.trainer.state.best_global_step, run.trainer.state.best_metric) == (5, 0.4)
    state = json.loads((tmp_path / "checkpoint-5" / "trainer_state.json").read_text())
    assert (state["best_global_step"], state["best_model_checkpoint"]) == (5, str(tmp_path / "checkpoint-5"))


def test_another_failure_of_writing_ends_the_run(tmp_path: Path) -> None:
    def broken(store: CheckpointStore) -> None:
        def fails(name: str, step: int, files: Any) -> None:
            raise PermissionError(errno.EACCES, "not allowed")

        store._finish = fails  # type: ignore[method-assign]

    with pytest.raises(PermissionError):
        Stored(tmp_path, broken)


def test_a_copy_that_has_no_room_in_memory_is_not_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ray.train.report", lambda *_, **__: None)
    monkeypatch.setattr("rayswift.train.checkpoints.snapshot.free_bytes", lambda: 1000.0)
    left = tmp_path / "checkpoint-2"  # by an attempt that died
    left.mkdir()
    (left / "stale").write_text("x")
    run = Stored(tmp_path)
    assert whole(tmp_path) == [2, 4, 5] and not (left / "stale").exists()
    assert all("waited" not in event for event in run.said)


def test_tensors_are_copies_and_shared_ones_stay_shared() -> None:
    from rayswift.train.checkpoints.snapshot import _weights, copied

    state = {"a": torch.ones(2), "deep": [{"b": (torch.zeros(1), 3)}]}
    found = copied(state)
    state["a"].add_(1)
    state["deep"][0]["b"][0].add_(1)
    assert found["a"].tolist() == [1, 1] and found["deep"][0]["b"][0].tolist() == [0]
    model = llama()
    model.model.norm.weight.requires_grad_(False)
    weights = _weights(model)
    assert weights["lm_head.weight"].data_ptr() == weights["model.embed_tokens.weight"].data_ptr()
    assert weights["lm_head.weight"].data_ptr() != model.lm_head.weight.data_ptr()
    assert weights["model.norm.weight"].data_ptr() == model.model.norm.weight.data_ptr()

"""The state after a step that is held for workers that start again: whole, newest, and cheap."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from test_ending import Queue
from test_saving_behind import Stored
from test_summary import Time, clock, seconds, told  # noqa: F401 -- a fixture
from test_trainer import fast  # noqa: F401 -- a fixture
from tiny_models import llama

from rayswift.modeling.part_of_base import first_values, take_off
from rayswift.train.checkpoints import last_step as module
from rayswift.train.checkpoints.held_state import HeldState
from rayswift.train.checkpoints.last_step import LastStep
from rayswift.train.checkpoints.packed import packed, unpacked
from rayswift.train.loader import Rank
from rayswift.train.stopping import Notices, Wish
from rayswift.train.summary import Goodput


class Kept(Stored):
    """A LoRA run of five steps, of which every one is held; ``states``: what was held after each."""

    def prepare(self, folder: Path) -> None:
        super().prepare(folder)
        self.states: dict[int, HeldState] = {}
        self.last_step = LastStep(self.store)
        self.trainer.keep, self.trainer.wish = self.keep, lambda: Wish.KEEP

    def keep(self, trainer: Any) -> None:
        self.last_step.keep(trainer)
        assert self.last_step._thread is not None
        self.last_step._thread.join()
        queue: Any = self.queue
        self.states[queue.kept_step()] = queue.kept_state()


class OtherAdapter(Kept):
    """The same with an adapter of another kind."""

    kind = ""

    def model(self) -> Any:
        base = llama()
        targets = {"task_type": "CAUSAL_LM", "target_modules": ["q_proj", "down_proj"]}
        if self.kind == "counting":

            def count(module: Any, _: Any) -> None:
                module.seen = module.seen + 1  # put anew

            base.model.norm.register_buffer("seen", torch.zeros(1))
            base.model.norm.register_forward_pre_hook(count)
            return get_peft_model(base, LoraConfig(modules_to_save=["norm"], **targets))
        model = get_peft_model(base, LoraConfig(use_dora=self.kind == "dora", **targets))
        if self.kind == "pissa":
            model.first_values = first_values(model, "pissa")
            take_off(model, model.first_values)
        return model


def weights(run: Stored) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in run.trainer.model.named_parameters() if value.requires_grad}


@pytest.mark.parametrize("logging_steps", [1, 3])
def test_a_run_goes_on_from_any_step_that_is_held_to_the_same_bits(tmp_path: Path, logging_steps: int) -> None:
    """With dropout, whose random numbers must come back, and moments and a schedule that go on."""
    flags = {"train_type": "lora", "logging_steps": logging_steps, "save_strategy": "no"}
    straight = Kept(tmp_path / "straight", **flags)
    assert list(straight.states) == [1, 2, 3, 4]  # of the last one there is a checkpoint
    for step in (1, 3):
        straight.states[step].write(str(tmp_path / f"checkpoint-{step}"))
        again = Kept(tmp_path / f"again{step}", resume=str(tmp_path / f"checkpoint-{step}"), **flags)
        for name, value in weights(straight).items():
            assert torch.equal(value, weights(again)[name]), (step, name)
        assert [row["loss"] for row in again.log][-1] == [row["loss"] for row in straight.log][-1] or logging_steps > 1
        assert list(again.states) == list(range(step + 1, 5))


@pytest.mark.parametrize("kind", ["dora", "counting", "pissa"])
def test_what_is_held_is_the_checkpoint_of_that_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    monkeypatch.setattr(OtherAdapter, "kind", kind)
    run = OtherAdapter(tmp_path, train_type="lora", save_steps=2, weight_decay=0.1)
    seen = []
    for step in (2, 4):
        saved, held = tmp_path / f"checkpoint-{step}", tmp_path / f"held-{step}"
        run.states[step].write(str(held))
        names = {path.name for path in held.iterdir()}
        assert names == {
            "adapter_config.json", "adapter_model.safetensors", "args.json", "optimizer.pt", "position.json",
            "rng_state.pth", "scheduler.pt", "trainer_state.json",
        }  # fmt: skip
        adapters = [load_file(folder / "adapter_model.safetensors") for folder in (saved, held)]
        assert adapters[0].keys() == adapters[1].keys()
        assert all(torch.equal(value, adapters[1][name]) for name, value in adapters[0].items())
        seen.append(adapters[1].get("base_model.model.model.norm.seen"))
        moments = [torch.load(folder / "optimizer.pt")["state"] for folder in (saved, held)]
        assert all(torch.equal(value, moments[1][number][name])
                   for number, one in moments[0].items() for name, value in one.items())  # fmt: skip
        configs = [json.loads((folder / "adapter_config.json").read_text()) for folder in (saved, held)]
        assert configs[0] | {"inference_mode": False} == configs[1]
        for name in ("rng_state.pth", "scheduler.pt"):
            assert (saved / name).read_bytes() == (held / name).read_bytes(), name
        rows = [json.loads((folder / "trainer_state.json").read_text()) for folder in (saved, held)]
        assert rows[0]["log_history"] == rows[1]["log_history"]
    assert kind != "counting" or seen[1] - seen[0] == 2


def test_what_is_held_is_taken_where_no_checkpoint_is_as_new(tmp_path: Path) -> None:
    run = Kept(tmp_path, train_type="lora", save_steps=2)
    store, queue = run.store, run.store.config.events
    store.config.resume = None
    assert store.resume_from(LastStep(store).step()) == (f"{tmp_path}/checkpoint-5", 5, False)
    assert store.resume_from(5)[0] == f"{tmp_path}/checkpoint-5"  # the disk's, of two
    queue.ask("keep", 6, run.states[4], {})
    folder, step, told = store.resume_from(LastStep(store).step())
    assert (step, told) == (6, False)
    assert folder is not None
    assert {"adapter_model.safetensors", "optimizer.pt", "position.json"} <= {
        one.name for one in Path(folder).iterdir()
    }
    store.config.resume, store.config.resume_step = "elsewhere/checkpoint-7", 7
    assert store.resume_from(6) == ("elsewhere/checkpoint-7", 7, True)
    store.close()
    assert not Path(folder).exists()


@pytest.mark.parametrize(
    ("settings", "on"),
    [
        ({}, True),
        ({"max_failures": -1}, True),
        ({"max_failures": 0}, False),
        ({"train_type": "full"}, False),
        ({"deepspeed": {"zero_optimization": {"stage": 2}}}, False),
    ],
)
def test_which_runs_hold_their_steps(settings: dict[str, Any], on: bool) -> None:
    args = SimpleNamespace(**{"train_type": "lora", "max_failures": 3, "deepspeed": None, **settings})
    store: Any = SimpleNamespace(config=SimpleNamespace(args=args), rank=Rank(0, 1))
    assert LastStep(store).is_due() is on


def test_holding_steps_costs_a_hundredth_of_the_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Training waited 0.2 s, and the thread works 0.8 s of one of two cores: the next one is due in a minute."""
    now, worked = [100.0], iter([0.0, 0.8])
    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: now[0], thread_time=lambda: next(worked)))
    monkeypatch.setattr("os.cpu_count", lambda: 2)
    args = SimpleNamespace(train_type="lora", max_failures=3, deepspeed=None)
    store: Any = SimpleNamespace(config=SimpleNamespace(args=args, events=Queue()), rank=Rank(0, 1))
    last_step = LastStep(store)
    last_step._send(lambda: HeldState({}, b"", []), 1, {}, 0.2)
    for seconds_later, due in ((59.9, False), (60.1, True)):
        now[0] = 100.0 + seconds_later
        assert last_step.is_due() is due


def test_a_state_that_is_too_large_is_never_held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LIMIT", 100)
    store: Any = SimpleNamespace(config=SimpleNamespace(args=SimpleNamespace(
        train_type="lora", max_failures=3, deepspeed=None, save_only_model=False)), rank=Rank(0, 1))  # fmt: skip
    last_step = LastStep(store)
    last_step.keep(SimpleNamespace(model=torch.nn.Linear(10, 10)))  # type: ignore[arg-type]
    assert last_step._next == math.inf


def test_the_first_worker_decides_and_a_checkpoint_comes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    going: list[Any] = [None]
    monkeypatch.setattr("ray.train.get_preemption_info", lambda: going[0])
    monkeypatch.setattr(Notices, "_listen", lambda self: None)
    notices = Notices(Queue(), Rank(0, 1), lambda: True)
    assert notices.wish() is Wish.KEEP
    going[0] = SimpleNamespace(deadline_ms=1)
    assert [notices.wish() for _ in range(2)] == [Wish.SAVE, Wish.KEEP]  # until the machine goes


def test_steps_that_were_held_were_not_lost(clock: Time) -> None:  # noqa: F811
    """Step 3 is held, the worker dies after step 4, and again before it has trained anything."""
    goodput = Goodput(clock.now)
    goodput.attempt(0, seconds())
    clock.now += 40
    goodput.hear(seconds(step=40))
    goodput.kept(3, seconds(step=30))
    goodput.attempt(3, seconds())
    assert told(goodput) == {"step": 30, "restarts": 10}
    clock.now += 5
    goodput.attempt(3, seconds())
    clock.now += 10
    goodput.hear(seconds(step=10))
    assert told(goodput) == {"step": 40, "restarts": 15}


def test_small_tensors_are_copied_together_as_they_are() -> None:
    shared = torch.arange(6.0)
    state = {
        "a": [shared.view(2, 3).t(), torch.tensor(7.0)],
        3: (torch.ones(2, dtype=torch.int64), "text"),
        "b": shared,
    }
    found = unpacked(*packed(state))
    assert found["a"][0].tolist() == state["a"][0].tolist()
    assert found["a"][1].shape == ()
    assert (found[3][0].dtype, found[3][1]) == (torch.int64, "text")
    assert found["b"].untyped_storage().data_ptr() == found["a"][0].untyped_storage().data_ptr()
    shared.zero_()
    assert found["b"].tolist() == [0, 1, 2, 3, 4, 5]

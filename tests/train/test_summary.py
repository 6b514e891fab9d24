"""Where the time of a run went, over restarts of its workers and over commands; operations; what the end says."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import llama

from rayswift.train import summary as module
from rayswift.train.clock import PHASES, Clock
from rayswift.train.flops import FlopCount, peak_tflops
from rayswift.train.run_directory import RunDirectory
from rayswift.train.summary import Goodput, Summary, format_seconds
from rayswift.train.watch import blame, hang_line, is_waiting, watch


class Time:
    """A clock that is set by hand."""

    now = 100.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Time:
    found = Time()
    monkeypatch.setattr(module, "time", found)
    monkeypatch.setattr("rayswift.train.clock.time", found)
    return found


def seconds(**known: float) -> dict[str, float]:
    return dict.fromkeys(PHASES, 0.0) | known


def told(goodput: Goodput) -> dict[str, float]:
    return {part: value for part, value in goodput.seconds().items() if value}


def test_a_worker_does_one_thing_at_a_time(clock: Time) -> None:
    found = Clock()
    for phase, spent in (("data", 2), ("step", 1), ("data", 7)):
        clock.now += spent
        found.enter(phase)
    with found.within("evaluation"):
        clock.now += 4
    clock.now += 1
    assert found.read() == seconds(start=2, data=2, step=7, evaluation=4)
    assert found.phase == "data"


def test_the_time_of_a_run_is_that_of_its_parts(clock: Time) -> None:
    goodput = Goodput(clock.now)
    clock.now += 12  # the driver's, and the worker's model
    goodput.attempt(0, seconds(start=5))
    clock.now += 20
    goodput.hear(seconds(start=6, data=1, step=14, evaluation=3, checkpoint=1))
    clock.now += 2
    assert told(goodput) == {"start": 13, "data": 1, "step": 14, "evaluation": 3, "checkpoint": 1, "other": 2}
    assert sum(goodput.seconds().values()) == clock.now - 100


def test_what_is_trained_again_was_lost(clock: Time) -> None:
    """Step 2 is saved, the worker dies after step 3: its step, its silence and the new start are the restart's."""
    goodput = Goodput(clock.now)
    goodput.attempt(0, seconds())
    clock.now += 20
    goodput.hear(seconds(step=20))
    goodput.save(2)
    clock.now += 10
    goodput.hear(seconds(step=30))
    goodput.checkpoint(2)  # whole only now
    clock.now += 5
    goodput.attempt(2, seconds(start=3))
    clock.now += 12
    goodput.hear(seconds(start=5, step=10))
    assert told(goodput) == {"step": 30, "restarts": 17}
    goodput.checkpoint(3)
    clock.now += 8
    goodput.attempt(3, seconds(start=1))  # nothing is lost this time
    assert told(goodput) == {"step": 30, "restarts": 25}


def test_a_command_goes_on_with_the_time_of_those_before_it(clock: Time, tmp_path: Path) -> None:
    run = RunDirectory.create(str(tmp_path), add_version=True)
    first = Summary.of(run, clock.now, goes_on=False)
    clock.now += 10
    first.goodput.attempt(0, seconds())
    clock.now += 20
    first.goodput.hear(seconds(step=20))
    first.goodput.checkpoint(2)
    clock.now += 10
    first.goodput.hear(seconds(step=30))
    first.write(run)  # and is killed
    clock.now += 1000
    second = Summary.of(run, clock.now, goes_on=True)
    clock.now += 7
    second.goodput.attempt(2, seconds(start=2))
    clock.now += 13
    second.goodput.hear(seconds(start=5, step=10))
    assert told(second.goodput) == {"start": 10, "step": 30, "restarts": 20}
    assert second.row()["goodput"] == 0.5
    (run.local / "goodput.json").write_text('{"seconds": [')
    assert told(Summary.of(run, clock.now, goes_on=True).goodput) == {}


def test_what_the_end_says(clock: Time) -> None:
    summary = Summary(Goodput(clock.now))
    assert summary.lines() == []  # nothing was trained
    summary.goodput.attempt(0, seconds())
    clock.now += 100
    summary.goodput.hear(seconds(start=5, step=90, data=5))
    summary.device, summary.num_workers, summary.memory = "NVIDIA H200", 2, [3.25, 3.5]
    for _ in range(2):
        summary.add({"tokens": 1e6, "trained": 2.5e5, "flops": 4e16, "seconds": 50.0})
    row = summary.row()
    assert (row["tokens/s"], row["trained_tokens/s"], row["TFLOP/s"]) == (20000, 5000, 400)
    assert row["MFU"] == pytest.approx(400 / 989, abs=1e-4)
    assert (row["goodput"], row["peak_memory(GiB)"]) == (0.9, [3.25, 3.5])
    assert summary.lines() == [
        "speed: 20000 tokens/s, 5000 of them trained; 400 TFLOP/s per worker, MFU 40.4% of NVIDIA H200",
        "memory: at most 3.25, 3.50 GiB by worker",
        "time: 1m 40s, goodput 90.0%; start 5s, data 5s, evaluation 0s, checkpoint 0s, restarts 0s, other 0s",
    ]
    summary.device = None
    assert "MFU" not in summary.row()
    assert summary.lines()[0].endswith("400 TFLOP/s per worker")


@pytest.mark.parametrize(
    ("device", "peak"),
    [("NVIDIA H100 80GB HBM3", 989), ("NVIDIA H100 PCIe", 756), ("NVIDIA H100 NVL", 835), ("NVIDIA H200", 989),
     ("NVIDIA A100-SXM4-80GB", 312), ("NVIDIA A10", 125), ("NVIDIA A10G", None), ("NVIDIA L40S", 362),
     ("NVIDIA L4", 121), ("Tesla T4", None), ("AMD Instinct MI300X", 1307.4), (None, None)],
)  # fmt: skip
def test_peaks_of_devices(device: str | None, peak: float | None) -> None:
    assert peak_tflops(device) == peak


def flops_of(kind: str) -> tuple[Any, FlopCount]:
    """A model of eight layers, and what it costs."""
    from peft import LoraConfig, get_peft_model

    model: Any = llama(num_hidden_layers=8, attn_implementation="eager").train()
    if kind == "lora":
        model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=2, target_modules="all-linear"))
    if kind == "frozen":
        for name, weight in model.named_parameters():
            weight.requires_grad = ".6." in name or ".7." in name
    return model, FlopCount.of(model)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["full", "lora", "frozen"])
def test_operations_are_those_that_pytorch_counts(kind: str) -> None:
    """But for the positions that attention may not see, which PyTorch's products of whole matrices compute too."""
    from torch.utils.flop_counter import FlopCounterMode

    model, found = flops_of(kind)
    ids = torch.randint(3, 150, (2, 24))
    with FlopCounterMode(display=False) as counter:
        model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids).loss.backward()
    whole = (found.token + found.scored) * ids.numel() + sum(cost * 2 * 24 * 24 for cost, _ in found.attention)
    assert whole == pytest.approx(counter.get_total_flops(), rel=0.01)


def test_operations_of_a_batch() -> None:
    blocks, head = 8 * (2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 48), 160 * 32
    _, full = flops_of("full")
    assert (full.token, full.scored) == (6 * blocks, 6 * head)
    _, lora = flops_of("lora")
    adapters = 8 * 2 * (2 * (32 + 32) + 2 * (32 + 16) + 3 * (32 + 48))
    assert lora.token == pytest.approx(4 * blocks + 6 * adapters, rel=0.01)  # nothing lies before the first layer
    assert lora.scored == 4 * head
    _, frozen = flops_of("frozen")
    assert frozen.token == pytest.approx((6 * 2 + 2 * 6) * blocks / 8, rel=0.02)  # the same of its first layer
    attention = 2.0 * 4 * 16
    assert [found.attention for found in (full, lora, frozen)] == [
        ((8 * 3 * attention, None),), ((8 * 3 * attention, None),), ((12 * attention, None),)]  # fmt: skip
    labels = torch.full((2, 24), 5)
    labels[:, :10] = -100
    expected = (48, 28, full.token * 48 + full.scored * 28 + 8 * 3 * attention * 2 * 300)
    assert full.of_batch({"attention_mask": torch.ones_like(labels), "labels": labels}) == expected
    told = full.of_batch({"attention_mask": torch.ones_like(labels), "targets": torch.zeros(2)})  # --task_type
    assert told[:2] == (48, 2)
    bounds = torch.tensor([0, 24, 48], dtype=torch.int32)
    assert full.of_batch({"cu_seq_lens_q": bounds, "labels": labels.reshape(1, -1)}) == expected


def test_windows_bound_attention() -> None:
    from transformers import Gemma3TextConfig

    from rayswift.train.flops import _attention

    config = Gemma3TextConfig(num_hidden_layers=6, sliding_window=4, num_attention_heads=2, head_dim=8)
    assert _attention(config, 0, 0) == ((5 * 3 * 2.0 * 2 * 16, 4), (3 * 2.0 * 2 * 16, None))
    found = FlopCount(0.0, 0.0, ((1.0, 4), (100.0, None)))
    mask = torch.tensor([[1] * 6 + [0] * 2, [1] * 3 + [0] * 5])
    assert found.of_batch({"attention_mask": mask, "labels": torch.full((2, 8), -100)}) == (9, 0, 24 + 100 * 27.0)


def test_format_of_seconds() -> None:
    assert [format_seconds(value) for value in (53.9, 91, 34216)] == ["53s", "1m 31s", "9h 30m 16s"]


# --- workers that do not get on -----------------------------------------------------------------------------------

WAITS = [("/home/me/train.py", 3, "main"), ("/x/site-packages/torch/distributed/distributed_c10d.py", 9, "all_reduce")]
BACKWARD = [*WAITS[:1], ("/x/site-packages/torch/autograd/graph.py", 5, "_engine_run_backward")]
SLEEPS = [*WAITS[:1], ("/home/me/rows.py", 7, "read"), ("/x/lib/python3.11/threading.py", 1, "wait")]


def report(frames: list[tuple[str, int, str]], ticks: int = 5) -> dict[str, Any]:
    return {"frames": frames, "ticks": ticks, "phase": "data"}


@pytest.mark.parametrize(
    ("reports", "blamed"),
    [
        ({0: report(WAITS), 1: report(SLEEPS), 2: report(BACKWARD)}, [1]),
        ({0: report(WAITS), 2: report(WAITS)}, [1]),
        ({0: report(WAITS, 6), 1: report(WAITS, 5), 2: report(BACKWARD, 6)}, [1]),
        ({0: report(SLEEPS), 1: report(WAITS), 2: report(SLEEPS)}, [0, 2]),
    ],
)
def test_the_worker_that_others_wait_for(reports: dict[int, dict[str, Any]], blamed: list[int]) -> None:
    assert blame(reports, 3) == blamed
    assert not is_waiting(SLEEPS)
    assert is_waiting([("/x/rayswift/train/trainers/checked_steps.py", 130, "_get_grad_norm")])  # for a GPU
    assert not is_waiting([("/x/rayswift/train/trainers/checked_steps.py", 120, "training_step")])


def test_the_line_of_a_worker_that_hangs() -> None:
    line = hang_line({0: report(WAITS), 1: report(SLEEPS)}, 2, 60)
    assert line == ("nothing got on for 60 s (--step_timeout): worker 1 hangs in /x/lib/python3.11/threading.py:1 "
                    "wait, called from /home/me/rows.py:7 read (data)")  # fmt: skip
    assert hang_line({0: report(WAITS)}, 2, 60).endswith("worker 1 does not answer at all")


def test_a_thread_that_does_not_get_on_is_reported_with_its_stack() -> None:
    from rayswift.train.loader import Rank

    class Ahead(Clock):
        """Whose signs of life are from a little later, so that a slow machine changes nothing."""

        def tick(self) -> None:
            super().tick()
            self.ticked += 0.4

    found: list[dict[str, Any]] = []
    ended = threading.Event()

    def here() -> None:
        clock = Ahead()
        watch(clock, Rank(1, 2), 0.05, found.append)
        time.sleep(0.15)  # it has not begun
        assert not found
        clock.enter("step")
        time.sleep(0.1)
        assert not found
        ended.wait(20)

    thread = threading.Thread(target=here)
    thread.start()
    while not found and thread.is_alive():
        time.sleep(0.02)
    ended.set()
    thread.join()
    (event,) = found
    assert (event["rank"], event["workers"], event["ticks"], event["phase"]) == (1, 2, 1, "step")
    assert [name for _, _, name in event["frames"]][-3:] == ["here", "wait", "wait"]

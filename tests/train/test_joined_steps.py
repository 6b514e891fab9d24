"""Rows of a step that share forward passes (`--packing` unset): the same steps, the same gradients."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_models import llama, llama_config

from rayswift.arguments import make_arguments
from rayswift.cluster import Workers
from rayswift.data.tokens.table import TokenizedRow
from rayswift.modeling.varlen_attention import FUSED, NAME
from rayswift.train import packing
from rayswift.train.collate import Collator
from rayswift.train.config import PackedPlan
from rayswift.train.loader import distribute
from rayswift.train.loss import find_loss_head
from rayswift.train.schedule import StepSchedule

EXACT = {"attention": NAME, "by_row": []}


def join(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    lengths: np.ndarray,
    verdict: dict[str, Any] = EXACT,
    size: int = 1,
    world_size: int = 1,
    use_gpu: bool = False,
    **flags: Any,
) -> tuple[PackedPlan | None, StepSchedule]:
    """What becomes of steps of 16 rows; ``verdict``: what the trial of the model finds."""
    monkeypatch.setenv("RAYSWIFT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(packing, "_tried", lambda *_: verdict)
    llama_config().save_pretrained(tmp_path)
    args = make_arguments("sft", model=str(tmp_path), dataset=["d"], per_device_train_batch_size=size, **flags)
    workers = Workers(world_size, use_gpu, {"CPU": 1.0})
    schedule = StepSchedule(16, size, 10, 10)
    return packing.join_rows(args, str(tmp_path), "bfloat16", workers, lengths, schedule, [])


@pytest.mark.parametrize(
    ("length", "size", "world_size", "rows"),
    [
        (200, 1, 1, 4),  # five fit, and four passes of four rows are as many as four of five
        (10, 1, 1, 16),
        (200, 2, 1, 4),
        (100, 1, 4, 4),  # of a worker's four
    ],
)
def test_as_many_rows_share_a_pass_as_make_its_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, length: int, size: int, world_size: int, rows: int
) -> None:
    plan, schedule = join(tmp_path, monkeypatch, np.full(50, length), size=size, world_size=world_size)
    assert plan == PackedPlan(NAME)
    assert schedule == StepSchedule(16, rows, 10, 10)
    passes = distribute([length] * 16, schedule.accumulation(world_size) * world_size, rows)
    assert sorted(item for one in passes for item in one) == list(range(16))


@pytest.mark.parametrize(
    ("lengths", "verdict", "flags"),
    [
        (np.full(50, 600), EXACT, {}),
        (np.array([10] * 40 + [3000] * 10), EXACT, {}),
        (np.full(50, 20), {"refused": "bloom does not keep joined rows apart"}, {}),
        (np.full(50, 20), {"attention": NAME, "by_row": ["Lfm2ShortConv"]}, {}),
        (np.full(50, 20), EXACT, {"attn_impl": "eager"}),
        (np.full(50, 20), EXACT, {"train_sampling_strategy": "group_by_length"}),
        (np.array([20] * 45 + [1100] * 5), EXACT, {"use_gpu": True, "max_length": 2048}),
    ],
    ids=[
        "long",
        "some long",
        "not exact",
        "one row at a time",
        "an attention of the user's",
        "like lengths",
        "more than --max_length in a GPU's worst pass",
    ],
)
def test_steps_stay_as_they_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lengths: np.ndarray, verdict: dict[str, Any], flags: dict[str, Any]
) -> None:
    assert join(tmp_path, monkeypatch, lengths, verdict, **flags) == (None, StepSchedule(16, 1, 10, 10))


def test_no_pass_on_a_gpu_needs_more_than_rows_of_max_length(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lengths = np.array([100] * 45 + [600] * 5)
    _, schedule = join(tmp_path, monkeypatch, lengths, use_gpu=True, max_length=2048)
    assert schedule.per_device_batch_size == 3
    assert packing.longest_pass(lengths, 3) == 1800
    assert packing.longest_pass(lengths, 8) == 5 * 600 + 3 * 100


def test_the_gradients_of_a_step_are_those_of_its_rows_one_by_one() -> None:
    random = np.random.RandomState(0)
    rows = []
    for length in (7, 3, 12, 5):
        ids = random.randint(3, 150, length).astype(np.int32)
        weights = random.rand(length).astype(np.float32) if length > 5 else None
        rows.append(TokenizedRow(ids, np.where(np.arange(length) < 2, -100, ids).astype(np.int32), weights))
    found = []
    for flat, parts in ((False, [[row] for row in rows]), (True, [rows[:3], rows[3:]])):
        model = llama()
        if flat:
            model.set_attn_implementation(NAME)
        head = find_loss_head(model)
        assert head is not None
        total = torch.zeros(())
        for part in parts:
            batch = Collator(0, flat=flat)(part)
            labels, weights = batch.pop("labels"), batch.pop("loss_scale", None)
            with head.scoring(labels, weights) as scored:
                model(**batch, use_cache=False)
            scored[0].loss.backward()
            total += scored[0].loss.detach()
        found.append((float(total), {name: one.grad for name, one in model.named_parameters()}))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-5)
    for name, gradient in found[0][1].items():
        assert torch.allclose(gradient, found[1][1][name], rtol=1e-3, atol=1e-5), name


@pytest.mark.parametrize(
    ("dtype", "use_gpu", "attn_impl", "choices"),
    [
        ("bfloat16", True, None, ["flash_attention_2", FUSED, NAME, "sdpa", "eager"]),
        ("bfloat16", True, "sdpa", [FUSED, NAME, "sdpa", "eager"]),
        ("float32", True, None, [NAME, "sdpa", "eager"]),
        ("bfloat16", False, None, [NAME, "sdpa", "eager"]),
        ("bfloat16", True, "flex_attention", ["flex_attention"]),
    ],
)
def test_what_is_tried_for_joined_rows(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    dtype: str,
    use_gpu: bool,
    attn_impl: str | None,
    choices: list[str],
) -> None:
    """Of what is installed; the first that is exact is taken."""
    llama_config().save_pretrained(tmp_path)
    monkeypatch.setattr("transformers.utils.is_flash_attn_2_available", lambda: True)
    monkeypatch.setattr("torch.set_num_threads", lambda _: None)
    tried: list[str] = []
    found = "rayswift.train.packing_check.check_packing"
    monkeypatch.setattr(found, lambda _, choices, *__, **___: tried.extend(choices) or PackedPlan(choices[0]))
    trial = packing._Trial(str(tmp_path), None, False, False, {}, attn_impl, dtype, use_gpu, 64)
    assert packing.try_packing(trial) == {"attention": choices[0], "by_row": ()}
    assert tried == choices

"""How much memory a run needs at least, and the warning where a machine has less."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from rayswift.arguments import make_arguments
from rayswift.modeling.loading import parameter_counts
from rayswift.plan import memory
from rayswift.plan.memory import MemoryNeed, memory_need, shortage
from rayswift.train.worker import _needs_checkpointing


def need(model: str, dtype: str = "bfloat16", workers: int = 2, use_gpu: bool = False, **given: Any) -> MemoryNeed:
    return memory_need(make_arguments("sft", model=model, dataset=["d"], **given), model, dtype, workers, use_gpu)


@pytest.mark.parametrize(
    ("dtype", "deepspeed", "per_parameter"),
    [
        ("bfloat16", None, 16),  # float32 weights, gradients and moments
        ("bfloat16", "zero1", 2 + 2 + 16 / 2),
        ("bfloat16", "zero2", 2 + 18 / 2),  # estimate_zero2_model_states_mem_needs
        ("bfloat16", "zero3", 18 / 2),
        ("float32", "zero2", 4 + 20 / 2),
    ],
)
def test_full_training(smollm2_dir: str, dtype: str, deepspeed: str | None, per_parameter: float) -> None:
    parameters = parameter_counts(smollm2_dir).parameters
    found = need(smollm2_dir, dtype, train_type="full", deepspeed=deepspeed)
    assert found == MemoryNeed(pytest.approx(per_parameter * parameters, rel=1e-6))


def test_full_training_in_bfloat16_alone(smollm2_dir: str) -> None:
    parameters = parameter_counts(smollm2_dir).parameters
    assert need(smollm2_dir, train_type="full", pure_bf16=True) == MemoryNeed(pytest.approx(8 * parameters, rel=1e-6))


def test_adapters(smollm2_dir: str) -> None:
    parameters = parameter_counts(smollm2_dir).parameters
    found = need(smollm2_dir, lora_rank=8)
    # 2.4422M trainable parameters is what Transformers counts.
    assert found.device - 2 * parameters == pytest.approx(16 * 2.4422e6, rel=1e-4)


def test_offloading_moves_the_optimiser_to_the_machine_where_there_is_a_gpu(smollm2_dir: str) -> None:
    full: dict[str, Any] = {"train_type": "full", "deepspeed": "zero2_offload"}
    on_gpu, on_cpu = (need(smollm2_dir, use_gpu=use_gpu, **full) for use_gpu in (True, False))
    parameters = parameter_counts(smollm2_dir).parameters
    assert on_gpu == MemoryNeed(pytest.approx(3 * parameters), pytest.approx(8 * parameters))
    assert on_cpu == MemoryNeed(on_gpu.device + on_gpu.host)
    assert "GiB of the machine's own" in on_gpu.line()


def test_too_little_memory_is_foreseen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "free_bytes", lambda: 8 * 2**30)
    seven_gib = MemoryNeed(7 * 2**30)
    assert shortage(seven_gib, 1, use_gpu=False) is None
    warning = shortage(seven_gib, 2, use_gpu=False)
    assert warning is not None
    assert warning.startswith("this machine has 8.0 GiB free and 2 workers need at least 14.0 GiB: try ")
    # A GPU's own memory is not this machine's.
    assert shortage(seven_gib, 2, use_gpu=True) is None


def test_this_machine_says_what_it_has_free() -> None:
    free = memory.free_bytes()
    assert free is None or 2**20 < free < 2**50


@pytest.mark.parametrize(
    ("free_gib", "tokens", "given", "twice"),
    [
        (8.0, 1024, {}, False),  # 0.3 GiB for the model, 1.3 for what a pass keeps
        (1.9, 1024, {}, True),
        (8.0, 16384, {}, True),
        (8.0, None, {}, True),  # rows of any length
        (6.0, 2048, {"train_type": "full"}, False),
        (6.0, 2048, {"train_type": "full", "deepspeed": "zero3"}, True),  # and the logits of all positions
    ],
)
def test_activations_are_computed_twice_where_they_might_not_fit(
    smollm2_dir: str,
    monkeypatch: pytest.MonkeyPatch,
    free_gib: float,
    tokens: int | None,
    given: dict[str, Any],
    twice: bool,
) -> None:
    monkeypatch.setattr(memory, "free_bytes", lambda: int(free_gib * memory.GIB))
    args = make_arguments("sft", model=smollm2_dir, dataset=["d"], **given)
    config: Any = SimpleNamespace(args=args, dtype="bfloat16", use_gpu=False, largest_pass=tokens)
    assert _needs_checkpointing(config, smollm2_dir, 1, 1) is twice

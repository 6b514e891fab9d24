"""How much memory a run needs at least, and the warning where a machine has less."""

from __future__ import annotations

from typing import Any

import pytest

from rayswift.arguments import make_arguments
from rayswift.modeling.loading import parameter_counts
from rayswift.plan import memory
from rayswift.plan.memory import MemoryNeed, memory_need, shortage


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

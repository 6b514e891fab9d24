"""`make gpu-check`: it tries itself on a CPU without Ray and all that is not needed, sees rows that mix, and says in
one line that there is no card."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tools"))

import gpu_check  # noqa: E402

#: What a machine with torch, transformers, peft and accelerate may not have.
MORE = ("ray", "pyarrow", "datasets", "trl", "deepspeed", "vllm", "pandas")


def test_without_a_card(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert gpu_check.main([]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith("gpu-check: no CUDA device here")
    assert said.err.count("\n") == 1


@pytest.mark.slow
def test_rows_that_mix_are_seen(capsys: pytest.CaptureFixture[str]) -> None:
    """Under an attention that knows no bounds."""
    check = gpu_check.Check("cpu", "float32", ends=0.0)
    shape = gpu_check.TINY["tiny"]
    is_equal, text = gpu_check.joined_is_alone("rayswift_varlen", shape, 24, check)
    assert is_equal, text
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    AttentionInterface.register("mixes", sdpa_attention_forward)
    AttentionMaskInterface.register("mixes", lambda *args, **kwargs: None)
    check.line("mixed", lambda: gpu_check.joined_is_alone("mixes", shape, 24, check))
    assert check.failed == ["mixed"]
    assert "  NO  mixed" in capsys.readouterr().out


@pytest.mark.slow
def test_it_tries_itself_without_ray() -> None:
    hidden = f"import runpy, sys; sys.modules |= dict.fromkeys({MORE}); sys.argv = ['gpu_check.py', *sys.argv[1:]]; "
    run = f"runpy.run_path({str(ROOT / 'tools' / 'gpu_check.py')!r}, run_name='__main__')"
    command = [sys.executable, "-c", hidden + run, "--device", "cpu", "--tiny"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd="/")
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    assert sum(line.startswith("  ok ") for line in lines) == 4 + 2 * 3
    assert lines[-1].startswith("all well")

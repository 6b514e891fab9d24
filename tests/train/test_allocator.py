"""Memory of a run on CPUs: what its workers tell glibc, and that the command does without PyTorch."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from rayswift.train.start.allocator import worker_environment


def test_the_users_tunables_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GLIBC_TUNABLES", raising=False)
    assert "tcache_count=0" in worker_environment(use_gpu=False)["GLIBC_TUNABLES"]
    assert worker_environment(use_gpu=True) == {}
    monkeypatch.setenv("GLIBC_TUNABLES", "glibc.malloc.perturb=1")
    assert worker_environment(use_gpu=False) == {}


DRIVER = """
import sys
from pathlib import Path
from types import SimpleNamespace
from rayswift.modeling.loading import supports_bfloat16
from rayswift.train import driver
from rayswift.train.reporters import TensorBoard
from rayswift.train.start import make_trainer, torch_config
from rayswift.train.worker import train_loop
from ray.train import RunConfig, ScalingConfig

folder = sys.argv[1]
supports_bfloat16(use_gpu=False)
board = TensorBoard(SimpleNamespace(local=Path(folder)))
board.log({"train/loss": 1.5}, 1)
board.close()
trainer = make_trainer(
    train_loop, embedded=True, alone=True, warm=[], torch_config=torch_config("gloo", 60, embedded=True, alone=True),
    scaling_config=ScalingConfig(num_workers=1), run_config=RunConfig(storage_path=folder),
)
trainer._create_default_callbacks()
print(type(trainer).__name__, "torch" in sys.modules)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere PyTorch is asked what the CPU can do")
def test_the_command_does_without_pytorch(tmp_path: Path) -> None:
    command = [sys.executable, "-c", DRIVER, str(tmp_path)]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert said.split() == ["LeanTorchTrainer", "False"]

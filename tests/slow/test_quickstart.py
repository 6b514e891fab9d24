"""The main job: a real model learns a new name with two workers and ZeRO-2, and `rayswift infer` shows it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from command_line import run_directory

pytestmark = pytest.mark.slow

REPOSITORY = Path(__file__).resolve().parents[2]


def test_quickstart_teaches_the_model_its_name(smollm2_dir: str, tmp_path: Path) -> None:
    job = [sys.executable, str(REPOSITORY / "jobs/quickstart.py"), "--model", smollm2_dir]
    done = subprocess.run(
        [*job, "--output_dir", str(tmp_path / "out")], cwd=tmp_path, timeout=900, text=True, stdout=subprocess.PIPE
    )
    assert done.returncode == 0, done.stdout[-4000:]
    before, after = done.stdout.strip().splitlines()[-2:]
    assert "swift-robot" not in before
    assert "swift-robot" in after

    run = run_directory(tmp_path / "out")
    names = {path.name for path in run.iterdir()}
    assert {"args.json", "logging.jsonl", "runs", "images"} <= names
    assert any((run / "runs").glob("events.out.tfevents*"))
    assert (run / "images" / "train_loss.png").stat().st_size > 1000
    rows = [json.loads(line) for line in (run / "logging.jsonl").read_text().splitlines()]
    assert rows[-1]["model_parameter_info"].startswith("PeftModelForCausalLM: 136.9572M Params (2.4422M Trainable")
    checkpoint = Path(rows[-1]["last_model_checkpoint"])
    files = json.loads((checkpoint / "manifest.json").read_text())["files"]
    assert {"adapter_model.safetensors", "adapter_config.json", "args.json", "trainer_state.json"} <= set(files)
    assert any(name.startswith("global_step") for name in files), "DeepSpeed's optimiser shards"

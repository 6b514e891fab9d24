"""``rayswift eval`` as a user runs it: vLLM on CPUs, killed and started again, and beside lm-eval run by hand.

The questions are the 24 of tests/data; RAYSWIFT_ARC and RAYSWIFT_GSM8K name whole files, RAYSWIFT_EVAL_LIMIT how many.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from command_line import run, start, wait_for
from serving import ENGINE

pytestmark = pytest.mark.slow

DATA = Path(__file__).resolve().parents[1] / "data"
ARC = os.environ.get("RAYSWIFT_ARC", str(DATA / "arc_challenge_24.jsonl"))
GSM8K = os.environ.get("RAYSWIFT_GSM8K", str(DATA / "gsm8k_40.jsonl"))
LIMIT = os.environ.get("RAYSWIFT_EVAL_LIMIT", "12")
LOCAL = json.dumps({"ARC_c": {"local_path": ARC}, "gsm8k": {"local_path": GSM8K, "few_shot_num": 0}})
OFFLINE = {"HF_HUB_OFFLINE": "1"}


@pytest.fixture(autouse=True)
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def command(model: str, *asked: str) -> list[str]:
    own = {name: settings for name, settings in json.loads(LOCAL).items() if name in asked}
    return [
        "eval", "--model", model, *ENGINE, "--eval_dataset", *asked, "--eval_dataset_args", json.dumps(own),
        "--eval_limit", LIMIT,
    ]  # fmt: skip


def answers(benchmark: str, backend: str) -> list[dict[str, Any]]:
    (path,) = Path("eval_output", backend).glob(f"*/*/{benchmark}/answers.jsonl")
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def test_arc_and_gsm8k_from_local_files_on_an_own_deployment(smollm2_dir: str, tmp_path: Path) -> None:
    pytest.importorskip("evalscope")
    output = run(*command(smollm2_dir, "ARC_c", "gsm8k"), "--max_new_tokens", "64", log=tmp_path / "log", **OFFLINE)
    assert "ARC_c" in output
    assert len(answers("ARC_c", "native")) == int(LIMIT)
    (page,) = Path("eval_output/native").glob("*/report.html")
    assert "gsm8k" in page.read_text("utf-8")


def test_a_killed_evaluation_goes_on_with_what_it_has(smollm2_dir: str, tmp_path: Path) -> None:
    pytest.importorskip("evalscope")
    words = [*command(smollm2_dir, "ARC_c"), "--eval_num_proc", "1"]
    process = start(*words, log=tmp_path / "first", **OFFLINE)

    def kept() -> list[str]:
        files = list(Path("eval_output/native").glob("*/*/ARC_c/predictions/*/*.jsonl"))
        return files[0].read_text("utf-8").splitlines() if files else []

    wait_for(lambda: len(kept()) >= 3, 400, "three answers")
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    before = kept()[:3]
    run(*words, log=tmp_path / "second", **OFFLINE)
    assert "going on with" in (tmp_path / "second").read_text()
    assert kept()[:3] == before
    assert sorted(json.loads(line)["index"] for line in kept()) == list(range(int(LIMIT)))
    assert len(answers("ARC_c", "native")) == int(LIMIT)


TASK = """include: {tasks}/arc/arc_challenge.yaml
task: arc_c_by_hand
dataset_path: json
dataset_name: null
dataset_kwargs: {{data_files: {{test: {file}}}}}
training_split: null
validation_split: null
"""


def test_every_question_is_scored_as_by_the_harness_run_by_hand(smollm2_dir: str, tmp_path: Path) -> None:
    """docs/eval.md shows the two commands: here lm-eval loads the model itself, with Transformers."""
    lm_eval = pytest.importorskip("lm_eval")
    run(*command(smollm2_dir, "ARC_c"), "--eval_backend", "lm-eval", log=tmp_path / "log", **OFFLINE)
    (tmp_path / "tasks").mkdir()
    tasks = Path(lm_eval.__file__).parent / "tasks"
    (tmp_path / "tasks/arc_c_by_hand.yaml").write_text(TASK.format(tasks=tasks, file=ARC))
    subprocess.run(
        [
            sys.executable, "-m", "lm_eval", "--model", "hf", "--model_args", f"pretrained={smollm2_dir},dtype=float32",
            "--include_path", "tasks", "--tasks", "arc_c_by_hand", "--limit", LIMIT, "--log_samples",
            "--output_path", "by_hand", "--device", "cpu", "--batch_size", "8",
        ],
        check=True, env={**os.environ, **OFFLINE}, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    (samples,) = Path("by_hand").rglob("samples_*.jsonl")
    by_hand = [json.loads(line) for line in samples.read_text("utf-8").splitlines()]
    ours = answers("ARC_c", "lm_eval")
    assert len(ours) == len(by_hand) == int(LIMIT)
    for mine, theirs in zip(ours, sorted(by_hand, key=lambda one: one["doc_id"]), strict=True):
        assert mine["scores"] == {"acc": theirs["acc"], "acc_norm": theirs["acc_norm"]}, theirs["doc_id"]

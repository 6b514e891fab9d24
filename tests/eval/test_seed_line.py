"""SWIFT's own eval line ends in a score: vLLM in the place of LMDeploy, OpenCompass in the environment made for it."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import pytest

from rayswift.arguments import parse_arguments
from rayswift.eval import evaluate as evaluation
from rayswift.generate.types import Endpoint

LINE = "--model m --infer_backend lmdeploy --eval_backend OpenCompass --eval_dataset ARC_c"
#: Stands for the Python of that environment: what OpenCompass is asked for, and what it leaves behind.
PYTHON = """#!/bin/sh
case "$2" in
  *find_spec*) echo True;;
  *list_datasets*) echo; echo '["ARC_c"]';;
  *run_task*)
    folder="$(dirname "$3")/1/summary"; mkdir -p "$folder"
    printf 'dataset,version,metric,mode,m\\nARC_c,1,accuracy,gen,62.5\\n' > "$folder/summary.csv";;
esac
"""


@pytest.mark.parametrize("place", [".venv-opencompass", "elsewhere"])
def test_it_ends_in_a_score(
    place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    python = tmp_path / place / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(PYTHON)
    python.chmod(0o755)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("RAYSWIFT_OPENCOMPASS", raising=False)
    if place == "elsewhere":
        monkeypatch.setenv("RAYSWIFT_OPENCOMPASS", "elsewhere/bin/python")
    args: Any = parse_arguments("eval", LINE.split())
    served = []

    def running(endpoint: Any) -> Any:
        served.append(endpoint.args.infer_backend)
        return contextlib.nullcontext(Endpoint("http://127.0.0.1:9/v1", None, "m"))

    monkeypatch.setattr(evaluation, "_running", running)
    monkeypatch.setattr(evaluation, "check_endpoints", lambda endpoints: None)
    monkeypatch.setattr(evaluation.EvalEndpoint, "sources", lambda self: {})
    assert evaluation.evaluate(args) == {"m": {"ARC_c": 0.625}}
    assert served == ["vllm"]
    assert "--infer_backend lmdeploy: vLLM runs in its place" in caplog.text

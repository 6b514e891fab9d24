"""What Prometheus finds while a run trains, and what the dashboard asks it for."""

from __future__ import annotations

import json
import os
import re
import signal
from pathlib import Path

import pytest
from command_line import losses, run_directory, start, wait_for
from ray_head import GCS, ray_head

DASHBOARD = Path(__file__).resolve().parents[2] / "cluster/grafana/train.json"
PREFIX = "ray_rayswift_"


@pytest.mark.slow
def test_the_dashboard_asks_for_what_a_run_exports(tiny_dir: str, tmp_path: Path) -> None:
    rows = [
        {"messages": [{"role": "user", "content": f"{n}"}, {"role": "assistant", "content": "yes"}]} for n in range(40)
    ]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    asked = set(re.findall(rf"\b{PREFIX}\w+", DASHBOARD.read_text(encoding="utf-8")))
    # A CPU has no peak that is known, and a first run finds no rows that were encoded before.
    asked -= {f"{PREFIX}train_mfu", f"{PREFIX}token_cache_hits_total"}
    log = tmp_path / "sft.log"
    with ray_head(num_cpus=2, log=tmp_path / "ray.log") as head:
        driver = start(
            "sft", "--model", tiny_dir, "--dataset", str(tmp_path / "rows.jsonl"), "--address", GCS, "--max_steps",
            "100000", "--logging_steps", "5", "--save_steps", "20", "--eval_steps", "20", "--save_total_limit", "1",
            "--split_dataset_ratio", "0.1", "--report_to", "none", "--output_dir", str(tmp_path / "out"), log=log,
            **{**head.environment, "RAY_memory_monitor_refresh_ms": "0"},
        )  # fmt: skip
        found: dict[tuple[str, str], float] = {}

        def all_there() -> bool:
            for name, labels, value in re.findall(rf"^({PREFIX}\w+)\{{(.*)\}} (\S+)$", head.metrics(), re.MULTILINE):
                run = re.search(r'\brun="([^"]*)"', labels)
                found[name, run[1] if run else ""] = float(value)
            assert driver.poll() is None, log.read_text()[-4000:]
            return {name for name, _ in found} >= asked

        try:
            wait_for(all_there, 240, "every number of the dashboard")
        finally:
            print({name for name, _ in found} ^ asked)
            os.killpg(driver.pid, signal.SIGINT)
            driver.wait(100)
    run = run_directory(tmp_path / "out")
    values = {name.removeprefix(f"{PREFIX}train_"): value for (name, of), value in found.items() if of == str(run)}
    assert values["max_steps"] == 100000
    assert values["step"] >= values["checkpoint_step"] >= 20
    assert values["attempts_total"] == 1
    assert 0 < values["goodput"] <= 1 and 0 <= values["data_wait_share"] <= 1
    assert any(abs(values["loss"] - loss) < 1e-3 for loss in losses(run).values())

"""What runs and gateways say of themselves: notes in their actors' logs, meters for Ray's Prometheus endpoint."""

from __future__ import annotations

import errno
import json
import re
from pathlib import Path
from typing import Any

import pytest

from rayswift.cluster import board
from rayswift.cluster.board import METERS, Meters, RunBoard, ServeBoard, read_notes
from rayswift.serve.gateway.shared import Counters
from rayswift.train.events import EventQueue

FACTS = {"run": "/out/v0", "command": "sft", "model": "m", "max_steps": 10, "workers": 2}
GRAFANA = Path(__file__).resolve().parents[2] / "cluster" / "grafana"


class Ray:
    """Stands for Ray's meters: keeps their values by name."""

    def __init__(self) -> None:
        self.values: dict[str, float] = {}
        self.labels: dict[str, str] = {}

    def make(self, name: str, _text: str, keys: tuple[str, ...]) -> Any:
        ray = self

        class Meter:
            def set_default_tags(self, labels: dict[str, str]) -> None:
                assert set(labels) == set(keys)
                ray.labels |= labels

            def set(self, value: float) -> None:
                ray.values[name] = value

            def inc(self, value: float) -> None:
                assert value > 0
                ray.values[f"{name}_total"] = ray.values.get(f"{name}_total", 0) + value

        return Meter()


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    lines: list[str] = []
    monkeypatch.setattr(board.os, "write", lambda _fd, line: lines.append(line.decode()))
    return lines


@pytest.fixture
def ray(monkeypatch: pytest.MonkeyPatch) -> Ray:
    from ray.util import metrics

    ray = Ray()
    monkeypatch.setattr(metrics, "Gauge", ray.make)
    monkeypatch.setattr(metrics, "Counter", ray.make)
    return ray


def test_a_run_says_steps_rows_and_checkpoints_and_its_facts_again_and_again(said: list[str], ray: Ray) -> None:
    queue = EventQueue(FACTS)
    queue.push({"event": "resume", "step": 0, "history": []})
    for step in (1, 2):
        queue.push({"event": "step", "step": step})
    row = {"loss": 1.5, "tokens/s": 80.0, "global_step": 2, "epoch": 0.1, "memory(GiB)": 1.0, "learning_rate": 1e-4}
    assert queue.drain({"goodput": 0.75, "mfu": 0.5})
    queue.push({"event": "log", "row": row, "data_wait": 0.25})
    queue.push({"event": "checkpoint", "step": 2, "best": 2})
    notes = list(read_notes("".join(said)))
    assert notes[0]["run"].items() >= FACTS.items()
    assert [(one.get("attempt"), one.get("step"), one.get("checkpoint")) for one in notes[1:]] == [
        (0, None, None), (None, 1, None), (None, 2, None), (None, None, 2),
    ]  # fmt: skip  # the second step came within the seconds of the first
    assert notes[3]["row"].items() >= {"loss": 1.5, "tokens/s": 80.0, "data_wait": 0.25, "goodput": 0.75}.items()
    assert ray.labels == {"run": "/out/v0"}
    assert ray.values.items() >= {
        "rayswift_train_step": 2, "rayswift_train_max_steps": 10, "rayswift_train_loss": 1.5,
        "rayswift_train_tokens_per_second": 80.0, "rayswift_train_data_wait_share": 0.25,
        "rayswift_train_checkpoints_total": 1, "rayswift_train_attempts_total": 1,
        "rayswift_train_goodput": 0.75, "rayswift_train_mfu": 0.5,
    }.items()  # fmt: skip
    for step in range(3, 2 * RunBoard.FACTS_EVERY):
        queue.push({"event": "log", "row": {**row, "global_step": step}})
    tail = "".join(said)[-100 * 300 :]
    assert any("run" in note for note in read_notes(tail))
    assert len(queue.drain()) > 100


def test_a_run_on_this_machine_alone_says_nothing(said: list[str], ray: Ray) -> None:
    queue = EventQueue()
    queue.push({"event": "step", "step": 1})
    assert (said, ray.values) == ([], {})


def test_a_full_disk_ends_no_run(monkeypatch: pytest.MonkeyPatch, ray: Ray) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(board.os, "write", full)
    queue = EventQueue(FACTS)
    queue.push({"event": "checkpoint", "step": 1, "best": 1})
    assert queue.drain() == [{"event": "checkpoint", "step": 1, "best": 1}]


def test_a_gateway_says_its_counters_when_they_change(said: list[str], ray: Ray) -> None:
    counters, gateway = Counters(), ServeBoard(["qwen"])
    for requests, tokens in ((1, 20), (1, 20), (5, 90)):
        counters.requests, counters.tokens, counters.leases = requests, tokens, requests
        gateway.look(vars(counters))
    assert [one["counters"]["requests"] for one in read_notes("".join(said))] == [1, 5]
    assert ray.values.items() >= {
        "rayswift_serve_requests_total": 5, "rayswift_serve_generated_tokens_total": 90,
        "rayswift_serve_leases_total": 5, "rayswift_serve_running_requests": 0,
    }.items()  # fmt: skip
    assert ray.labels == {"models": "qwen"}


def test_notes_are_read_past_other_lines_and_lines_cut_in_two() -> None:
    log = f'AYSWIFT {{"time": 1}}\n:actor_name:EventQueue\n{board.MARK}{{"time": 2, "step": 3}}\n{board.MARK}{{"time"'
    assert list(read_notes(log)) == [{"time": 2, "step": 3}]


def exported_names() -> set[str]:
    return {f"ray_{name}{'_total' if kind == 'counter' else ''}" for name, (kind, _) in METERS.items()}


@pytest.mark.parametrize("path", sorted(GRAFANA.glob("*.json")), ids=lambda path: path.stem)
def test_dashboards_ask_for_meters_that_there_are_by_labels_that_they_have(path: Path) -> None:
    dashboard = json.loads(path.read_text(encoding="utf-8"))
    asked = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    asked += [one["query"] for one in dashboard["templating"]["list"] if one["type"] == "query"]
    names = {name for text in asked for name in re.findall(r"\bray_\w+", text)}
    assert names
    assert names - exported_names() == set()
    labels = {label for text in asked for label in re.findall(r"[{,](\w+)=~", text)}
    assert labels <= {"run", "models"}
    assert len({panel["id"] for panel in dashboard["panels"]}) == len(dashboard["panels"])


def test_every_meter_is_on_a_dashboard() -> None:
    text = "".join(path.read_text(encoding="utf-8") for path in GRAFANA.glob("*.json"))
    assert {name for name in exported_names() if not re.search(rf"\b{name}\b", text)} == set()


def test_counters_never_go_down(ray: Ray) -> None:
    meters = Meters()
    for total in (3, 2, 4):  # a gateway that started anew counts from none
        meters.count_up_to(rayswift_serve_requests=total)
    assert ray.values == {"rayswift_serve_requests_total": 5}

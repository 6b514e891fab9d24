"""`rayswift status`, `jobs`, `logs` and `stop` against a dashboard's answers, as text, JSON and a page."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from rayswift.cli import cluster_state, jobs
from rayswift.cli.cluster_state import autoscaler_lines, deployments, describe_run, job_list
from rayswift.cli.status import status
from rayswift.cli.status_page import timeline
from rayswift.cli.status_text import duration, status_lines
from rayswift.cluster.board import MARK
from rayswift.errors import UserError

SECRET = "hf_abcdefghijklmnopqrstuv"
NOW = 1000.0
FACTS = {"run": "/nfs/v0<b>", "command": "sft", "model": "Qwen", "max_steps": 100, "workers": 4, "since": 100.0}
RUN = [
    {"time": 100, "run": FACTS}, {"time": 110, "attempt": 0}, {"time": 200, "step": 50},
    {"time": 210, "checkpoint": 40},
    {"time": 300, "attempt": 40}, {"time": 400, "step": 50, "row": {"loss": 2.0, "tokens/s": 70.0}},
    {"time": 500, "step": 60, "row": {"loss": 1.5, "tokens/s": 80.0, "goodput": 0.9, "data_wait": 0.02}},
]  # fmt: skip


def log(notes: list[dict[str, Any]]) -> str:
    return ":job_id:01\n" + "".join(f"{MARK}{json.dumps(note)}\n" for note in notes)


def counters(time: float, requests: int, tokens: int) -> dict[str, Any]:
    names = ("errors", "retries", "resumed", "leases", "kept_leases", "running", "waiting")
    return {
        "time": time,
        "seconds": 5.0,
        "counters": {"requests": requests, "tokens": tokens, **dict.fromkeys(names, 0)},
    }


def replica(state: str = "RUNNING", address: str = "10.0.0.2", actor_id: str = "g") -> dict[str, Any]:
    return {"state": state, "node_ip": address, "actor_id": actor_id}


APPS = {
    "rayswift": {"status": "RUNNING", "deployed_app_config": {"args": {
        "models": [{"name": "qwen", "app": "rayswift-qwen"}], "api_keys": ["digest"],
    }}, "deployments": {"Gateway": {"target_num_replicas": 1, "replicas": [replica(address="10.0.0.1")]}}},
    "rayswift--state": {"status": "RUNNING", "deployments": {}},
    "rayswift-qwen": {"status": "DEPLOYING", "deployments": {"LLMServer-qwen": {
        "target_num_replicas": 3, "replicas": [replica(), replica(), replica("STARTING")],
    }}},
    "other": {"status": "RUNNING", "deployments": {"D": {"target_num_replicas": 1, "replicas": [replica()]}}},
}  # fmt: skip


class Client:
    """Stands for Ray's client of the dashboard."""

    def __init__(self) -> None:
        self.logs = {"q": log(RUN), "g": log([counters(980, 10, 100), counters(997, 30, 600)])}
        self.stopped: list[str] = []

    def get_address(self) -> str:
        return "http://127.0.0.1:8265"

    def list_jobs(self) -> list[Any]:
        job = {"status": "RUNNING", "end_time": None, "driver_exit_code": None, "message": f"token={SECRET}"}
        command = f"rayswift sft --model m --hub_token {SECRET}"
        return [
            SimpleNamespace(submission_id="raysubmit_2", job_id="02", start_time=2000, entrypoint=command, **job),
            SimpleNamespace(submission_id="raysubmit_1", job_id="01", start_time=1000, entrypoint=command, **job),
            SimpleNamespace(submission_id=None, job_id="03", start_time=3000, entrypoint="python 'x", **job),
        ]

    def get_job_logs(self, job: str) -> str:
        return f"{job}\nkey {SECRET}\n\x1b[A\x1b]0;title\x07bar\r50%\nlast\n"

    def stop_job(self, job: str) -> None:
        self.stopped.append(job)

    def get_job_status(self, _job: str) -> Any:
        from ray.job_submission import JobStatus

        return JobStatus.STOPPED

    def _do_request(self, _method: str, path: str, params: dict[str, Any], timeout: int) -> Any:
        content: Any = {"/api/serve/applications/": json.dumps({"applications": APPS})}.get(path, "{}")
        if path == "/api/v0/logs/file":
            content = self.logs[params["actor_id"]]
        if path == "/api/cluster_status":
            gone = "".join(f" gpu: NodeTerminated (instance_id: {number})\n" for number in (4, 5))
            text = f"Recent failures:\n{gone} spot: LaunchFailed (latest_attempt: 02:46:57) - no quota\n"
            content = json.dumps({"data": {"clusterStatus": text}})
        return SimpleNamespace(status_code=200, content=content.encode())


@pytest.fixture
def client(monkeypatch: pytest.MonkeyPatch) -> Client:
    import ray.util.state

    def node(address: str, state: str = "ALIVE", **more: Any) -> Any:
        described = {"node_id": f"id-{address}", "is_head_node": False, "state_message": None, "end_time_ms": 0}
        return SimpleNamespace(node_ip=address, state=state, start_time_ms=50_000, **(described | more))

    nodes = [
        node("10.0.0.1", is_head_node=True, resources_total={"memory": 2**35, "node:10.0.0.1": 1.0}, labels={}),
        node("10.0.0.2", resources_total={"GPU": 8.0, "CPU": 96.0}, labels={"ray-subcluster": "train"}),
        node("10.0.0.3", resources_total={"GPU": 8.0, "CPU": 96.0}, labels={"ray-subcluster": "train"}),
        node("10.0.0.4", "DEAD", resources_total={}, labels={}, end_time_ms=90_000,
             state_message="Unexpected termination: health check failed"),
        node("10.0.0.5", "DEAD", resources_total={}, labels={}, end_time_ms=90_000,
             state_message="Terminated due to idle (no Ray activity)"),
    ]  # fmt: skip
    actors = {
        "EventQueue": [SimpleNamespace(actor_id="q", state="ALIVE", job_id="01", node_id="id-10.0.0.1")],
        "RayTrainWorker": [
            SimpleNamespace(state="ALIVE", job_id="01", node_id=f"id-10.0.0.{n}") for n in (2, 2, 3, 3)
        ] + [SimpleNamespace(state="DEAD", job_id="01", node_id="id-10.0.0.3")],
    }  # fmt: skip
    monkeypatch.setattr(ray.util.state, "list_nodes", lambda **_: nodes)
    monkeypatch.setattr(ray.util.state, "list_actors", lambda filters, **_: actors[filters[0][2]])
    monkeypatch.setattr(cluster_state.time, "time", lambda: NOW)
    client = Client()
    for module in ("jobs", "status"):
        monkeypatch.setattr(f"rayswift.cli.{module}.connect_client", lambda _address: client)
    return client


def test_a_run_is_what_its_notes_say() -> None:
    run = describe_run(RUN, True, NOW)
    assert run is not None
    assert (run["state"], run["step"], run["loss"], run["checkpoint"], run["attempts"]) == ("running", 60, 1.5, 40, 2)
    # 20 steps in 200 s since the second attempt began; those before it, some of them lost, do not count.
    assert (run["steps_per_second"], run["eta_seconds"]) == (0.1, 400)
    assert (run["goodput"], run["data_wait"], run["mfu"]) == (0.9, 0.02, None)
    ended = describe_run(RUN, False, NOW)
    assert ended is not None
    assert (ended["state"], ended["eta_seconds"]) == ("stopped", None)
    done = describe_run([*RUN, {"time": 600, "step": 100}], False, NOW)
    assert done is not None
    assert done["state"] == "finished"
    assert describe_run(RUN[1:], True, NOW) is None
    first = describe_run(RUN[:1], True, NOW)
    assert first is not None
    assert (first["step"], first["eta_seconds"]) == (0, None)


def test_rates_are_of_the_last_seconds_and_none_when_nothing_happened_since(client: Client) -> None:
    [one, other] = deployments(client, NOW)  # type: ignore[arg-type]
    assert (one["name"], one["status"], one["gateways"]) == ("rayswift", "deploying", 1)
    assert (one["requests/s"], one["tokens/s"], one["requests"]) == (4.0, 100.0, 30)
    model = {"name": "qwen", "replicas": 2, "wanted": 3, "nodes": {"10.0.0.2": 2}}
    assert one["models"] == [model]
    assert other["name"] == "other"
    [later, _] = deployments(client, NOW + 60)  # type: ignore[arg-type]
    assert (later["requests/s"], later["requests"]) == (0, 30)
    assert "digest" not in json.dumps(one)


def test_the_status_names_nodes_pools_runs_deployments_and_jobs(
    client: Client, capsys: pytest.CaptureFixture[str]
) -> None:
    assert status([]) == 0
    text = capsys.readouterr().out
    assert SECRET not in text
    for line in (
        "3 nodes alive, 2 dead", "  10.0.0.1        head     memory 32 GiB", "2 pools",
        "  train           2 nodes: CPU 192, GPU 16", "sft of Qwen, running, since",
        "step 60/100, loss 1.5000, 80 tokens/s, goodput 90.0%, 2% waiting for data, 6m left, checkpoint-40",
        "on 10.0.0.2 × 2, 10.0.0.3 × 2  (raysubmit_1)", "4.0 requests/s  100 tokens/s",
        "qwen  2/3 replicas on 10.0.0.2 × 2", "3 jobs", "rayswift sft --model m --hub_token '***'",
        "failed: worker 10.0.0.4: Unexpected termination: health check failed", "failed: spot: LaunchFailed",
    ):  # fmt: skip
        assert line in text, line
    assert "NodeTerminated" not in text
    assert "10.0.0.5" not in text


def test_the_json_and_the_page_hold_no_secret_and_no_markup_of_others(
    client: Client, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert status(["--json"]) == 0
    state = json.loads(capsys.readouterr().out)
    assert [row["loss"] for row in state["runs"][0]["rows"]] == [2.0, 1.5]
    assert state["runs"][0]["nodes"] == {"10.0.0.2": 2, "10.0.0.3": 2}
    assert status(["--html", str(tmp_path / "page.html")]) == 0
    page = (tmp_path / "page.html").read_text()
    assert SECRET not in page + json.dumps(state)
    assert "/nfs/v0&lt;b&gt;" in page
    assert "<b>" not in page
    assert "<script" not in page
    assert not re.search(r"(src|href)=", page)
    assert page.count('class="line"') == 2  # loss and tokens/s have two points each
    assert page.count("<rect") == 5 + 3 + 1  # nodes, jobs and the run
    with pytest.raises(UserError, match=r"--html .*: cannot be written"):
        status(["--html", str(tmp_path / "no" / "page.html")])


@pytest.mark.parametrize(
    ("state", "why", "is_lost"),
    [
        ("alive", None, False),
        ("dead", "Expected termination: received SIGTERM", False),
        ("dead", "Terminated due to idle (no Ray activity)", False),
        ("dead", "Terminated due to preemption: spot", True),
        ("dead", "Unexpected termination: health check failed", True),
        ("dead", None, True),
    ],
)
def test_the_timeline_shows_a_lost_node_apart_from_one_that_was_not_needed(
    state: str, why: str | None, is_lost: bool
) -> None:
    node = {"pool": "worker", "address": "a", "started": 1, "ended": 2, "state": state, "why": why}
    drawn = timeline({"time": 3, "nodes": [node], "jobs": [], "runs": []})
    assert ('class="bad"' in drawn, 'class="node"' in drawn) == (is_lost, not is_lost)


def test_what_the_autoscaler_does_is_said() -> None:
    text = (
        "======== Autoscaler status ========\nNode status\n-----\nActive:\n 1 head\nPending:\n"
        " 10.0.0.9: gpu-8xa100, setting-up\nRecent failures:\n (no failures)\n\nResources\n-----\nTotal Usage:\n 0/1\n"
        "\nTotal Demands:\n {'GPU': 1.0} * 8 (PACK): 1+ pending placement groups\n"
    )
    assert autoscaler_lines(text) == {
        "pending": ["10.0.0.9: gpu-8xa100, setting-up"], "failures": [],
        "demands": ["{'GPU': 1.0} * 8 (PACK): 1+ pending placement groups"],
    }  # fmt: skip


def test_jobs_are_listed_without_those_that_only_connected(client: Client, capsys: pytest.CaptureFixture[str]) -> None:
    assert jobs.jobs([]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == ["raysubmit_1", "raysubmit_2"]
    assert jobs.jobs(["--json", "--all"]) == 0
    text = capsys.readouterr().out
    assert [job["id"] for job in json.loads(text)] == ["raysubmit_1", "raysubmit_2", "03"]
    assert SECRET not in text
    assert SECRET not in json.dumps(job_list(client))  # type: ignore[arg-type]


def test_a_log_is_that_of_the_newest_job_without_secrets_and_control_characters(
    client: Client, capsys: pytest.CaptureFixture[str]
) -> None:
    assert jobs.logs([]) == 0
    assert capsys.readouterr().out == "raysubmit_2\nkey ***\n\\u001b]0;title\\u0007bar\r50%\nlast\n"
    assert jobs.logs(["raysubmit_1", "--tail", "1"]) == 0
    assert capsys.readouterr().out == "last\n"


def test_jobs_are_stopped(client: Client, capsys: pytest.CaptureFixture[str]) -> None:
    assert jobs.stop(["raysubmit_1", "raysubmit_2"]) == 0
    assert client.stopped == ["raysubmit_1", "raysubmit_2"]
    assert capsys.readouterr().out == "raysubmit_1: stopped\nraysubmit_2: stopped\n"


@pytest.mark.parametrize(
    ("call", "words", "message"),
    [
        (jobs.logs, ["nope"], "nope: no such job; rayswift jobs lists them"),
        (jobs.logs, ["03"], "03 was not submitted but connected"),
        (jobs.logs, ["--tail", "0"], "--tail 0: expected a whole number of lines, at least 1"),
        (jobs.logs, ["-f", "--tail", "3"], "not allowed with argument"),
        (jobs.stop, ["raysubmit_1", "nope"], "nope: no such job"),
        (jobs.stop, [], "rayswift stop --help explains"),
        (status, ["--jsn"], "rayswift status --help explains"),
    ],
)
def test_mistakes_are_named(client: Client, call: Callable[[list[str]], int], words: list[str], message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        call(words)
    assert client.stopped == []


def test_a_cluster_without_jobs_says_so(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "list_jobs", list)
    with pytest.raises(UserError, match="no job that was submitted"):
        jobs.logs([])


def test_durations_are_short() -> None:
    assert [duration(seconds) for seconds in (5, 725, 11_100, 187_200)] == ["5s", "12m", "3h 5m", "2d 4h"]


def test_a_run_that_is_silent_is_named(client: Client) -> None:
    state = cluster_state.cluster_state(client)  # type: ignore[arg-type]
    assert any("silent for 8m" in line for line in status_lines(state))

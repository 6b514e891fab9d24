"""What a cluster does, as one dictionary: nodes, pools, jobs, runs, deployments. All of it comes from its dashboard."""

from __future__ import annotations

import json
import re
import time
from collections import Counter
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from rayswift import private
from rayswift.cluster.board import read_notes
from rayswift.redaction import redact_command, redact_text

if TYPE_CHECKING:
    from ray.job_submission import JobSubmissionClient

#: Ended runs that are shown, the newest; and the lines of a log that are enough for one (`board.RunBoard.FACTS_EVERY`).
ENDED_RUNS, LOG_LINES = 20, 300
_LABELS = ("ray-subcluster", "ray.io/node-group")


def cluster_state(client: JobSubmissionClient, *, whole_logs: bool = False) -> dict[str, Any]:
    """The state of the cluster now. ``whole_logs``: with every row of the runs, for curves."""
    from ray.util.state import list_actors, list_nodes

    address = client.get_address()
    now = time.time()
    nodes = [_node(node) for node in list_nodes(address=address, detail=True, limit=10_000)]
    jobs = job_list(client)

    def actors(name: str) -> list[Any]:
        return list_actors(address=address, filters=[("class_name", "=", name)], limit=10_000)

    queues = sorted(actors("EventQueue"), key=lambda actor: (actor.state == "ALIVE", actor.job_id), reverse=True)
    alive = sum(actor.state == "ALIVE" for actor in queues)
    workers = [actor for actor in actors("RayTrainWorker") if actor.state == "ALIVE"] if alive else []
    addresses = {node["id"]: node["address"] for node in nodes}
    runs = []
    for actor in queues[: alive + ENDED_RUNS]:
        log = _log(client, actor.actor_id, -1 if whole_logs else LOG_LINES)
        where = Counter(addresses.get(one.node_id, "?") for one in workers if one.job_id == actor.job_id)
        job = next((job for job in jobs if job["driver"] == actor.job_id), None)
        if run := describe_run(list(read_notes(log)), actor.state == "ALIVE", now):
            runs.append({**run, "job": job["id"] if job else actor.job_id, "nodes": dict(where)})
    return {
        "time": now, "address": address, "nodes": nodes, "pools": pools(nodes),
        "autoscaler": _autoscaler(client, nodes), "jobs": jobs, "runs": runs, "deployments": deployments(client, now),
    }  # fmt: skip


def job_list(client: JobSubmissionClient) -> list[dict[str, Any]]:
    """The cluster's jobs, the oldest first; what they were started with has its secrets masked."""
    found = []
    for job in sorted(client.list_jobs(), key=lambda job: job.start_time or 0):
        found.append({
            "id": job.submission_id or job.job_id, "driver": job.job_id, "submitted": bool(job.submission_id),
            "status": job.status.lower(), "entrypoint": redact_command(job.entrypoint or ""),
            "started": _seconds(job.start_time), "ended": _seconds(job.end_time), "exit_code": job.driver_exit_code,
            "message": redact_text(" ".join((job.message or "").split())),
        })  # fmt: skip
    return found


def _seconds(milliseconds: int | None) -> float | None:
    return milliseconds / 1000 if milliseconds else None


def _node(node: Any) -> dict[str, Any]:
    labels = node.labels or {}
    pool = "head" if node.is_head_node else next((labels[name] for name in _LABELS if name in labels), "worker")
    resources, hidden = sorted((node.resources_total or {}).items()), ("node:", "object_store")
    return {
        "id": node.node_id, "address": node.node_ip, "role": "head" if node.is_head_node else "worker", "pool": pool,
        "state": node.state.lower(), "why": node.state_message, "labels": labels,
        "started": _seconds(node.start_time_ms), "ended": _seconds(node.end_time_ms),
        "resources": {name: amount for name, amount in resources if not name.startswith(hidden)},
    }  # fmt: skip


def is_lost(node: Mapping[str, Any]) -> bool:
    """Whether it ended otherwise than by being stopped or idle, in Ray's words."""
    as_meant = ("Expected termination", "Terminated due to idle")
    return node["state"] == "dead" and not (node["why"] or "").startswith(as_meant)


def pools(nodes: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Nodes that are alive by their pool (the label ``ray-subcluster``, else their node group), and their sum."""
    found: dict[str, dict[str, Any]] = {}
    for node in nodes:
        if node["state"] == "alive":
            pool = found.setdefault(node["pool"], {"pool": node["pool"], "nodes": 0, "resources": Counter()})
            pool["nodes"] += 1
            pool["resources"].update(node["resources"])
    return [{**pool, "resources": dict(pool["resources"])} for _, pool in sorted(found.items())]


def describe_run(notes: list[dict[str, Any]], is_alive: bool, now: float) -> dict[str, Any] | None:
    """A run by its notes, None where they do not say which it is.

    ``eta_seconds`` goes by the steps since the last attempt began; ``rows`` are those of the log, with step and time.
    """
    facts = next((one["run"] for one in reversed(notes) if "run" in one), None)
    if facts is None:
        return None
    last_attempt = max((number for number, one in enumerate(notes) if "attempt" in one), default=0)
    reached = [(one["time"], one.get("step", one.get("attempt"))) for one in notes[last_attempt:]]
    steps = [(float(when), int(step)) for when, step in reached if step is not None]
    rows = [{**one["row"], "step": one["step"], "time": one["time"]} for one in notes if "row" in one]
    (first_time, first), (last_time, step) = (steps[0], steps[-1]) if steps else ((now, 0), (now, 0))
    speed = (step - first) / (last_time - first_time) if last_time > first_time else 0.0
    left = facts["max_steps"] - step
    state = "running" if is_alive else "finished" if left <= 0 else "stopped"
    return {
        **facts, "state": state, "step": step,
        **{name: _last(rows, name) for name in ("loss", "eval_loss", "tokens/s", "goodput", "mfu", "data_wait")},
        "steps_per_second": round(speed, 4),
        "eta_seconds": round(left / speed) if is_alive and speed else None,
        "checkpoint": _last(notes, "checkpoint"), "attempts": sum("attempt" in one for one in notes),
        "heard": notes[-1]["time"], "rows": rows,
    }  # fmt: skip


def _last(notes: list[dict[str, Any]], name: str) -> Any:
    return next((one[name] for one in reversed(notes) if name in one), None)


def deployments(client: JobSubmissionClient, now: float) -> list[dict[str, Any]]:
    """What Ray Serve serves: each `rayswift deploy` with its models, replicas and rates, and others' applications."""
    apps = json.loads(_get(client, "/api/serve/applications/") or "{}").get("applications") or {}
    doors: dict[str, list[dict[str, Any]]] = {}
    for name, app in apps.items():
        if "models" in _args_of(app):
            doors.setdefault(re.sub(r"--[0-9a-f]+$", "", name), []).append(app)
    ours = {f"{name}--state" for name in doors} | {name for name, app in apps.items() if "models" in _args_of(app)}
    found = []
    for name, gateways in doors.items():
        args = _args_of(gateways[0])
        replicas = [one for app in gateways for one in _replicas(app)]
        logs = [_log(client, one["actor_id"], LOG_LINES) for one in replicas if one.get("actor_id")]
        ours |= {model["app"] for model in args["models"]}
        found.append({
            "name": name, "status": _status([*gateways, *(apps.get(m["app"], {}) for m in args["models"])]),
            "models": [{"name": m["name"], **_counts(apps.get(m["app"], {}))} for m in args["models"]],
            "gateways": len(replicas), **_rates([list(read_notes(log)) for log in logs], now),
        })  # fmt: skip
    others = [(name, app) for name, app in apps.items() if name not in ours]
    found += [
        {"name": name, "status": _status([app]), "models": [{"name": name, **_counts(app)}]} for name, app in others
    ]
    return found


def _args_of(app: Mapping[str, Any]) -> dict[str, Any]:
    return (app.get("deployed_app_config") or {}).get("args") or {}


def _status(apps: list[Mapping[str, Any]]) -> str:
    states = {str(app.get("status", "not_started")).lower() for app in apps}
    return "running" if states == {"running"} else ", ".join(sorted(states - {"running"}))


def _replicas(app: Mapping[str, Any]) -> list[dict[str, Any]]:
    return [one for deployment in (app.get("deployments") or {}).values() for one in deployment.get("replicas", [])]


def _counts(app: Mapping[str, Any]) -> dict[str, Any]:
    """Replicas that run, of how many, and on which nodes."""
    replicas = _replicas(app)
    wanted = sum(one.get("target_num_replicas") or 0 for one in (app.get("deployments") or {}).values())
    running = [one for one in replicas if one["state"] == "RUNNING"]
    return {"replicas": len(running), "wanted": wanted, "nodes": dict(Counter(one["node_ip"] for one in running))}


def _rates(gateways: list[list[dict[str, Any]]], now: float) -> dict[str, Any]:
    """The sums over gateways: rates between their last two notes, 0 where nothing has changed since."""
    sums: Counter[str] = Counter()
    for notes in gateways:
        looks = [one for one in notes if "counters" in one]
        if not looks:
            continue
        last, before = looks[-1], looks[-2] if len(looks) > 1 else looks[-1]
        sums.update({name: last["counters"][name] for name in ("requests", "errors", "tokens", "running", "waiting")})
        # A note is written only when something has changed: the time before it may have been quiet.
        seconds = min(max(last["time"] - before["time"], 1e-6), last["seconds"])
        if now - last["time"] < 3 * last["seconds"] and last is not before:
            for name in ("requests", "tokens"):
                sums[f"{name}/s"] += (last["counters"][name] - before["counters"][name]) / seconds
    names = ("requests", "errors", "tokens", "running", "waiting", "requests/s", "tokens/s")
    return {name: round(sums[name], 2) for name in names}


def _autoscaler(client: JobSubmissionClient, nodes: list[dict[str, Any]]) -> dict[str, list[str]]:
    """What the autoscaler starts, what failed, and what is asked for, in its own words, a line each. The nodes that it
    calls terminated are all that ended, idle ones too: those that were lost, with Ray's reason, stand for them."""
    answer = json.loads(_get(client, "/api/cluster_status", format="1") or "{}")
    found = autoscaler_lines(str((answer.get("data") or {}).get("clusterStatus") or ""))
    lost = [redact_text(f"{node['pool']} {node['address']}: {node['why']}") for node in nodes if is_lost(node)]
    return {**found, "failures": [line for line in found["failures"] if ": NodeTerminated (" not in line] + lost}


def autoscaler_lines(status: str) -> dict[str, list[str]]:
    """`ray status`'s text by section: ``pending``, ``failures``, ``demands``; one that says ``(no …)`` is empty."""
    names = {"Pending": "pending", "Recent failures": "failures", "Total Demands": "demands",
             "Pending Demands": "demands"}  # fmt: skip
    found: dict[str, list[str]] = {name: [] for name in names.values()}
    section = ""
    for line in status.splitlines():
        if not line.startswith(" "):
            section = names.get(line.rstrip().rstrip(":"), "")
        elif section and not line.strip().startswith("(n"):
            found[section].append(redact_text(line.strip()))
    return found


def _log(client: JobSubmissionClient, actor_id: str, lines: int) -> str:
    path = "/api/v0/logs/file"
    return _get(client, path, actor_id=actor_id, lines=lines, suffix="out").decode(errors="replace")


def _get(client: JobSubmissionClient, path: str, **params: Any) -> bytes:
    try:
        return private.dashboard_get(client, path, **params)
    except private.NotAvailable as error:
        private.report("Ray's dashboard", f"runs and deployments are not shown ({error})")
        return b""

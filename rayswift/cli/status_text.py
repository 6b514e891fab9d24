"""The state of a cluster (`rayswift.cli.cluster_state`) as text."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from typing import Any

from rayswift.cli.jobs import job_lines


def status_lines(state: Mapping[str, Any]) -> Iterator[str]:
    """The state as text."""
    alive = [node for node in state["nodes"] if node["state"] == "alive"]
    yield f"{len(alive)} nodes alive, {len(state['nodes']) - len(alive)} dead"
    for node in sorted(alive, key=lambda node: (node["role"], node["pool"], node["address"])):
        yield f"  {node['address']:<15} {node['pool']:<8} {resources_line(node['resources'])}"
    if len(state["pools"]) > 1:
        yield f"{len(state['pools'])} pools"
        for pool in state["pools"]:
            yield f"  {pool['pool']:<15} {pool['nodes']} nodes: {resources_line(pool['resources'])}"
    words = {"pending": "starting", "demands": "asked for", "failures": "failed"}
    for name, word in words.items():
        yield from (f"  {word}: {line}" for line in state["autoscaler"][name])
    yield f"{len(state['runs'])} runs"
    for run in state["runs"]:
        yield f"  {run['run']}"
        yield f"    {run_line(run, state['time'])}"
    yield f"{len(state['deployments'])} deployments"
    for one in state["deployments"]:
        yield f"  {one['name']}  {one['status']}{_load(one)}"
        for model in one["models"]:
            yield f"    {model['name']}  {model['replicas']}/{model['wanted']} replicas{_places(model['nodes'])}"
    yield f"{len(state['jobs'])} jobs"
    yield from (f"  {line}" for line in job_lines(state["jobs"]))


def resources_line(resources: Mapping[str, float]) -> str:
    """``CPU 96, GPU 8, memory 1000 GiB``."""
    return ", ".join(
        f"memory {amount / 2**30:.0f} GiB" if name == "memory" else f"{name} {amount:g}"
        for name, amount in resources.items()
    )


def run_line(run: Mapping[str, Any], now: float) -> str:
    """What a run is at."""
    words = [f"{run['command']} of {run['model']}", f"{run['state']}, {_time(run['since'])}"]
    words.append(f"step {run['step']}/{run['max_steps']}")
    formats = {"loss": "loss {:.4f}", "eval_loss": "eval_loss {:.4f}", "tokens/s": "{:.0f} tokens/s",
               "goodput": "goodput {:.1%}", "data_wait": "{:.0%} waiting for data"}  # fmt: skip
    words += [text.format(run[name]) for name, text in formats.items() if run[name] is not None]
    if run["eta_seconds"] is not None:
        words.append(f"{duration(run['eta_seconds'])} left")
    if run["checkpoint"] is not None:
        words.append(f"checkpoint-{run['checkpoint']}")
    if run["state"] == "running" and now - run["heard"] > 300:
        words.append(f"silent for {duration(now - run['heard'])}")
    return ", ".join(words) + _places(run["nodes"]) + f"  ({run['job']})"


def _load(one: Mapping[str, Any]) -> str:
    if "requests/s" not in one:
        return ""
    return (f"  {one['gateways']} gateways  {one['requests/s']:.1f} requests/s  {one['tokens/s']:.0f} tokens/s  "
            f"{one['running']} running  {one['waiting']} waiting  {one['errors']} errors")  # fmt: skip


def _places(nodes: Mapping[str, int]) -> str:
    shown = [f"{address} × {count}" for address, count in sorted(nodes.items())]
    return f" on {', '.join(shown)}" if shown else ""


def _time(seconds: float) -> str:
    return f"since {time.strftime('%Y-%m-%d %H:%M:%S', time.localtime(seconds))}"


def duration(seconds: float) -> str:
    """``45s``, ``12m``, ``3h 5m``, ``2d 4h``."""
    minutes, left = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    if days:
        return f"{days}d {hours}h"
    return f"{hours}h {minutes}m" if hours else f"{minutes}m" if minutes else f"{left}s"

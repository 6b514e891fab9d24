"""``/metrics``: the gateways' counters, then what each replica's engine counts, told apart by a label."""

from __future__ import annotations

import re
from typing import Any

_COUNTERS = {
    "requests": ("rayswift_requests_total", "counter", "Requests received."),
    "errors": ("rayswift_errors_total", "counter", "Requests answered with an error by the gateway."),
    "tokens": ("rayswift_generated_tokens_total", "counter", "Generated tokens (a piece of a stream counts as one)."),
    "retries": ("rayswift_retries_total", "counter", "Requests sent to another replica because one failed."),
    "resumed": ("rayswift_resumed_streams_total", "counter", "Streams that another replica resumed."),
    "leases": ("rayswift_leases_total", "counter", "Leases of replicas' places that were asked of Serve."),
    "kept_leases": ("rayswift_kept_leases_total", "counter", "Requests that found a lease which was kept."),
    "running": ("rayswift_running_requests", "gauge", "Requests in progress."),
    "waiting": ("rayswift_waiting_requests", "gauge", "Requests that wait for a replica."),
}  # fmt: skip
_SAMPLE = re.compile(r"^([a-zA-Z_:][a-zA-Z0-9_:]*)(?:\{(.*)\})? (.*)$")


def as_prometheus(counters: dict[str, Any], engines: dict[str, dict[str, str]]) -> str:
    """Prometheus text.

    Args:
        counters: the sums over all gateways.
        engines: model → replica → the replica's own text, whose samples get the replica's name.
    """
    lines: list[str] = []
    for name, (metric, kind, text) in _COUNTERS.items():
        lines += [f"# HELP {metric} {text}", f"# TYPE {metric} {kind}", f"{metric} {counters[name]}"]
    lines += ["# HELP rayswift_responses_total Responses by status.", "# TYPE rayswift_responses_total counter"]
    lines += [f'rayswift_responses_total{{status="{s}"}} {count}' for s, count in sorted(counters["by_status"].items())]
    families: dict[str, list[str]] = {}
    for model, replicas in engines.items():
        for replica, text in replicas.items():
            _add(families, text, f'served_model="{model}",replica="{replica}"')
    return "\n".join([*lines, *(line for family in families.values() for line in family)]) + "\n"


def _add(families: dict[str, list[str]], text: str, labels: str) -> None:
    """Add the samples of one replica to their families (a family's HELP and TYPE stand once, before its samples)."""
    current = ""
    for line in text.splitlines():
        if line.startswith("# "):
            current = line.split(" ", 3)[2]
            if line not in families.setdefault(current, []):
                families[current].append(line)
        elif found := _SAMPLE.match(line):
            name, own, value = found.groups()
            families.setdefault(current, []).append(f"{name}{{{','.join(filter(None, (own, labels)))}}} {value}")

"""``rayswift status --html``: one page that needs nothing else, with the cluster's timeline and the runs' curves.

What others wrote (names, command lines) is escaped, and the page's own policy forbids scripts and requests.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from rayswift.cli.cluster_state import is_lost
from rayswift.cli.status_text import resources_line, run_line

WIDTH, HEIGHT, LEFT = 900, 180, 70
_CURVES = ("loss", "eval_loss", "tokens/s", "learning_rate", "grad_norm", "goodput", "data_wait")
_STYLE = """
body{font:14px/1.45 system-ui,sans-serif;margin:2rem auto;max-width:1040px;padding:0 1rem;color:#222;background:#fff}
h1{font-size:1.4rem}h2{font-size:1.1rem;margin-top:2rem;border-bottom:1px solid #ddd}
h3{font-size:.95rem;margin:.8rem 0 0}
table{border-collapse:collapse;width:100%}td,th{padding:.2rem .6rem .2rem 0;text-align:left;vertical-align:top}
td.code{font-family:ui-monospace,monospace;font-size:12px;word-break:break-all}
svg{display:block;max-width:100%}svg text{font-size:11px;fill:#555}.line{fill:none;stroke:#2b6cb0;stroke-width:1.5}
.axis{stroke:#bbb}.node{fill:#38a169}.job{fill:#2b6cb0}.run{fill:#805ad5}.bad{fill:#c53030}
@media (prefers-color-scheme:dark){body{background:#181818;color:#ddd}svg text{fill:#aaa}h2{border-color:#444}}
"""


def status_page(state: Mapping[str, Any]) -> str:
    """The page of a state that `cluster_state` gave."""
    when = time.strftime("%Y-%m-%d %H:%M:%S %Z", time.localtime(state["time"]))
    pools = [(pool["pool"], pool["nodes"], resources_line(pool["resources"])) for pool in state["pools"]]
    waiting = [(name, line) for name, lines in state["autoscaler"].items() for line in lines]
    deployments = [
        (one["name"], one["status"], model["name"], f"{model['replicas']}/{model['wanted']}",
         one.get("requests/s", ""), one.get("tokens/s", ""), one.get("running", ""), one.get("waiting", ""))
        for one in state["deployments"] for model in one["models"]
    ]  # fmt: skip
    jobs = [(job["id"], job["status"], job["entrypoint"]) for job in reversed(state["jobs"])]
    parts = [
        f"<h1>Ray cluster {escape(state['address'])}</h1><p>{when}</p>",
        "<h2>Timeline</h2>", timeline(state),
        "<h2>Pools</h2>", _table(("pool", "nodes", "resources"), pools),
        _table(("autoscaler", ""), waiting) if waiting else "",
        "<h2>Runs</h2>", *(_run(run, state["time"]) for run in state["runs"]),
        "<h2>Deployments</h2>",
        _table(("name", "status", "model", "replicas", "requests/s", "tokens/s", "running", "waiting"), deployments),
        "<h2>Jobs</h2>", _table(("id", "status", "command"), jobs),
    ]  # fmt: skip
    policy = "default-src 'none'; style-src 'unsafe-inline'"
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>RaySwift: cluster</title>'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}"><style>{_STYLE}</style></head><body>\n'
        + "\n".join(filter(None, parts))
        + "\n</body></html>\n"
    )


def _table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    cells = "".join(f"<th>{escape(name)}</th>" for name in head)
    lines = ["".join(f'<td class="code">{escape(str(cell))}</td>' for cell in row) for row in rows]
    return f"<table><tr>{cells}</tr>{''.join(f'<tr>{line}</tr>' for line in lines)}</table>" if rows else "<p>none</p>"


def _run(run: Mapping[str, Any], now: float) -> str:
    curves = []
    for name in _CURVES:
        points = [(row["step"], row[name]) for row in run["rows"] if name in row and math.isfinite(row[name])]
        if len(points) > 1:
            curves.append(f"<h3>{escape(name)}</h3>{curve(points)}")
    return f"<h3>{escape(str(run['run']))}</h3><p>{escape(run_line(run, now))}</p>{''.join(curves)}"


def curve(points: Sequence[tuple[float, float]]) -> str:
    """A line through the points, with the least and the greatest of both axes."""
    xs, ys = [x for x, _ in points], [y for _, y in points]
    low, high = min(ys), max(ys)
    span_x, span_y = (max(xs) - min(xs)) or 1, (high - low) or 1
    placed = [
        f"{LEFT + (x - min(xs)) / span_x * (WIDTH - LEFT - 10):.1f},{10 + (high - y) / span_y * (HEIGHT - 40):.1f}"
        for x, y in points
    ]
    return (
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img">'
        f'<line class="axis" x1="{LEFT}" y1="{HEIGHT - 28}" x2="{WIDTH - 10}" y2="{HEIGHT - 28}"/>'
        f'<polyline class="line" points="{" ".join(placed)}"/>'
        f'<text x="0" y="16">{high:.4g}</text><text x="0" y="{HEIGHT - 28}">{low:.4g}</text>'
        f'<text x="{LEFT}" y="{HEIGHT - 12}">step {min(xs):g}</text>'
        f'<text x="{WIDTH - 10}" y="{HEIGHT - 12}" text-anchor="end">step {max(xs):g}</text></svg>'
    )


def timeline(state: Mapping[str, Any]) -> str:
    """When each node, job and run began and ended."""
    bars = [("node", f"{node['pool']} {node['address']}", node["started"], node["ended"], is_lost(node))
            for node in state["nodes"]]  # fmt: skip
    bars += [("job", f"{job['id']}", job["started"], job["ended"], job["status"] == "failed") for job in state["jobs"]]
    bars += [("run", str(run["run"]).rstrip("/").rpartition("/")[2], run["since"],
              None if run["state"] == "running" else run["heard"], run["state"] == "stopped")
             for run in state["runs"]]  # fmt: skip
    bars = sorted((bar for bar in bars if bar[2]), key=lambda bar: (bar[0] != "node", bar[2]))
    if not bars:
        return "<p>none</p>"
    now, begin, label = state["time"], min(bar[2] for bar in bars), 260
    scale = (WIDTH - label - 10) / max(now - begin, 1)
    lines = []
    for number, (kind, name, start, end, is_bad) in enumerate(bars):
        y, width = 20 * number, max(((end or now) - start) * scale, 1.5)
        shown = escape(name if len(name) < 40 else f"…{name[-38:]}")
        lines.append(
            f'<text x="0" y="{y + 13}">{shown}</text><rect class="{"bad" if is_bad else kind}" '
            f'x="{label + (start - begin) * scale:.1f}" y="{y + 3}" width="{width:.1f}" height="13">'
            f"<title>{escape(name)}: {_clock(start)} to {_clock(end) if end else 'now'}</title></rect>"
        )
    y = 20 * len(bars)
    return (
        f'<svg viewBox="0 0 {WIDTH} {y + 20}" role="img">{"".join(lines)}<text x="{label}" y="{y + 14}">{_clock(begin)}'
        f'</text><text x="{WIDTH - 10}" y="{y + 14}" text-anchor="end">{_clock(now)}</text></svg>'
    )


def _clock(seconds: float) -> str:
    return time.strftime("%m-%d %H:%M:%S", time.localtime(seconds))

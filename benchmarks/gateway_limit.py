"""How many events of streams (SSE) the gateway passes: ``rayswift deploy`` with a fast upstream in place of an engine.

Streams of 50 events a second each (``sides/gateway_upstream.py``), more and more of them until the client
(``sides/stream_load.py``) gets less than nine tenths of what the upstream gives; the line has the most that came. With
1, 2 and 4 gateways on one port. Upstream, client and gateways share the machine's cores, so on a small one the sum over
several gateways says little. ``events_per_core``: events for each second of processor time that the gateways' processes
used, at the level that passed the most, where events come several at a time; ``events_per_core_64``: with 64 streams,
where they come one by one.

One line of JSON: ``gateway_limit``. There is no peer: ``--repository DIR`` measures another commit's gateway instead.

    python benchmarks/gateway_limit.py [--gateways 1 2 4] [--repository DIR]
"""

from __future__ import annotations

import os
import statistics
import sys
from pathlib import Path

from harness.environments import REPOSITORY
from harness.measure import SIDES, fail, print_line, run_side, scratch_folder, versions
from harness.options import pairs, parser
from harness.servers import Server, free_port, serving, wait_until_it_answers
from sides.gateway_upstream import MODEL, PACE

#: Streams at once, and how long they are counted.
LEVELS = (32, 64, 128, 256, 512, 1024)
ONE_BY_ONE = 64
SECONDS = 5.0
#: An answer does not end while it is counted.
MAX_TOKENS = 100_000
#: With less of what is given than this the gateway, or the machine, is at its limit.
ENOUGH = 0.9


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--gateways", type=int, nargs="+", help="gateways on the port (1, 2 and 4; --quick: 1)")
    options.add_argument("--repository", type=Path, default=REPOSITORY, help="checkout whose gateway is measured")
    given = options.parse_args()
    numbers = given.gateways or ([1] if given.quick else [1, 2, 4])
    levels = LEVELS[:2] if given.quick else LEVELS
    found: dict[int, list[dict[str, float]]] = {number: [] for number in numbers}
    with scratch_folder() as folder:
        for _ in range(pairs(given)):
            for number in numbers:
                found[number].append(limit(number, levels, folder, given.repository.resolve()))
    print_line(
        "gateway_limit",
        {
            "unit": "events/s",
            "better": "higher",
            "gateways": {number: middle(runs) for number, runs in found.items()},
            "pairs": pairs(given),
            "versions": versions("rayswift", "ray", "aiohttp", "uvicorn"),
        },
    )


def middle(runs: list[dict[str, float]]) -> dict[str, float]:
    """The median of each figure over the runs."""
    return {name: round(statistics.median(run[name] for run in runs), 2) for name in runs[0]}


def limit(number: int, levels: tuple[int, ...], folder: Path, repository: Path) -> dict[str, float]:
    """Deploy with so many gateways and load them more and more; the figures of the level that passed the most."""
    port, best, one_by_one = free_port(), {"events_per_s": 0.0}, 0.0
    command = [sys.executable, SIDES / "gateway_upstream.py", "--port", port, "--gateways", number]
    path = os.pathsep.join(filter(None, (str(repository), os.environ.get("PYTHONPATH"))))
    with serving(f"gateway-{number}", command, port, folder / "cache", PYTHONPATH=path) as server:
        wait_until_it_answers(server, MODEL)
        for streams in levels:
            for _ in range(2):  # a limit is where it falls short again
                passed = measure(server, port, streams, folder)
                print(f"{number} gateways, {streams} streams: {passed}", file=sys.stderr)
                best = max(best, passed, key=lambda one: one["events_per_s"])
                if passed["events_per_s"] >= ENOUGH * streams / PACE:
                    break
            else:
                break
            if streams == ONE_BY_ONE:
                one_by_one = passed["events_per_core"]
    return {**best, "events_per_core_64": one_by_one}


def measure(server: Server, port: int, streams: int, folder: Path) -> dict[str, float]:
    """One level: events per second, and per second of the gateways' processor time."""
    warm_up = 3 + streams / 30  # each stream takes a lease through Serve first
    gateways = [str(found.pid) for found in server.tree() if " ".join(found.cmdline()).strip().endswith(":Gateway")]
    load = [sys.executable, SIDES / "stream_load.py", "--port", str(port), "--streams", str(streams), "--max_tokens",
            str(MAX_TOKENS), "--warm_up", str(warm_up), "--seconds", str(SECONDS), "--pids", *gateways]  # fmt: skip
    result = run_side("stream_load", load, folder / "client")
    if result["wrong"]:
        fail("the gateway", f"refused or ended {result['wrong']} of {streams} streams", server.log)
    rate, share = result["events"] / result["seconds"], result["gateway_cpu_share"]
    return {
        "events_per_s": round(rate),
        "events_per_core": round(rate / share),
        "streams": streams,
        "gateway_cpu_share": round(share, 3),
        "client_cpu_share": round(result["client_cpu_share"], 3),
    }


if __name__ == "__main__":
    main()

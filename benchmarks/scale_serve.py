"""How many requests a gateway routes to 1, 50 and 500 replicas without engines, and what their number costs it.

The gateway, its leases and its connections are the product's, and Serve routes. Simulated are the replicas
(``sides/many_replicas.py``): addresses that answer at once, in at most 8 processes, as 500 processes do not fit on a
small machine. So Serve chooses among 8, and the gateway talks to 500; what Serve's own choice among 500 costs is
measured beside it (``serve_choice_us``, its class in this process), and what a question to every replica costs
(``/health``, ``/v1/models``, ``/metrics``) by its part for each process.

``kept``: whole answers on 64 connections, whose leases are kept from one request to the next; ``leased``: each request
takes a lease through Serve. ``per_core``: requests for each second of the gateway's processor time; gateway, client,
replicas and Ray share the machine's cores, so the sums of a small one say less.

One line of JSON: ``scale_serve``. There is no peer: ``--repository DIR`` measures another commit's gateway instead.

    python benchmarks/scale_serve.py [--replicas 1 50 500] [--repository DIR]
"""

from __future__ import annotations

import os
import statistics
import sys
import time
import urllib.request
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
from harness.environments import REPOSITORY
from harness.measure import SIDES, fail, print_line, run_side, scratch_folder, versions
from harness.options import pairs, parser
from harness.servers import Server, free_port, serving, wait_until_it_answers
from sides.gateway_upstream import MODEL

PROCESSES, CONNECTIONS, SECONDS = 8, 64, 5.0
#: Of a request whose lease is kept, and of one that is told that the replica is full.
MAX_TOKENS = {"kept": 16, "leased": 256}
ASKED = ("/health", "/v1/models", "/metrics")


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--replicas", type=int, nargs="+", help="(1, 50 and 500; --quick: 1 and 50)")
    options.add_argument("--repository", type=Path, default=REPOSITORY, help="checkout whose gateway is measured")
    given = options.parse_args()
    numbers = given.replicas or ([1, 50] if given.quick else [1, 50, 500])
    found: dict[int, list[dict[str, float]]] = {number: [] for number in numbers}
    with scratch_folder() as folder:
        for _ in range(pairs(given)):
            for number in numbers:
                found[number].append(measure(number, folder, given.repository.resolve()))
                print(f"{number} replicas: {found[number][-1]}", file=sys.stderr)
    middles = {number: middle(runs) for number, runs in found.items()}
    least, most = min(numbers), max(numbers)
    print_line(
        "scale_serve",
        {
            "ratio": round(middles[most]["leased_per_core"] / middles[least]["leased_per_core"], 3),
            "unit": f"requests per core with {most} replicas to those with {least}",
            "better": "higher",
            "replicas": middles,
            "spread": {number: spread([run["leased_per_core"] for run in runs]) for number, runs in found.items()},
            "serve_choice_us": {number: choice(number) for number in numbers},
            "pairs": pairs(given),
            "versions": versions("rayswift", "ray", "aiohttp", "uvicorn"),
        },
    )


def middle(runs: list[dict[str, float]]) -> dict[str, float]:
    """The median of each figure over the runs."""
    return {name: round(statistics.median(run[name] for run in runs), 2) for name in runs[0]}


def spread(values: list[float]) -> float:
    """(largest − smallest) / median."""
    return round((max(values) - min(values)) / statistics.median(values), 3)


def measure(number: int, folder: Path, repository: Path) -> dict[str, float]:
    """One deployment with so many addresses."""
    port, processes = free_port(), min(number, PROCESSES)
    command = [sys.executable, SIDES / "many_replicas.py", "--port", str(port), "--processes", str(processes),
               "--addresses", str(number)]  # fmt: skip
    path = os.pathsep.join(filter(None, (str(repository), os.environ.get("PYTHONPATH"))))
    with serving(f"replicas-{number}", command, port, folder / "cache", PYTHONPATH=path) as server:
        wait_until_it_answers(server, MODEL)
        gateway, controller = process_of(server, ":Gateway"), process_of(server, "ServeController")
        figures: dict[str, float] = {"processes": processes}
        for how, max_tokens in MAX_TOKENS.items():
            passed = load(server, port, max_tokens, gateway, folder)
            figures |= {f"{how}_{name}": value for name, value in passed.items()}
        figures["gateway_mib"] = gateway.memory_full_info().pss / 2**20
        for question in ASKED:
            figures[f"{question.rpartition('/')[2]}_cpu_ms"] = asked(port, question, gateway)
        before = sum(controller.cpu_times()[:2])
        time.sleep(10)
        figures["controller_idle_cpu_share"] = (sum(controller.cpu_times()[:2]) - before) / 10
    return figures


def process_of(server: Server, title: str) -> psutil.Process:
    """The process of the tree with these words in its title."""
    return next(found for found in server.tree() if title in " ".join(found.cmdline()))


def load(server: Server, port: int, max_tokens: int, gateway: psutil.Process, folder: Path) -> dict[str, float]:
    """Requests per second, and per second of the gateway's processor time."""
    program = [sys.executable, SIDES / "request_load.py", "--port", str(port), "--connections", str(CONNECTIONS),
               "--max_tokens", str(max_tokens), "--warm_up", "3", "--seconds", str(SECONDS), "--pids",
               str(gateway.pid)]  # fmt: skip
    result = run_side("request_load", program, folder / "client")
    if result["wrong"] > 0 or not result["answers"]:
        fail("the gateway", f"refused or lost {result['wrong']} requests and answered {result['answers']}", server.log)
    rate = result["answers"] / result["seconds"]
    return {"per_s": round(rate), "per_core": round(rate / result["cpu_shares"][0])}


def asked(port: int, path: str, gateway: psutil.Process, times: int = 20) -> float:
    """Milliseconds of the gateway's processor time that a question costs which it may ask every replica."""
    before = sum(gateway.cpu_times()[:2])
    for _ in range(times):
        with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=30) as answer:
            answer.read()
    return (sum(gateway.cpu_times()[:2]) - before) / times * 1000


def choice(number: int, times: int = 20_000) -> float:
    """Microseconds that Serve's router takes to draw two replicas out of so many."""
    import asyncio

    from ray.serve._private.request_router.pow_2_router import PowerOfTwoChoicesRequestRouter

    replicas = {f"replica-{one}": one for one in range(number)}
    ids = set(replicas)
    router: Any = SimpleNamespace(_replicas=replicas, apply_locality_routing=lambda pending_request: ids)

    async def draw() -> float:
        began = time.perf_counter()
        for _ in range(times):
            await PowerOfTwoChoicesRequestRouter.choose_replicas(router, [], None)
        return (time.perf_counter() - began) / times * 1e6

    return round(asyncio.run(draw()), 2)


if __name__ == "__main__":
    main()

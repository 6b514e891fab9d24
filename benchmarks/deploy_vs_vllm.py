"""Streaming chat: ``rayswift deploy`` against bare ``vllm serve`` and ``swift deploy`` of ms-swift 4.6.

The same engine (vLLM in float32, eager, the same context and cache) and the same questions on all sides, greedy
decoding, at most as many requests under way as each of ``--concurrency`` says. Timed by ``sides/chat_load.py``, in a
process of its own: requests/s, and the median time from sending a question to the first text of its answer. The
servers are started once and loaded in turn (A-B-A-B); those not loaded are stopped with SIGSTOP meanwhile and take
nothing from the machine. Both sides must have written the same texts: all of them where one request runs at a time;
with several in one batch, vLLM's own sums depend on the batch, so there ``same_texts`` is reported and has a floor.

One line of JSON for each peer: ``deploy_vs_vllm`` and ``deploy_vs_ms_swift``.

    python benchmarks/deploy_vs_vllm.py [--concurrency 1 8 32] [--peers vllm ms-swift]
"""

from __future__ import annotations

import contextlib
import json
import statistics
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness.environments import MS_SWIFT_VLLM
from harness.measure import SIDES, compared, print_line, run_side, scratch_folder, versions
from harness.options import model_folder, pairs, parser
from harness.rows import read_source
from harness.servers import Server, free_port, serving, wait_until_it_answers

CONTEXT = 2048
#: The name under which every side serves the model.
NAME = "small"
MAX_TOKENS = 24
#: Requests of one measurement at each concurrency: 20 to 30 s on two cores.
REQUESTS = {1: 16, 8: 32, 32: 64}
#: Share of texts that may differ from the peer's where requests share a batch.
DIFFERENT_TEXTS = 0.1
#: A stopped server gets this long to catch up with its own timers before it is loaded, seconds.
SETTLE = 3.0
ENGINE = {"VLLM_CPU_KVCACHE_SPACE": "1"}


@dataclass(frozen=True)
class Load:
    """One measurement: what the client saw."""

    requests_per_s: float
    first_text_ms: float
    answers: list[dict[str, Any]]
    client_cpu_share: float

    @property
    def tokens(self) -> list[tuple[int, int]]:
        return [(answer["prompt_tokens"], answer["tokens"]) for answer in self.answers]


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--concurrency", type=int, nargs="+", help="requests under way (1, 8, 32; --quick: 1, 8)")
    options.add_argument("--peers", nargs="+", choices=["vllm", "ms-swift"], default=["vllm", "ms-swift"])
    given = options.parse_args()
    levels = given.concurrency or ([1, 8] if given.quick else [1, 8, 32])
    with scratch_folder() as folder, contextlib.ExitStack() as stack:
        questions = write_questions(given.source, folder / "questions.json", max(REQUESTS.values()))
        servers = [stack.enter_context(server) for server in sides(model_folder(given), given.peers, folder)]
        for server in servers:
            wait_until_it_answers(server, NAME)
        idle = {server.name: round(server.idle_share(), 4) for server in servers}
        found = measure(servers, levels, questions, folder, pairs(given), given.quick)
        for server in servers[1:]:
            report(found, servers[0].name, server.name, idle)


def write_questions(source: Path, target: Path, count: int) -> list[str]:
    """Distinct short questions, the first sentences of the source's rows, also as a file for the client's warm-up.

    Short, because the time to the first text would otherwise be that of reading the prompt.
    """
    rows = [next(iter(row.values())).partition(". ")[0] for row in read_source(source)]
    questions = [f"{rows[number % len(rows)]} ({number})" for number in range(count)]
    target.write_text(json.dumps(questions))
    return questions


def sides(model: Path, peers: list[str], folder: Path) -> Iterator[Any]:
    """Context managers of the servers, ours first; all start at once."""
    port = free_port()
    yield serving("rayswift", ours_command(model, port), port, folder / "ours", **ENGINE)
    if "vllm" in peers:
        port = free_port()
        yield serving("vllm", vllm_command(model, port), port, folder / "vllm", **ENGINE)
    if "ms-swift" in peers:
        swift, port = MS_SWIFT_VLLM.make().folder / "bin" / "swift", free_port()
        # Its vLLM plugin, for a model that is not this one, imports torchvision, which has no CPU build here.
        environ = {**ENGINE, "VLLM_PLUGINS": "none"}
        yield serving("ms-swift", swift_command(swift, model, port), port, folder / "swift", **environ)


def measure(
    servers: list[Server], levels: list[int], questions: list[str], folder: Path, rounds: int, quick: bool
) -> dict[int, dict[str, list[Load]]]:
    """A-B-A-B at each concurrency; before the first, every server answers a few questions that are not counted."""
    found: dict[int, dict[str, list[Load]]] = {level: {server.name: [] for server in servers} for level in levels}
    for number in range(-1, rounds):
        for server in servers:
            with contextlib.ExitStack() as stack:
                for other in servers:
                    if other is not server:
                        stack.enter_context(other.asleep())
                time.sleep(SETTLE)
                load(server, questions[:2], 1, folder)
                for level in levels if number >= 0 else [max(levels)]:
                    count = REQUESTS.get(level, 2 * level) // (2 if quick or number < 0 else 1)
                    result = load(server, questions[:count], level, folder)
                    if number >= 0:
                        found[level][server.name].append(result)
                        print(f"{server.name} × {level}: {result.requests_per_s:.2f} requests/s, first text after "
                              f"{result.first_text_ms:.1f} ms", file=sys.stderr)  # fmt: skip
    return found


def load(server: Server, questions: list[str], concurrency: int, folder: Path) -> Load:
    """One measurement of one server."""
    asked = folder / "asked.json"
    asked.write_text(json.dumps(questions))
    command = [
        sys.executable, SIDES / "chat_load.py", "--base_url", f"{server.address}/v1", "--model", NAME,
        "--questions", asked, "--max_tokens", str(MAX_TOKENS), "--concurrency", str(concurrency),
    ]  # fmt: skip
    result = run_side("chat_load", command, folder / "client")
    answers = result["answers"]
    first = statistics.median(answer["first_text_s"] for answer in answers)
    return Load(len(answers) / result["seconds"], first * 1000, answers, result["client_cpu_share"])


def report(found: dict[int, dict[str, list[Load]]], ours: str, peer: str, idle: dict[str, float]) -> None:
    """Check that both wrote the same, and print the line of one peer."""
    levels = {str(level): compare_level(level, sides[ours], sides[peer]) for level, sides in found.items()}
    print_line(
        f"deploy_vs_{peer.replace('-', '_')}",
        {
            "requests_per_s": {level: fields["requests_per_s"] for level, fields in levels.items()},
            "first_text_ms": {level: fields["first_text_ms"] for level, fields in levels.items()},
            "same_texts": {level: fields["same_texts"] for level, fields in levels.items()},
            "client_cpu_share": max(fields["client_cpu_share"] for fields in levels.values()),
            "idle_cpu_share": {name: idle[name] for name in (ours, peer)},
            "max_tokens": MAX_TOKENS,
            "versions": {**versions("rayswift", "ray", "vllm_cpu", "torch"), "peer": peer_version(peer)},
        },
    )


def peer_version(peer: str) -> str:
    return "vllm serve, the same installation" if peer == "vllm" else ", ".join(MS_SWIFT_VLLM.requirements[:1])


def compare_level(level: int, ours: list[Load], theirs: list[Load]) -> dict[str, Any]:
    """Requests/s, time to the first text and its difference at one concurrency.

    Raises:
        SystemExit: the sides did not read and write the same.
    """
    pairs_of_answers = [
        both for a, b in zip(ours, theirs, strict=True) for both in zip(a.answers, b.answers, strict=True)
    ]
    same = statistics.fmean(a["text"] == b["text"] for a, b in pairs_of_answers)
    if any(a["prompt_tokens"] != b["prompt_tokens"] for a, b in pairs_of_answers):
        sys.exit(f"concurrency {level}: the sides did not read the same prompts")
    if same < (1.0 if level == 1 else 1.0 - DIFFERENT_TEXTS):
        example = next((a["text"], b["text"]) for a, b in pairs_of_answers if a["text"] != b["text"])
        sys.exit(f"concurrency {level}: only {same:.0%} of the texts are the same, for example not {example}")
    wrote = [sum(tokens for load in side for _, tokens in load.tokens) for side in (ours, theirs)]
    if abs(wrote[0] - wrote[1]) > (0 if level == 1 else 0.01 * wrote[1]):
        sys.exit(f"concurrency {level}: the sides wrote {wrote[0]} and {wrote[1]} tokens")
    first = compared([a.first_text_ms for a in ours], [b.first_text_ms for b in theirs], "ms", False)
    return {
        "requests_per_s": compared(
            [a.requests_per_s for a in ours], [b.requests_per_s for b in theirs], "requests/s", True
        ),
        "first_text_ms": {**first, "difference": round(first["rayswift"] - first["peer"], 3)},
        "same_texts": round(same, 4),
        "client_cpu_share": round(max(load.client_cpu_share for load in [*ours, *theirs]), 4),
    }


def ours_command(model: Path, port: int) -> list[str]:
    """``rayswift deploy …``."""
    flags = ["--infer_backend", "vllm", "--served_model_name", NAME, "--use_gpu", "false"]
    return [sys.executable, "-m", "rayswift", "deploy", "--model", str(model), *swift_flags(port), *flags]


def swift_command(swift: Path, model: Path, port: int) -> list[str]:
    """``swift deploy …``."""
    flags = ["--infer_backend", "vllm", "--model_type", "llama", "--template", "chatml", "--served_model_name", NAME,
             "--host", "127.0.0.1", "--use_hf", "true"]  # fmt: skip
    return [str(swift), "deploy", "--model", str(model), *swift_flags(port), *flags]


def swift_flags(port: int) -> list[str]:
    """Flags that both deploy commands understand."""
    return ["--port", str(port), "--torch_dtype", "float32", "--vllm_enforce_eager", "true",
            "--vllm_max_model_len", str(CONTEXT)]  # fmt: skip


def vllm_command(model: Path, port: int) -> list[str]:
    """``vllm serve …`` as a module: the command itself looks for a package ``vllm``, which the CPU build is not."""
    server = [sys.executable, "-m", "vllm.entrypoints.launchers.api_server.entry", "--model", str(model)]
    flags = ["--served-model-name", NAME, "--dtype", "float32", "--enforce-eager", "--max-model-len", str(CONTEXT)]
    # As `rayswift deploy` on CPUs.
    return [*server, *flags, "--no-enable-chunked-prefill", "--host", "127.0.0.1", "--port", str(port)]


if __name__ == "__main__":
    main()

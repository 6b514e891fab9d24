"""Options that the benchmarks share, and the model they use."""

from __future__ import annotations

import argparse
import runpy
from pathlib import Path

from harness.environments import REPOSITORY
from harness.rows import DEFAULT_SOURCE


def parser(description: str | None) -> argparse.ArgumentParser:
    """``--quick``, ``--full``, ``--pairs``, ``--source`` and ``--model``."""
    options = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    size = options.add_mutually_exclusive_group()
    size.add_argument("--quick", action="store_true", help="smallest sizes, one pair: does it run at all?")
    size.add_argument("--full", action="store_true", help="the big sizes")
    options.add_argument("--pairs", type=int, help="runs of each side (3; --quick: 1)")
    options.add_argument("--source", type=Path, default=DEFAULT_SOURCE, help="rows to repeat: .jsonl or a .json array")
    options.add_argument("--model", type=Path, help="model folder (default: SmolLM2-135M, fetched by tools/smollm2.py)")
    return options


def pairs(options: argparse.Namespace) -> int:
    """How often each side runs."""
    return options.pairs or (1 if options.quick else 3)


def by_size(options: argparse.Namespace, quick: int, default: int, full: int) -> int:
    """One of three sizes, as ``--quick`` or ``--full`` choose."""
    return quick if options.quick else full if options.full else default


def model_folder(options: argparse.Namespace) -> Path:
    """``--model``, else the small real model."""
    if options.model:
        return options.model.resolve()
    return Path(runpy.run_path(str(REPOSITORY / "tools" / "smollm2.py"))["smollm2"]())

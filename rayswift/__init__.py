"""SWIFT on Ray. Each command of the command line is a function here, with the same settings as keywords:

    import sys, rayswift

    rayswift.sft(model="Qwen/Qwen2.5-7B-Instruct", dataset=["train.jsonl"], lora_rank=16)

    # A script whose every setting can be changed on its own command line (`python job.py --lora_rank 32`, --help):
    rayswift.sft(model="Qwen/Qwen2.5-7B-Instruct", dataset=["train.jsonl"], overrides=sys.argv[1:])

Bad settings raise `rayswift.errors.UserError`; with ``overrides`` they end the script as they end the command line,
with one line per mistake and exit status 2. Importing this package loads nothing heavy.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

__version__ = "0.1.0"
__all__ = ["app", "deploy", "evaluate", "export", "infer", "pretrain", "rlhf", "sample", "sft", "submit"]


def _run(command: str, overrides: Sequence[str] | None, settings: dict[str, Any]) -> Any:
    """Check the settings of ``command``, then call the function that the command line calls."""
    import os
    import sys

    from rayswift.arguments import make_arguments, parse_arguments
    from rayswift.cli.main import log_to_stderr, report, run_command
    from rayswift.errors import UserError
    from rayswift.redaction import hide_from_process_lists

    if overrides is None:
        return run_command(make_arguments(command, **settings))
    hide_from_process_lists()
    log_to_stderr()  # the script is a command line: what `rayswift` says while it works is said here too
    program = os.path.basename(sys.argv[0]) or f"rayswift {command}"
    try:
        return run_command(parse_arguments(command, overrides, defaults=settings, prog=program))
    except UserError as error:
        sys.exit(report(error, program))


def pretrain(*, overrides: Sequence[str] | None = None, **settings: Any) -> Any:
    """``rayswift pt``: continue pre-training on plain text."""
    return _run("pt", overrides, settings)


def sft(*, overrides: Sequence[str] | None = None, **settings: Any) -> Any:
    """``rayswift sft``: fine-tune on conversations."""
    return _run("sft", overrides, settings)


def rlhf(*, overrides: Sequence[str] | None = None, **settings: Any) -> Any:
    """``rayswift rlhf``: training on pairs of a chosen and a rejected answer (DPO)."""
    return _run("rlhf", overrides, settings)


def infer(*, overrides: Sequence[str] | None = None, **settings: Any) -> Any:
    """``rayswift infer``: a conversation in the terminal, or answers to a dataset's rows."""
    return _run("infer", overrides, settings)


def deploy(*, overrides: Sequence[str] | None = None, **settings: Any) -> Any:
    """``rayswift deploy``: serve over HTTP with OpenAI's interface."""
    return _run("deploy", overrides, settings)


def app(*, overrides: Sequence[str] | None = None, **settings: Any) -> Any:
    """``rayswift app``: chat in the browser."""
    return _run("app", overrides, settings)


def sample(*, overrides: Sequence[str] | None = None, **settings: Any) -> Any:
    """``rayswift sample``: many answers per prompt, the best kept."""
    return _run("sample", overrides, settings)


def evaluate(*, overrides: Sequence[str] | None = None, **settings: Any) -> Any:
    """``rayswift eval``: benchmarks."""
    return _run("eval", overrides, settings)


def export(*, overrides: Sequence[str] | None = None, **settings: Any) -> Any:
    """``rayswift export``: merge, quantise, convert, push."""
    return _run("export", overrides, settings)


def submit(
    command: str, *, address: str | None = None, working_dir: str = ".", wait: bool = True, **settings: Any
) -> int:
    """``rayswift submit``: ``command`` with these settings as a job on a Ray cluster, whose dashboard has ``address``.

    Returns the job's exit status, or 0 at once without ``wait``.
    """
    from rayswift.cli.jobs import submit_job, words_of

    return submit_job([command, *words_of(settings)], address, working_dir, wait=wait)

"""``rayswift doctor``: examine a cluster, or what a command will need of it."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Iterator, Sequence
from typing import Any

from rayswift.arguments.help import Parser
from rayswift.console import say
from rayswift.errors import UserError

#: Bytes of optimiser state per parameter that is trained: a float32 copy and Adam's two moments.
_STATE_BYTES = 12
_MARKS = {"ok": "  ok ", "warning": "warn ", "error": "ERROR"}


def doctor_parser() -> Parser:
    """The flags of the command."""
    parser = Parser(
        prog="rayswift doctor",
        description="Find what is wrong with a Ray cluster before a long job does; exits with 1 where something is.",
        allow_abbrev=False,
        usage="rayswift doctor [--address ADDRESS] [--storage_path PATH] [--quick] [--json] [COMMAND --flag value ...]",
    )
    parser.add_argument("--address", help="the cluster, as for other commands, or its dashboard's (http://HEAD:8265: "
                        "the examination is then a job there); default: RAY_ADDRESS, else this machine")  # fmt: skip
    parser.add_argument("--storage_path", "--storage-path", metavar="PATH", help="where results will go")
    parser.add_argument("--quick", action="store_true", help="only what takes seconds: no bandwidth, all-reduce, hub")
    parser.add_argument("--json", action="store_true", help="as one JSON object, with what the nodes reported")
    text = "the command that is to run: its workers, storage and checkpoints are looked at"
    parser.add_argument("words", nargs=argparse.REMAINDER, metavar="COMMAND ...", help=text)
    return parser


def doctor(argv: Sequence[str]) -> int:
    """Run ``rayswift doctor ...``. Returns 0 where nothing is wrong that would end or spoil a job, else 1."""
    options = doctor_parser().parse_args(list(argv))
    args = _command_arguments(options.words) if options.words else None
    if options.address and "://" in options.address and not options.address.startswith("ray://"):
        return _as_job(options)
    from rayswift.cluster import Cluster, connect, plan_workers
    from rayswift.cluster.doctor import default_hub, examine

    options.address = options.address or getattr(args, "address", None)
    cluster: Cluster = connect(options)
    refusal = None
    if args is not None and hasattr(args, "num_workers") and args.command in ("pt", "sft", "rlhf"):
        try:
            plan_workers(args, cluster)
        except UserError as error:
            refusal = str(error)
    found = examine(
        storage=_storage(options, args), checkpoint=_checkpoint_bytes(args), refusal=refusal,
        hub=default_hub(bool(getattr(args, "use_hf", os.environ.get("USE_HF", "").lower() in ("1", "true")))),
        quick=options.quick,
    )  # fmt: skip
    if options.json:
        say(json.dumps(found.as_json(), ensure_ascii=False))
    else:
        for line in finding_lines(found.findings):
            say(line)
    return 0 if found.is_well else 1


def finding_lines(findings: Sequence[Any]) -> Iterator[str]:
    """One line a finding, its mend below it, and what it comes to."""
    for finding in findings:
        yield f"{_MARKS[finding.level]} {finding.check + ':':<14} {finding.message}"
        if finding.mend:
            yield f"      {'':<14} → {finding.mend}"
    errors = sum(finding.level == "error" for finding in findings)
    warnings = sum(finding.level == "warning" for finding in findings)
    yield f"{errors} errors, {warnings} warnings"


def _command_arguments(words: Sequence[str]) -> Any:
    from rayswift.arguments import parse_arguments
    from rayswift.cli.main import COMMANDS, find_command

    command, rest = find_command(words)
    if command not in COMMANDS:
        raise UserError(f"{command} needs no look; choose from {', '.join(COMMANDS)}")
    return parse_arguments(command, rest)


def _as_job(options: argparse.Namespace) -> int:
    """The same on the cluster itself: only its dashboard can be reached from here."""
    from rayswift.cli.jobs import submit_job

    words = ["doctor"]
    words += [f"--storage_path={options.storage_path}"] if options.storage_path else []
    words += [f"--{name}" for name in ("quick", "json") if getattr(options, name)]
    return submit_job([*words, *options.words], options.address, "none")


def _storage(options: argparse.Namespace, args: Any) -> str | None:
    """The folder that nodes will share: ``--storage_path``, else where the command's results go."""
    from rayswift.cluster import results_at

    path = options.storage_path
    if path is None and args is not None:
        flags = ("output_dir", "result_path", "eval_output_dir")
        flag = next((name for name in flags if getattr(args, name, None)), None)
        path = results_at(args, flag, getattr(args, flag), in_job=False) if flag else None
    return path if path is None or "://" in path else os.path.abspath(os.path.expanduser(path))


def _checkpoint_bytes(args: Any) -> int:
    """About what a checkpoint of a training command will take; 0 where the model's files are not here."""
    from rayswift.modeling.loading import weight_files

    if args is None or args.command not in ("pt", "sft", "rlhf") or not os.path.isdir(args.model or ""):
        return 0
    weights = sum(os.path.getsize(path) for path in weight_files(args.model))
    if args.train_type == "full":
        return weights + (0 if args.save_only_model else weights // 2 * _STATE_BYTES)
    return weights // 20

"""The command line: ``rayswift <command> ...``. Reads arguments, then calls one function per command.

Help and mistakes are answered without importing torch, ray or transformers: they are loaded with the function.
"""

from __future__ import annotations

import importlib
import logging
import os
import signal
import sys
import traceback
from collections.abc import Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any

from rayswift.console import printable
from rayswift.errors import RunFailedError, Terminated, UserError
from rayswift.redaction import hide_from_process_lists, redact_text

if TYPE_CHECKING:
    from rayswift.arguments import Arguments

logger = logging.getLogger("rayswift.cli.main")

#: Names the file of a job's whole command line, where that holds secrets (see `rayswift.cli.jobs`).
JOB_WORDS = "RAYSWIFT_JOB_WORDS"

# command -> (what it does, where its function lives)
COMMANDS: dict[str, tuple[str, str]] = {
    "pt": ("continue pre-training on plain text", "rayswift.train:pretrain"),
    "sft": ("fine-tune a model on conversations (LoRA or full)", "rayswift.train:sft"),
    "rlhf": ("align a model to preferences (DPO)", "rayswift.train:rlhf"),
    "infer": ("talk to a model in the terminal, or answer a dataset's rows", "rayswift.inference.command:infer"),
    "deploy": ("serve a model over HTTP with OpenAI's interface", "rayswift.serve.deploy:deploy"),
    "app": ("chat with a model in the browser", "rayswift.chat_page:app"),
    "sample": ("sample many answers per prompt and keep the best", "rayswift.sampling:sample"),
    "eval": ("run benchmarks on a model or an endpoint", "rayswift.eval.evaluate:evaluate"),
    "export": ("merge an adapter, encode a dataset for later, ...", "rayswift.exporting:export"),
}
# Commands about jobs on a Ray cluster: they take words, not settings.
JOB_COMMANDS: dict[str, tuple[str, str]] = {
    "submit": ("run one of these commands as a job on a Ray cluster", "rayswift.cli.jobs:submit"),
    "jobs": ("list the jobs of a Ray cluster", "rayswift.cli.jobs:jobs"),
    "logs": ("print or follow the log of a job", "rayswift.cli.jobs:logs"),
    "stop": ("stop jobs", "rayswift.cli.jobs:stop"),
    "doctor": ("find what is wrong with a Ray cluster before a long job does", "rayswift.cli.doctor:doctor"),
    "status": ("show what a Ray cluster has and does: nodes, runs, deployments, jobs", "rayswift.cli.status:status"),
}
# Commands about data: a second word says what.
DATA_COMMANDS: dict[str, tuple[str, str]] = {
    "data": ("look at a dataset at every stage of its way to the model", "rayswift.cli.data:data"),
}
# Commands about a running deployment.
SERVER_COMMANDS: dict[str, tuple[str, str]] = {
    "adapters": ("list, load and unload the adapters of a running deploy", "rayswift.cli.adapters:adapters"),
}
_WORD_COMMANDS = {**JOB_COMMANDS, **DATA_COMMANDS, **SERVER_COMMANDS}
_SWIFT_ONLY = {
    "rollout": "RaySwift starts GRPO's engines itself: rayswift rlhf --use_vllm true",
    "web-ui": "RaySwift has no page that builds commands yet; rayswift app is the chat page",
    "megatron": "RaySwift has no Megatron yet; large models train with --deepspeed zero3",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line; returns the exit status: 0, 1 where work failed, 2 for a mistake, 130 after Ctrl-C, 143
    after SIGTERM."""
    words = list(sys.argv[1:] if argv is None else argv)
    log_to_stderr()
    if argv is None:  # this process is the command's own
        signal.signal(signal.SIGTERM, _end_as_after_ctrl_c)
        sys.excepthook = show_crash
        hide_from_process_lists()
    command = ""
    try:
        if argv is None and JOB_WORDS in os.environ:
            words = _load("rayswift.cli.jobs:received")(words)
        if not words or words[0] in ("-h", "--help", "help"):
            print(_overview(), end="")
            return 0
        if words[0] in ("-V", "--version"):
            print(f"rayswift {importlib.import_module('rayswift').__version__}")
            return 0
        command, rest = find_command(words)
        if command in _WORD_COMMANDS:
            return int(_load(_WORD_COMMANDS[command][1])(rest))
        if {"-h", "--help"} & set(rest):
            from rayswift.arguments import format_help

            print(format_help(command), end="")
            return 0
        from rayswift.arguments import parse_arguments

        run_command(parse_arguments(command, rest))
        return 0
    except (UserError, RunFailedError) as error:
        return report(error, f"rayswift {command}".rstrip())
    except KeyboardInterrupt as stop:
        print(f"\n{f'rayswift {command}'.rstrip()}: stopped", file=sys.stderr)
        return 143 if isinstance(stop, Terminated) else 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # `rayswift --help | head`
        return 0


def _end_as_after_ctrl_c(*_: Any) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # a second one ends at once
    raise Terminated


def show_crash(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """The traceback of what should not happen, which may quote secrets and what strangers wrote."""
    sys.stderr.write(printable(redact_text("".join(traceback.format_exception(kind, error, trace)))))


class _Formatter(logging.Formatter):
    """Information as it is, anything graver with its level in front."""

    def format(self, record: logging.LogRecord) -> str:
        text = printable(super().format(record))
        return text if record.levelno <= logging.INFO else f"{record.levelname.lower()}: {text}"


def log_to_stderr() -> None:
    """Send RaySwift's log to standard error; ``LOG_LEVEL`` (SWIFT's variable) says how much of it."""
    handler = logging.StreamHandler()
    handler.setFormatter(_Formatter())
    logging.basicConfig(level=logging.WARNING, handlers=[handler])
    level = logging.getLevelNamesMapping().get(os.environ.get("LOG_LEVEL", "").upper(), logging.INFO)
    logging.getLogger("rayswift").setLevel(level)


def report(error: UserError | RunFailedError, program: str) -> int:
    """Print a mistake or failure, one line each, on standard error; returns exit status 2 or 1."""
    if os.environ.get("RAYSWIFT_DEBUG"):
        raise error
    for line in printable(redact_text(str(error))).split("\n"):
        print(f"{program}: error: {line}", file=sys.stderr)
    return 2 if isinstance(error, UserError) else 1


def run_command(arguments: Arguments) -> Any:
    """Call the function of ``arguments.command``."""
    return _load(COMMANDS[arguments.command][1])(arguments)


def _load(where: str) -> Any:
    module, _, name = where.partition(":")
    return getattr(importlib.import_module(module), name)


def find_command(words: Sequence[str]) -> tuple[str, list[str]]:
    """The command and what follows it. Raises UserError for an unknown one."""
    name, rest = words[0].replace("_", "-").lower(), list(words[1:])
    if name == "merge-lora":  # SWIFT's old name
        return "export", ["--merge_lora", "true", *rest]
    if name in COMMANDS or name in _WORD_COMMANDS:
        return name, rest
    if name in _SWIFT_ONLY:
        raise UserError(f"{words[0]} is SWIFT's: {_SWIFT_ONLY[name]}")
    import difflib

    known = [*COMMANDS, *_WORD_COMMANDS, "merge-lora"]
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    hint = f"did you mean {close[0]}?" if close else f"choose from {', '.join(known)}"
    raise UserError(f"unknown command {words[0]}; {hint}")


def _overview() -> str:
    def table(commands: dict[str, tuple[str, Any]]) -> str:
        return "".join(f"  {name:<8} {text}\n" for name, (text, _) in commands.items())

    return (
        "usage: rayswift COMMAND [CONFIG.yaml] [--flag value ...]\n\n"
        "SWIFT on Ray: fine-tune, serve, sample and evaluate open language models, on a laptop or a cluster.\n\n"
        f"Commands:\n{table(COMMANDS)}\nData:\n{table(DATA_COMMANDS)}\n"
        f"Serving:\n{table(SERVER_COMMANDS)}\nOn a cluster:\n{table(JOB_COMMANDS)}\n"
        "rayswift COMMAND --help lists a command's flags by topic; rayswift --version prints the version.\n"
        "Example: rayswift sft --model Qwen/Qwen2.5-0.5B-Instruct --dataset train.jsonl\n"
    )


if __name__ == "__main__":
    sys.exit(main())

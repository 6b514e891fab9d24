"""``rayswift submit|jobs|logs|stop``: commands as jobs on a Ray cluster, through Ray's own job server."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import re
import secrets
import shlex
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rayswift.arguments.help import Parser
from rayswift.cli.main import JOB_WORDS
from rayswift.console import printable, say
from rayswift.errors import UserError, one_line

if TYPE_CHECKING:
    from ray.job_submission import JobSubmissionClient

_PACKAGE = "rayswift_job"
#: How long a cluster may take to be ready for jobs.
AGENT_SECONDS = 60
#: Characters of a command line that a list shows.
_WIDEST = 80
ADDRESS_HELP = "address of the cluster's dashboard (default: RAY_ADDRESS, else the cluster on this machine)"


def submit(argv: Sequence[str]) -> int:
    """Run ``rayswift submit COMMAND ...``; returns what `submit_job` does."""
    options = submit_parser().parse_args(list(argv))
    if not options.words:
        raise UserError("name the command to run, for example rayswift submit sft --model M --dataset D")
    return submit_job(options.words, options.address, options.working_dir, wait=not options.no_wait)


def submit_parser() -> Parser:
    """The flags of ``rayswift submit``; the command and its flags come after them."""
    parser = Parser(
        prog="rayswift submit",
        description="Run a command as a job on a Ray cluster.",
        allow_abbrev=False,
        usage="rayswift submit [--address URL] [--working_dir DIR] [--no_wait] COMMAND [--flag value ...]",
    )
    parser.add_argument("--address", metavar="URL", help=ADDRESS_HELP)
    parser.add_argument(
        "--working_dir",
        "--working-dir",
        default=".",
        metavar="DIR",
        help="folder sent to the cluster, where the command runs (default: this folder); none sends nothing",
    )
    parser.add_argument("--no_wait", "--no-wait", action="store_true", help="return once the job is submitted")
    parser.add_argument("words", nargs=argparse.REMAINDER, metavar="COMMAND ...", help="the command and its flags")
    return parser


def submit_job(words: Sequence[str], address: str | None = None, working_dir: str = ".", *, wait: bool = True) -> int:
    """Run ``rayswift WORDS`` as a Ray job and follow its log.

    Returns the job's exit status (0 at once without ``wait``). Ray shows a job's command line and environment to
    everyone on the cluster, and logs them: where the words hold secrets, the command line that it is told has them
    masked, and the whole one travels in a package that only the cluster's own user can read (see `received`).
    """
    from rayswift.redaction import redact_argv

    words = list(_checked(words, working_dir))
    shown = redact_argv(words)
    client = connect_client(address)
    runtime_env: dict[str, Any] = {}
    if working_dir.lower() != "none":
        runtime_env["working_dir"] = working_dir
    with tempfile.TemporaryDirectory() as folder, as_user_error("the cluster did not take the job"):
        if shown != words:
            name = _write_words(folder, shown, words)
            runtime_env |= {"py_modules": [os.path.join(folder, _PACKAGE)], "env_vars": {JOB_WORDS: name}}
        job = _taken(client, shlex.join(["rayswift", *shown]), runtime_env)
    print(f"{job}: submitted. Log: rayswift logs -f {job}; stop: rayswift stop {job}", file=sys.stderr)
    return _follow(client, job) if wait else 0


def _taken(client: JobSubmissionClient, entrypoint: str, runtime_env: dict[str, Any]) -> str:
    """The job's id. A cluster that has just started takes no job for some seconds."""
    deadline = time.monotonic() + AGENT_SECONDS
    while True:
        try:
            return client.submit_job(entrypoint=entrypoint, runtime_env=runtime_env)
        except RuntimeError as error:
            if "No available agent" not in str(error):
                raise
            if time.monotonic() > deadline:
                raise UserError(
                    f"the cluster takes no job since {AGENT_SECONDS} s: its job agent does not listen. Another Ray on "
                    "that machine may hold port 52365: start the head with --dashboard-agent-listen-port 0"
                ) from error
            time.sleep(1)


def words_of(settings: Mapping[str, Any]) -> list[str]:
    """Settings by name as the flags that a command line has for them."""
    words = []
    for name, value in settings.items():
        if isinstance(value, list) and value:
            words += [f"--{name}", *map(str, value)]
        elif isinstance(value, dict):
            words.append(f"--{name}={json.dumps(value)}")
        elif isinstance(value, tuple):  # --num_workers MIN,MAX
            words.append(f"--{name}={','.join(map(str, value))}")
        else:
            words.append(f"--{name}={'null' if value in (None, []) else value}")
    return words


def _checked(words: Sequence[str], working_dir: str) -> list[str]:
    """The command and its flags, parsed here once, as the job will, so that a mistake costs no round trip."""
    from rayswift.arguments import parse_arguments
    from rayswift.cli.main import COMMANDS, find_command

    command, rest = find_command(words)
    if command == "doctor":
        return [command, *rest]
    if command not in COMMANDS:
        raise UserError(f"{command} cannot be submitted; choose from {', '.join(COMMANDS)}")
    if working_dir.lower() == "none":
        return [command, *rest]  # the files it names are on the cluster
    if not os.path.isdir(working_dir):
        raise UserError(f"--working_dir {working_dir}: no such folder")
    from rayswift.cli.job_package import check_job

    with contextlib.chdir(working_dir):
        check_job(parse_arguments(command, rest), ".")
    return [command, *rest]


def _write_words(folder: str, shown: Sequence[str], words: Sequence[str]) -> str:
    """A package for Ray with a job's command line; the file's path inside it.

    Ray names a package by a digest of its content, which it shows: the salt keeps secrets from being guessed by it.
    """
    name = f"{_PACKAGE}/{secrets.token_hex(16)}.json"
    os.mkdir(os.path.join(folder, _PACKAGE), 0o700)
    # Ray keeps the mode of a file where it unpacks it.
    with open(os.open(os.path.join(folder, name), os.O_CREAT | os.O_WRONLY | os.O_EXCL, 0o600), "w") as file:
        json.dump({"salt": secrets.token_hex(16), "shown": list(shown), "words": list(words)}, file)
    return name


def received(shown: Sequence[str]) -> list[str]:
    """The whole command line of the job that this process is, given the one without secrets.

    Another command that a job runs, which has the job's environment too, keeps its own.

    Raises:
        UserError: the package is not on this node.
    """
    name = os.environ[JOB_WORDS]
    for folder in filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep)):
        try:
            with open(os.path.join(folder, name), encoding="utf-8") as file:
                sent = json.load(file)
        except OSError:
            continue
        return sent["words"] if list(shown) == sent["shown"] else list(shown)
    raise UserError(f"the job's secrets are not here (no {name} in PYTHONPATH): submit it again")


def connect_client(address: str | None) -> JobSubmissionClient:
    """A client of the cluster's job server; it sends the token that Ray's own commands would.

    Raises:
        UserError: no cluster answers, or it wants another token.
    """
    if address:
        if address.isdigit() or "://" not in address:
            raise UserError(f"--address {address}: expected the dashboard's address, for example http://127.0.0.1:8265")
        os.environ["RAY_API_SERVER_ADDRESS"] = address  # or Ray lets RAY_ADDRESS win over what was asked for
    paths = (os.environ.get("RAY_AUTH_TOKEN_PATH", ""), os.path.expanduser("~/.ray/auth_token"))
    if os.environ.get("RAY_AUTH_TOKEN") or any(map(os.path.isfile, paths)):
        os.environ.setdefault("RAY_AUTH_MODE", "token")  # as Ray's own commands do; its client library does not
    from ray.job_submission import JobSubmissionClient

    with as_user_error("no Ray cluster answers; start one (ray start --head) or give --address http://HEAD:8265"):
        return JobSubmissionClient(address)


@contextlib.contextmanager
def as_user_error(message: str) -> Iterator[None]:
    """Raises UserError with this message for what fails inside.

    Ray's client raises whatever its HTTP library does; none of it is worth a traceback here.
    """
    try:
        yield
    except Exception as error:
        if type(error).__name__ == "AuthenticationError":  # importing it would mean importing Ray
            message = "the cluster wants its token; set RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH"
        raise UserError(f"{message} ({type(error).__name__}: {one_line(error)})") from error


def _follow(client: JobSubmissionClient, job: str) -> int:
    """Print the job's log until it ends; its exit status."""

    async def tail() -> None:
        async for text in client.tail_job_logs(job):
            print(readable(text), end="", flush=True)

    try:
        asyncio.run(tail())
    except KeyboardInterrupt:
        print(f"\n{job} goes on. Log: rayswift logs -f {job}; stop: rayswift stop {job}", file=sys.stderr)
        return 130
    details = client.get_job_info(job)
    print(f"{job}: {details.status.lower()}", file=sys.stderr)
    if details.status == "SUCCEEDED":
        return 0
    return details.driver_exit_code or 1


# --- jobs that run, or have run ---------------------------------------------------------------------------------


def jobs_parser(command: str) -> Parser:
    """The flags of ``rayswift jobs``, ``logs`` or ``stop``."""
    texts = {
        "jobs": "List the jobs of a Ray cluster.",
        "logs": "Print the log of a job of a Ray cluster.",
        "stop": "Stop jobs of a Ray cluster; training saves a checkpoint first, if its time is enough.",
    }
    parser = Parser(prog=f"rayswift {command}", description=texts[command], allow_abbrev=False)
    parser.add_argument("--address", metavar="URL", help=ADDRESS_HELP)
    if command == "jobs":
        parser.add_argument("--json", action="store_true", help="as a JSON list")
        parser.add_argument("--all", action="store_true", help="also those that were not submitted, but connected")
    elif command == "logs":
        parser.add_argument("job", nargs="?", metavar="JOB", help="the job's id (default: the newest)")
        parts = parser.add_mutually_exclusive_group()
        parts.add_argument("-f", "--follow", action="store_true", help="until the job ends; exits as the job does")
        parts.add_argument("--tail", type=int, metavar="N", help="only its last N lines")
    else:
        parser.add_argument("jobs", nargs="+", metavar="JOB", help="the job's id")
        parser.add_argument("--no_wait", "--no-wait", action="store_true", help="return once they are told")
    return parser


def jobs(argv: Sequence[str]) -> int:
    """Run ``rayswift jobs ...``. Returns 0."""
    options = jobs_parser("jobs").parse_args(list(argv))
    client = connect_client(options.address)
    from rayswift.cli.cluster_state import job_list

    with as_user_error("the cluster does not answer"):
        found = [job for job in job_list(client) if job["submitted"] or options.all]
    if options.json:
        say(json.dumps(found, ensure_ascii=False))
        return 0
    for line in job_lines(found):
        say(line)
    return 0


def job_lines(jobs: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """One line a job."""
    for job in jobs:
        line = job["entrypoint"]
        shown = line if len(line) <= _WIDEST else f"{line[: _WIDEST - 3]}..."
        yield f"{job['id'] or '-':<26} {job['status']:<9} {shown}"


def logs(argv: Sequence[str]) -> int:
    """Run ``rayswift logs ...``. Returns 0, or with ``--follow`` the job's exit status."""
    options = jobs_parser("logs").parse_args(list(argv))
    if options.tail is not None and options.tail < 1:
        raise UserError(f"--tail {options.tail}: expected a whole number of lines, at least 1")
    client = connect_client(options.address)
    job = _known_job(client, options.job)
    if options.follow:
        return _follow(client, job)
    with as_user_error(f"{job}: its log cannot be read"):
        text = readable(client.get_job_logs(job))
    print("".join(text.splitlines(keepends=True)[-(options.tail or 0) :]), end="", flush=True)
    return 0


def stop(argv: Sequence[str]) -> int:
    """Run ``rayswift stop JOB ...``. Returns 0 once they have ended."""
    options = jobs_parser("stop").parse_args(list(argv))
    client = connect_client(options.address)
    for job in [_known_job(client, job) for job in options.jobs]:
        with as_user_error(f"{job} does not stop"):
            client.stop_job(job)
            while not options.no_wait and not client.get_job_status(job).is_terminal():
                time.sleep(0.5)
            say(f"{job}: {client.get_job_status(job).lower()}")
    return 0


def _known_job(client: JobSubmissionClient, name: str | None) -> str:
    """The id of a submitted job; without a name the newest one's. Raises UserError for one that there is not."""
    with as_user_error("the cluster does not answer"):
        found = sorted(client.list_jobs(), key=lambda job: job.start_time or 0)
    known = [job.submission_id for job in found if job.submission_id]
    if not known:
        raise UserError("the cluster has no job that was submitted")
    if name is None:
        return known[-1]
    if name in known:
        return name
    if any(job.job_id == name for job in found):
        raise UserError(f"{name} was not submitted but connected: its output, and its end, are where it was started")
    raise UserError(f"{name}: no such job; rayswift jobs lists them (the newest is {known[-1]})")


def readable(log: str) -> str:
    """A job's log without secrets and without what would steer the terminal; progress lines stay."""
    from rayswift.redaction import redact_text

    parts = re.split(r"([\r\n])", re.sub(r"\x1b\[[\d;?]*[A-Za-z]", "", log))
    return "".join(part if part in ("\r", "\n") else printable(redact_text(part)) for part in parts)

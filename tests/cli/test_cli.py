"""The command line as a user meets it: a process, its output, its exit status, its speed."""

from __future__ import annotations

import importlib
import json
import pkgutil
import shlex
import shutil
import subprocess
import sys
import time
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from ray_head import Head, ray_head

import rayswift
from rayswift.arguments import COMMANDS as ARGUMENT_CLASSES
from rayswift.arguments import make_arguments, parse_arguments
from rayswift.cli.jobs import received, submit
from rayswift.cli.main import COMMANDS, JOB_COMMANDS, find_command, main
from rayswift.errors import RunFailedError, UserError

HEAVY = ("torch", "ray", "transformers", "numpy", "pyarrow", "datasets", "peft", "trl")
# Runs a command line in this process and says on standard error what it imported.
PROBE = f"""
import sys
from rayswift.cli.main import main
try:
    status = main(sys.argv[1:])
except SystemExit as end:  # argparse's --help
    status = end.code
print("HEAVY", [name for name in {HEAVY!r} if name in sys.modules], file=sys.stderr)
sys.exit(status)
"""


def run(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "rayswift", *words], capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize(
    "words",
    [
        ["--help"],
        ["sft", "--help"],
        ["sft", "--hlep"],
        ["doctor", "--help"],
        ["status", "--help"],
        ["sfx"],
        ["sft", "--model", "m", "--dataset", "d", "--deepspeed", "zero9"],
        ["rlhf", "--model", "m", "--dataset", "d", "--rlhf_type", "kto"],
    ],
    ids=" ".join,
)
def test_help_and_mistakes_load_nothing_heavy(words: list[str]) -> None:
    done = subprocess.run([sys.executable, "-c", PROBE, *words], capture_output=True, text=True, timeout=60)
    assert done.stderr.endswith("HEAVY []\n"), done.stderr
    assert done.returncode == (0 if "--help" in words else 2)


@pytest.mark.parametrize("words", [["--help"], ["sft", "--hlep"], ["rlhf", "--help"]], ids=" ".join)
def test_answers_in_under_seven_tenths_of_a_second(words: list[str]) -> None:
    def seconds() -> float:
        start = time.perf_counter()
        run(*words)
        return time.perf_counter() - start

    assert min(seconds() for _ in range(3)) < 0.7  # the best of three: other work on the machine is not ours


def test_overview_names_every_command() -> None:
    assert set(COMMANDS) == set(ARGUMENT_CLASSES)
    for words in ([], ["--help"]):
        done = run(*words)
        assert done.returncode == 0
        for name in (*COMMANDS, *JOB_COMMANDS):
            assert f"\n  {name} " in done.stdout
        assert "COMMAND --help" in done.stdout


def test_a_mistake_is_one_line_and_exit_status_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sft", "--hlep"]) == 2
    assert capsys.readouterr().err == "rayswift sft: error: unknown flag --hlep; did you mean --help?\n"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["sfx"], "rayswift: error: unknown command sfx; did you mean sft?"),
        (["xyzzy"], "rayswift: error: unknown command xyzzy; choose from pt, sft"),
        (["rollout"], "rayswift: error: rollout is SWIFT's"),
        (["web_ui"], "rayswift: error: web_ui is SWIFT's"),
        (["submit"], "rayswift submit: error: name the command to run"),
        (["submit", "status"], "rayswift submit: error: status cannot be submitted"),
        (["submit", "sft", "--model", "m"], "rayswift submit: error: --dataset is required"),
        (["submit", "--wait", "sft"], "rayswift submit: error: "),
        (["submit", "--address", "8265", "infer", "--model", "m"], "expected the dashboard's address"),
        (["submit", "--working_dir", "nowhere", "infer"], "--working_dir nowhere: no such folder"),
    ],
)
def test_wrong_commands(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words) == 2
    assert message in capsys.readouterr().err


def test_command_names() -> None:
    assert find_command(["merge-lora", "--adapters", "x"]) == ("export", ["--merge_lora", "true", "--adapters", "x"])
    assert find_command(["merge_lora"]) == find_command(["merge-lora"])
    assert find_command(["SFT"]) == ("sft", [])


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"rayswift {rayswift.__version__}\n"


def test_debug_shows_the_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAYSWIFT_DEBUG", "1")
    with pytest.raises(UserError, match="unknown flag"):
        main(["sft", "--hlep"])


def test_work_that_failed_is_one_line_and_exit_status_1(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(arguments: object) -> None:
        raise RunFailedError("training failed in worker 0: out of memory")

    monkeypatch.setattr("rayswift.cli.main.run_command", fail)
    assert main(["sft", "--model", "org/model", "--dataset", "x"]) == 1
    assert capsys.readouterr().err == "rayswift sft: error: training failed in worker 0: out of memory\n"


def test_closed_output_is_no_error() -> None:
    command = f"{sys.executable} -m rayswift rlhf --help | head -n 1"
    done = subprocess.run(command, shell=True, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("usage: rayswift rlhf")


def test_the_python_api_raises(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--dataset is required"):
        rayswift.sft(model="m")


def test_no_room_hides_a_function_of_the_python_api() -> None:
    """A package ``rayswift.infer`` would replace the function of that name as soon as it is imported."""
    rooms = {module.name for module in pkgutil.iter_modules(rayswift.__path__)}
    assert {"inference", "exporting", "sampling", "chat_page"} <= rooms
    assert rooms & set(rayswift.__all__) == set()
    for room in rooms - {"__main__"}:
        importlib.import_module(f"rayswift.{room}")
    assert all(isinstance(getattr(rayswift, name), types.FunctionType) for name in rayswift.__all__)


class Jobs:
    """Stands for Ray's client: keeps what is sent, and unpacks the package as a node does."""

    def __init__(self, node: Path) -> None:
        self.node, self.sent = node, dict[str, Any]()

    def submit_job(self, **job: Any) -> str:
        self.sent = job
        for folder in job["runtime_env"].get("py_modules", ()):
            shutil.copytree(folder, self.node / Path(folder).name)
        return "job-1"

    def words(self, monkeypatch: pytest.MonkeyPatch) -> list[str]:
        """What `rayswift` is told on the node, with the secrets that came."""
        program, *shown = shlex.split(self.sent["entrypoint"])
        assert program == "rayswift"
        for name, value in self.sent["runtime_env"].get("env_vars", {}).items():
            monkeypatch.setenv(name, value)
        monkeypatch.setenv("PYTHONPATH", f"/nowhere:{self.node}")
        return received(shown) if "env_vars" in self.sent["runtime_env"] else shown


@pytest.fixture
def jobs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Jobs:
    client = Jobs(tmp_path / "node")
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    monkeypatch.setattr("rayswift.cli.jobs.connect_client", lambda address: client)
    return client


def test_submit_from_python_sends_the_command_line(jobs: Jobs, monkeypatch: pytest.MonkeyPatch) -> None:
    settings: dict[str, Any] = {
        "model": "org/m", "dataset": ["a.jsonl", "b c.jsonl#5"], "num_workers": (1, 4), "packing": True, "seed": 7,
        "storage_path": "s3://b",
        "model_kwargs": {"x": [1, "two words"]}, "max_length": None, "hub_token": "not-to-be-seen", "weight_decay": 0.0,
    }  # fmt: skip
    assert rayswift.submit("sft", wait=False, **settings) == 0
    assert jobs.sent["runtime_env"]["working_dir"] == "."
    assert "not-to-be-seen" not in json.dumps(jobs.sent)
    command, *words = jobs.words(monkeypatch)
    received, meant = parse_arguments(command, words), make_arguments("sft", **settings)
    assert received.to_dict() == meant.to_dict()
    assert vars(received)["hub_token"] == "not-to-be-seen"
    with pytest.raises(UserError, match="--dataset is required"):
        rayswift.submit("sft", model="m")


def test_a_script_is_a_command_line(tmp_path: Path) -> None:
    script = tmp_path / "job.py"
    script.write_text(
        "import sys, rayswift\nrayswift.sft(model='m', dataset=['d'], lora_rank=64, overrides=sys.argv[1:])\n"
    )
    bad = subprocess.run(
        [sys.executable, str(script), "--torch_dtype", "int7"], capture_output=True, text=True, timeout=60
    )
    assert bad.returncode == 2
    assert bad.stderr.startswith("job.py: error: --torch_dtype int7: choose from bfloat16")
    assert "Traceback" not in bad.stderr
    helped = subprocess.run([sys.executable, str(script), "--help"], capture_output=True, text=True, timeout=60)
    assert helped.returncode == 0
    assert "that of --adapters keeps its own (default: 64)" in " ".join(helped.stdout.split())


@pytest.mark.parametrize(
    "words",
    [
        ["deploy", "--model", "m", "--api_key", "correct horse", "battery 'staple'\n", "--seed", "1"],
        ["export", "--model", "m", "--hub-token", "horse"],
        ["export", "--model", "m", "--hub_tok=horse"],
        ["sample", "--model", "m", "--dataset", "d", "--output_dir", "/o", "--judge_api_key", "horse"],
        ["infer", "--model", "m", "--result_path", "/o/r", "--model_kwargs", '{"headers": {"apiKey": "a \\"horse"}}'],
        ["infer", "--model", "m", "--result_path", "/o/r", "--val_dataset", "https://h/d.jsonl?token=horse"],
        ["sft", "--model", "m", "--output_dir", "/o", "--dataset", "https://u:horse@h/d.jsonl"],
    ],
)
def test_secrets_travel_in_a_file_that_only_its_owner_reads(
    words: list[str], jobs: Jobs, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert submit(["--no_wait", "--working_dir", "none", *words]) == 0
    assert "horse" not in json.dumps(jobs.sent)
    assert "battery" not in json.dumps(jobs.sent)
    [file] = jobs.node.rglob("*.json")
    assert file.stat().st_mode & 0o777 == 0o600
    assert jobs.words(monkeypatch) == words
    assert received(["eval", "--model", "m"]) == ["eval", "--model", "m"]  # another command of the same job
    file.unlink()
    with pytest.raises(UserError, match="the job's secrets are not here"):
        jobs.words(monkeypatch)


def test_a_job_without_secrets_is_sent_as_it_is(jobs: Jobs) -> None:
    words = ["infer", "--model", "m", "--max_new_tokens", "7", "--system", "one two", "--result_path", "/o/r"]
    assert submit(["--no_wait", *words]) == 0
    assert jobs.sent == {"entrypoint": shlex.join(["rayswift", *words]), "runtime_env": {"working_dir": "."}}


def test_a_cluster_whose_job_agent_never_listens_is_named_with_its_mend(
    jobs: Jobs, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(**_: Any) -> str:
        raise RuntimeError("Request failed with status code 500: No available agent to submit job.")

    monkeypatch.setattr(jobs, "submit_job", refuse)
    monkeypatch.setattr("rayswift.cli.jobs.AGENT_SECONDS", 0)
    with pytest.raises(UserError, match="--dashboard-agent-listen-port 0"):
        submit(["--no_wait", "infer", "--model", "m", "--result_path", "/o/r"])


@pytest.fixture
def head(tmp_path: Path) -> Iterator[Head]:
    """A Ray head of its own, started as ``ray start`` starts one."""
    with ray_head(num_cpus=1, log=tmp_path / "ray.log") as started:
        yield started


@pytest.mark.slow
def test_submit_runs_a_job_and_gives_its_exit_status(head: Head, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "rayswift", "submit", "--address", head.address]
    # A config file in the working directory goes along; the command then says that this is not built yet: status 2.
    (tmp_path / "rlhf.yaml").write_text("model: m\ndataset: d\nrlhf_type: kto\noutput_dir: /nfs/out\n")
    secrets = ["not-to-be-seen", "neither this", "nor-that-one"]
    words = ["--hub_token", secrets[0], "--model_kwargs", json.dumps({"headers": {"apiKey": secrets[1]}}),
             "--val_dataset", f"https://h/rows.jsonl?token={secrets[2]}"]  # fmt: skip
    done = subprocess.run(
        [*command, "rlhf", "rlhf.yaml", *words],
        capture_output=True, text=True, timeout=300, cwd=tmp_path, env=head.environment,
    )  # fmt: skip
    assert done.returncode == 2, done.stderr
    assert "rayswift rlhf: error: --rlhf_type kto: not built yet" in done.stdout
    shown = subprocess.run(
        [sys.executable, "-m", "rayswift", "status", "--address", head.address],
        capture_output=True,
        text=True,
        timeout=120,
        env=head.environment,
    )
    assert shown.returncode == 0, shown.stderr
    assert "1 nodes alive, 0 dead" in shown.stdout
    assert "failed    rayswift rlhf rlhf.yaml --hub_token '***'" in shown.stdout
    # Nor does Ray show them to those it lets in, nor write them where others of the machine can read.
    bearer = {"Authorization": f"Bearer {head.environment['RAY_AUTH_TOKEN']}"}
    lists = ("/api/jobs/", "/api/v0/jobs?detail=1", "/api/v0/runtime_envs?detail=1", "/api/v0/workers?detail=1")
    asked = [httpx.get(f"{head.address}{path}", headers=bearer, timeout=30) for path in lists]
    assert asked[0].is_success
    assert "RAYSWIFT_JOB_WORDS" in asked[0].text
    files = {path: path.read_bytes() for path in head.folder.rglob("*") if path.is_file() and not path.is_symlink()}
    assert len(files) > 20
    for secret in secrets:
        for text in (done.stdout, done.stderr, shown.stdout, *(answer.text for answer in asked)):
            assert secret not in text
        holding = [path for path, content in files.items() if secret.encode() in content]
        assert [path.stat().st_mode & 0o077 for path in holding] == [0]  # the package's file alone

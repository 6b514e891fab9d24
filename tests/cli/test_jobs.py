"""The scripts in jobs/ and the commands that the documentation shows: they parse, and mean what the guide says.

Nothing here trains: a job's settings are caught where `rayswift` would start the command.
"""

from __future__ import annotations

import ast
import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import rayswift
from rayswift.arguments import parse_arguments
from rayswift.arguments.commands import flags_of
from rayswift.cli import main as cli
from rayswift.cli.adapters import adapters_parser
from rayswift.cli.doctor import doctor_parser
from rayswift.cli.jobs import jobs_parser
from rayswift.cli.status import status_parser
from rayswift.errors import UserError

REPOSITORY = Path(__file__).resolve().parents[2]
JOBS = REPOSITORY / "jobs"
DOCUMENTS = sorted([*REPOSITORY.glob("README*.md"), *(REPOSITORY / "docs").glob("*.md")])

# The guide's two runs (SWIFT's flags), and how the job differs from them on purpose.
GUIDE = {
    "pt_qwen7b.py": (
        "pt --model Qwen/Qwen2.5-7B --dataset swift/chinese-c4 --streaming true --train_type full --deepspeed zero2 "
        "--output_dir output --max_steps 10000",
        {"save_total_limit": 3, "num_nodes": 1},
    ),
    "sft_qwen7b.py": (
        "sft --model Qwen/Qwen2.5-7B-Instruct --train_type lora --dataset AI-ModelScope/alpaca-gpt4-data-zh#500 "
        "AI-ModelScope/alpaca-gpt4-data-en#500 swift/self-cognition#500 --torch_dtype bfloat16 --num_train_epochs 1 "
        "--per_device_train_batch_size 1 --per_device_eval_batch_size 1 --learning_rate 1e-4 --lora_rank 8 "
        "--lora_alpha 32 --target_modules all-linear --gradient_accumulation_steps 16 --eval_steps 50 --save_steps 50 "
        "--save_total_limit 2 --logging_steps 5 --max_length 2048 --output_dir output "
        "--system 'You are a helpful assistant.' --warmup_ratio 0.05 --model_author swift --model_name swift-robot",
        # --dataloader_num_workers 4 is left out: Ray Data feeds the workers.
        {},
    ),
}


@pytest.fixture(autouse=True)
def no_settings_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("NPROC_PER_NODE", "NNODES", "USE_HF", "CUDA_VISIBLE_DEVICES"):
        monkeypatch.delenv(name, raising=False)


def arguments_of(job: str, monkeypatch: pytest.MonkeyPatch, *words: str) -> Any:
    """The arguments with which a job would start its command."""
    caught: list[Any] = []
    monkeypatch.setattr(cli, "run_command", caught.append)
    monkeypatch.setattr(sys, "argv", [job, *words])
    runpy.run_path(str(JOBS / job), run_name="__main__")
    assert len(caught) == 1
    return caught[0]


def settings(arguments: Any) -> dict[str, Any]:
    return {name: value for name, value in arguments.to_dict().items() if name not in ("given", "config_file")}


@pytest.mark.parametrize("job", GUIDE)
def test_a_job_has_the_settings_of_the_guide(job: str, monkeypatch: pytest.MonkeyPatch) -> None:
    words, on_purpose = GUIDE[job]
    command, *flags = shlex.split(words)
    arguments = arguments_of(job, monkeypatch)
    assert arguments.command == command
    assert settings(arguments) == settings(parse_arguments(command, flags)) | on_purpose


def test_the_rejection_sampling_job_trains_on_what_it_sampled(monkeypatch: pytest.MonkeyPatch) -> None:
    caught: list[Any] = []

    def run(arguments: Any) -> Any:
        caught.append(arguments)
        return {"output_file": "sample_output/gsm8k.jsonl"}

    monkeypatch.setattr(cli, "run_command", run)
    words = ["--model", "m", "--max_replicas", "8", "--", "--num_train_epochs", "1"]
    monkeypatch.setattr(sys, "argv", ["rft_gsm8k.py", *words])
    runpy.run_path(str(JOBS / "rft_gsm8k.py"), run_name="__main__")
    sample, sft = caught
    assert (sample.command, sample.model, sample.num_workers) == ("sample", "m", (1, 8))
    assert (sft.command, sft.model, sft.dataset, sft.num_train_epochs) == (
        "sft", "m", ["sample_output/gsm8k.jsonl"], 1
    )  # fmt: skip


@pytest.mark.parametrize(
    ("job", "command"),
    [("dpo_qwen05b.py", "rlhf"), ("sample_llama8b.py", "sample"), ("deploy_qwen7b.py", "deploy"),
     ("eval_qwen7b.py", "eval"), ("export_awq.py", "export"), ("pt_qwen7b.py", "pt"), ("sft_qwen7b.py", "sft")],
)  # fmt: skip
def test_a_job_is_a_dozen_lines_that_start_its_command(job: str, command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = arguments_of(job, monkeypatch, "--model", "other")
    assert (arguments.command, arguments.model) == (command, "other")
    call = ast.parse((JOBS / job).read_text(encoding="utf-8")).body[-1]
    assert (call.end_lineno or 0) - call.lineno <= 25


def test_the_pretraining_job_takes_eight_gpus_per_node_from_swifts_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NPROC_PER_NODE", "8")
    assert arguments_of("pt_qwen7b.py", monkeypatch).num_workers == 8
    assert arguments_of("pt_qwen7b.py", monkeypatch, "--num_nodes", "4").num_workers == 32


@pytest.mark.parametrize("job", GUIDE)
def test_a_job_takes_any_setting_on_its_command_line(job: str, monkeypatch: pytest.MonkeyPatch) -> None:
    before = settings(arguments_of(job, monkeypatch))
    words = ["--max_steps", "30", "--dataset", "a.jsonl", "b.jsonl#7", "--torch_dtype", "float32", "--num_workers", "2"]
    after = settings(arguments_of(job, monkeypatch, *words))
    changed = {name: value for name, value in after.items() if before.get(name) != value}
    assert changed == {
        "max_steps": 30, "dataset": ["a.jsonl", "b.jsonl#7"], "torch_dtype": "float32", "num_workers": 2,
    }  # fmt: skip


def run(job: str, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(JOBS / job), *words], capture_output=True, text=True, timeout=60, cwd=REPOSITORY
    )


@pytest.mark.parametrize("job", sorted(path.name for path in JOBS.glob("*.py")))
def test_every_job_explains_itself(job: str) -> None:
    done = run(job, "--help")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"usage: {job}")
    assert "--model MODEL" in done.stdout


@pytest.mark.parametrize(
    ("job", "name", "default"),
    [("pt_qwen7b.py", "--max_steps", "10000"), ("sft_qwen7b.py", "--gradient_accumulation_steps", "16")],
)
def test_a_jobs_help_shows_the_jobs_own_defaults(job: str, name: str, default: str) -> None:
    text = " ".join(run(job, "--help").stdout.split())
    assert re.search(rf"{name} INT [^()]*\(default: {default}\)", text)


@pytest.mark.parametrize(
    ("job", "words", "message"),
    [
        ("pt_qwen7b.py", ["--max_step", "10", "--hlep"], "unknown flag --hlep; did you mean --help?"),
        ("pt_qwen7b.py", ["--max_steps", "many"], "--max_steps many: expected a whole number"),
        ("sft_qwen7b.py", ["--torch_dtype", "int7"], "--torch_dtype int7"),
        ("quickstart.py", [], "the following arguments are required: --model"),
    ],
)
def test_a_mistake_ends_a_job_with_one_line_and_status_2(job: str, words: list[str], message: str) -> None:
    done = run(job, *words)
    assert done.returncode == 2
    assert message in done.stderr
    assert done.stderr.strip().split("\n")[-1].startswith(f"{job}: error: ")
    assert "Traceback" not in done.stderr


# --- commands in the documentation -------------------------------------------------------------------------------


CLUSTER_PARSERS = {name: jobs_parser(name) for name in ("jobs", "logs", "stop")} | {
    "status": status_parser(), "doctor": doctor_parser(),
}  # fmt: skip


def documented(pattern: str) -> list[Any]:
    """Each shell command of the documents' code blocks that starts with ``pattern``, as words."""
    found = []
    for document in DOCUMENTS:
        for block in re.findall(r"```bash\n(.*?)```", document.read_text(encoding="utf-8"), flags=re.DOTALL):
            for line in block.replace("\\\n", " ").splitlines():
                words = shlex.split(line, comments=True)
                while words and re.fullmatch(r"[A-Z_]+=\S*", words[0]):
                    words.pop(0)
                if words and words[0] == "ray" and "--" in words:  # ray job submit ... -- command
                    words = words[words.index("--") + 1 :]
                if " ".join(words).startswith(pattern):
                    found.append(pytest.param(words, id=f"{document.name}: {' '.join(words)[:60]}"))
    return found


@pytest.mark.parametrize("words", documented("ray "))
def test_documented_commands_of_ray_parse(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    import click
    from ray.scripts.scripts import cli as ray_commands

    monkeypatch.chdir(REPOSITORY)
    context, command, rest = click.Context(ray_commands), ray_commands, words[1:]
    while isinstance(command, click.Group):
        name, command, rest = command.resolve_command(context, rest)
        assert command is not None
    command.make_context(name, rest)


def parse(words: list[str]) -> None:
    """Read a command line (without ``rayswift``) as the command would; raises what it raises."""
    command, rest = cli.find_command(words)
    if command == "submit":
        position = next(number for number, word in enumerate(rest) if word in cli.COMMANDS)
        command, rest = rest[position], rest[position + 1 :]
    if command == "data" and rest:
        command, rest = f"data {rest[0]}", rest[1:]
    if "--help" in rest:
        return
    if parser := CLUSTER_PARSERS.get(command):
        options = parser.parse_args(rest)
        command, rest = (options.words[0], options.words[1:]) if getattr(options, "words", None) else ("", [])
        if not command:
            return
    if command == "adapters":
        adapters_parser().parse_args(rest)
    else:
        parse_arguments(command, rest)


@pytest.mark.parametrize("words", documented("rayswift "))
def test_documented_commands_parse(words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "sft.yaml").write_text("model: Qwen/Qwen2.5-7B-Instruct\ndataset: [train.jsonl]\n")
    (tmp_path / "my_datasets.py").write_text("")
    monkeypatch.chdir(tmp_path)
    parse(words[1:])


def test_commands_named_in_a_sentence_have_such_flags() -> None:
    """They need not be whole: what they leave out is no mistake, what they name must be there."""
    wrong, seen = [], 0
    for document in DOCUMENTS:
        text = re.sub(r"^ *```.*?^ *```", "", document.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
        for line in re.findall(r"`rayswift ([a-z][^`]*)`", text):
            words = shlex.split(line.replace("…", "x"))
            if words[1:] and not {"COMMAND", "list|load|unload"} & set(words):
                seen += 1
                try:
                    parse(words)
                except UserError as error:
                    problems = str(error).split("\n")
                    wrong += [f"{document.name}: {line}: {problem}" for problem in problems
                              if "is required" not in problem and " needs " not in problem]  # fmt: skip
    assert wrong == []
    assert seen > 20


def test_documented_python_calls_have_such_settings() -> None:
    wrong, seen = [], 0
    for document in DOCUMENTS:
        for block in re.findall(r"```python\n(.*?)```", document.read_text(encoding="utf-8"), flags=re.DOTALL):
            for call in ast.walk(ast.parse(block)):
                if isinstance(call, ast.Call) and ast.unparse(call.func).startswith("rayswift."):
                    name = ast.unparse(call.func).removeprefix("rayswift.")
                    assert name in rayswift.__all__, f"{document.name}: {ast.unparse(call)}"
                    flags = flags_of({"pretrain": "pt", "evaluate": "eval"}.get(name, name))
                    known = {alias for spec in flags.values() for alias in (spec.name, *spec.aliases)} | {"overrides"}
                    wrong += [f"{document.name}: {name}({key.arg})" for key in call.keywords if key.arg not in known]
                    seen += 1
    assert wrong == []
    assert seen >= 4


@pytest.mark.parametrize("words", documented("python jobs/"))
def test_documented_jobs_parse(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert (REPOSITORY / words[1]).is_file()
    arguments_of(Path(words[1]).name, monkeypatch, *words[2:])


def test_the_readmes_agree_with_what_is_built() -> None:
    built = {name for name, (_, function) in cli.COMMANDS.items() if function}
    for document in REPOSITORY.glob("README*.md"):
        rows = re.findall(
            r"^\| `swift [^|]*\| `rayswift (\S+?)[ `][^|]*\| (✅|🚧)", document.read_text("utf-8"), flags=re.MULTILINE
        )
        shown = {}
        for name, mark in rows:
            assert shown.setdefault(name, mark) == mark
        assert set(shown) == set(cli.COMMANDS), document.name
        assert {name for name, mark in shown.items() if mark == "✅"} == built, document.name

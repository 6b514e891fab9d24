"""What a training, an inference and a deployment read on their way: every flag that is said to have an effect there."""

from __future__ import annotations

import contextlib
import json
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
from reads import recorded, training_here
from test_seed_commands import command_lines

from rayswift.arguments import Arguments, make_arguments, parse_arguments
from rayswift.arguments.commands import flags_of
from rayswift.arguments.effects import why_no_effect
from rayswift.arguments.training_args import TOPIC

#: Fields of TrainingArguments that act where they are made, before a Trainer could read them.
AT_ONCE = {"tf32"}
#: Read only where a path is relative, or workers of a cluster are asked for.
ELSEWHERE = {"storage_path", "resources_per_worker"}
#: The server's own, read while it runs.
RUNNING = {"log_interval", "dry_run"}
ROW = {"messages": [{"role": "user", "content": "one"}, {"role": "assistant", "content": "two three"}]}


@pytest.fixture
def model(tiny_dir: str, tmp_path: Path) -> str:
    """A copy of the tiny model, with the settings it was trained with beside it."""
    folder = shutil.copytree(tiny_dir, tmp_path / "model")
    make_arguments("sft", model=tiny_dir, dataset=["d"]).save(folder / "args.json")
    return str(folder)


def silent(args: Arguments, read: set[str]) -> list[str]:
    """The flags that are said to have an effect, which nobody has read."""
    return [
        spec.flag
        for name, spec in flags_of(args.command).items()
        if not why_no_effect(spec, args)
        and name not in read | AT_ONCE
        and not (spec.topic == TOPIC and f"hf:{name}" in read)
        and len(spec.choices) != 1
    ]


def rows_file(folder: Path, row: dict[str, Any], count: int = 12) -> str:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for _ in range(count)))
    return str(path)


def trained(command: str, model: str, folder: Path, **settings: Any) -> list[str]:
    from rayswift import train

    row = {**ROW, "rejected_response": "four"} if command == "rlhf" else ROW
    args = make_arguments(
        command, model=model, dataset=[rows_file(folder, row)], output_dir=str(folder / "out"), max_length=64,
        gradient_accumulation_steps=1, torch_dtype="float32", num_workers=1, split_dataset_ratio=0.2,
        report_to="none", **{"max_steps": 1, **settings},
    )  # fmt: skip
    with training_here(), recorded() as read:
        getattr(train, {"pt": "pretrain"}.get(command, command))(args.resolved())
    return silent(args, read | ELSEWHERE)


@pytest.fixture(scope="module")
def seeds_training(tiny_dir: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[Arguments, set[str]]:
    """The seed's longest command line with a model and rows of this machine, and what its training reads."""
    from rayswift import train

    folder, words = tmp_path_factory.mktemp("seed"), command_lines()[11][1][1:]
    ours = ["--model", tiny_dir, "--dataset", rows_file(folder, ROW, 60), "--output_dir", str(folder / "out")]
    less = ["--max_steps", "1", "--gradient_accumulation_steps", "1", "--torch_dtype", "float32", "--report_to", "none"]
    args = parse_arguments("sft", [*words, *ours, *less])
    with training_here(), recorded() as read:
        train.sft(args.resolved())
    return args, read


def test_the_seeds_training_reads_what_has_an_effect(seeds_training: tuple[Arguments, set[str]]) -> None:
    args, read = seeds_training
    assert silent(args, read | ELSEWHERE) == []
    told = {name for name in args.given if why_no_effect(flags_of("sft")[name], args)}
    assert told == {"dataloader_num_workers", "num_train_epochs"}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("command", "settings"),
    [
        ("pt", {"train_type": "full", "max_steps": -1, "num_train_epochs": 1}),
        ("sft", {"train_type": "full", "packing": True}),
        ("sft", {"interleave_prob": [1.0], "train_sampling_strategy": "group_by_length"}),
        ("sft", {"lazy_tokenize": True, "padding_free": True}),
        ("rlhf", {"loss_type": ["discopop", "robust"], "loss_weights": [1, 1], "label_smoothing": 0.1}),
        ("rlhf", {"train_type": "full"}),
    ],
)
def test_other_trainings_read_what_has_an_effect(
    command: str, settings: dict[str, Any], model: str, tmp_path: Path
) -> None:
    assert trained(command, model, tmp_path, **settings) == []


class Pool:
    """A pool of engines whose plan is made, and that answers nothing."""

    def __init__(self, model: Any) -> None:
        from rayswift.cluster import Cluster
        from rayswift.generate.model_spec import model_spec
        from rayswift.generate.pool import pool_size

        pool_size(model.args, model_spec(model), Cluster(embedded=True, cpus=64, gpus=8, nodes=1))
        self.answers = lambda requests: iter(())

    start = classmethod(lambda cls, model: cls(model))


@pytest.mark.parametrize("settings", [{}, {"stream": True}, {"infer_backend": "vllm"}])
def test_an_inference_reads_what_has_an_effect(settings: dict[str, Any], model: str, tmp_path: Path) -> None:
    from rayswift.generate import sources
    from rayswift.inference.command import infer

    args = make_arguments(
        "infer", model=model, val_dataset=[rows_file(tmp_path, ROW, 2)], result_path=str(tmp_path / "answers.jsonl"),
        max_new_tokens=2, torch_dtype="float32", **settings,
    )  # fmt: skip
    with on_gpu("vllm" in str(settings)), mock.patch.object(sources, "EnginePool", Pool), recorded() as read:
        infer(as_if_given(args) if "vllm" in str(settings) else args)
    assert silent(args, read | ELSEWHERE) == []


@pytest.mark.parametrize("engine", ["transformers", "vllm"])
def test_the_plan_of_a_deployment_reads_what_has_an_effect(engine: str, model: str) -> None:
    from rayswift.generate.model_spec import model_specs
    from rayswift.serve.application import serve_config

    args = as_if_given(make_arguments("deploy", model=model, infer_backend=engine))
    with on_gpu(engine == "vllm"), recorded() as read:
        serve_config(model_specs(args), args, listen=True)
    assert silent(args, read | RUNNING) == []


def as_if_given(args: Arguments) -> Arguments:
    """Every flag counts as given: some are looked at only then."""
    args.given = frozenset(name for name in flags_of(args.command) if name not in ("models", "base_url", "dataset"))
    return args


def on_gpu(wanted: bool) -> Any:
    """Plan for GPUs, as far as a plan goes."""
    return mock.patch.multiple("rayswift.generate.model_spec", wants_gpu=lambda _: wanted, check_model=lambda *_: None)


def test_what_nobody_reads_is_found(model: str) -> None:
    args = make_arguments("deploy", model=model)
    with recorded() as read:
        assert args.port == 8000
        assert args.to_dict()["host"] == "127.0.0.1"  # saving is no effect
    assert read == {"port"}
    assert {"--host", "--api_key"} <= set(silent(args, read))


@pytest.mark.parametrize("number", [3, 5, 6])
def test_the_seeds_commands_read_what_they_give(
    number: int, model: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Chat, page and deployment, with a model of this machine; what answers is left out."""
    from rayswift.chat_page.command import app
    from rayswift.generate import sources
    from rayswift.generate.model_spec import model_specs
    from rayswift.inference import command as inference
    from rayswift.serve.application import serve_config

    def plan(args: Any) -> None:
        serve_config(model_specs(args), args, listen=True)

    monkeypatch.setattr(inference, "chat", lambda *_, **__: None)
    monkeypatch.setattr(sources, "load_engine", lambda *_: None)
    monkeypatch.setattr(sources, "open_endpoint", lambda *_: contextlib.nullcontext(SimpleNamespace(model="m")))
    monkeypatch.setitem(sys.modules, "rayswift.chat_page.page", SimpleNamespace(build_page=lambda *_, **__: None))  # type: ignore[arg-type]
    monkeypatch.setattr("rayswift.chat_page.command.serve", lambda *_: None)
    command, *words = command_lines()[number][1]
    args = parse_arguments(command, [*words, "--model", model])
    assert not [text for text in caplog.messages if "no effect" in text]
    with on_gpu(True), recorded() as read:
        {"infer": inference.infer, "app": app, "deploy": plan}[command](args)
    assert args.given - read == set()


@pytest.mark.slow
def test_a_training_that_gets_no_better_stops_early(model: str, tmp_path: Path) -> None:
    settings = {"learning_rate": 1e-12, "eval_steps": 1, "save_steps": 1, "max_steps": 6, "lora_dropout": 0.0}
    assert trained("sft", model, tmp_path, early_stop_interval=2, **settings) == []
    rows = [json.loads(line) for line in next(tmp_path.rglob("logging.jsonl")).read_text().splitlines()]
    assert max(row.get("global_step", 0) for row in rows if isinstance(row.get("global_step"), int)) < 6

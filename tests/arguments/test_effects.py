"""No accepted flag is silent: each is read somewhere by the command, or its record says why it changes nothing."""

from __future__ import annotations

import ast
import functools
import runpy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import rayswift
from rayswift.arguments import COMMANDS, format_help, make_arguments, parse_arguments
from rayswift.arguments.commands import flags_of
from rayswift.arguments.effects import rules_of, why_never, why_no_effect
from rayswift.arguments.fields import specs_of
from rayswift.cli.main import COMMANDS as WHERE

PACKAGE = Path(rayswift.__file__).parent

#: What makes every flag of a command matter that can; each a run that RaySwift does.
RUNS: dict[str, list[dict[str, Any]]] = {
    "pt": [{}, {"train_type": "full"}, {"streaming": True, "max_steps": 9, "interleave_prob": [1.0]}],
    "rlhf": [{"loss_type": ["discopop", "robust"], "loss_weights": [1, 1], "label_smoothing": 0.1},
             {"train_type": "full"}],
    "infer": [{}, {"infer_backend": "vllm"}, {"base_url": "http://h/v1"}, {"val_dataset_shuffle": True},
              {"num_workers": 2}, {"val_dataset": []}],
    "deploy": [{}, {"infer_backend": "vllm"}],
    "app": [{}, {"infer_backend": "vllm"}, {"base_url": "http://h/v1"}],
    "sample": [{"orm_model": "math", "prm_model": "client", "judge_base_url": "http://h/v1", "num_workers": 2},
               {"sampler_engine": "vllm", "orm_model": "math"},
               {"sampler_engine": "client", "base_url": "http://h/v1"}],
    "eval": [{}, {"infer_backend": "vllm"}, {"eval_url": "http://h/v1"}],
    "export": [{"to_cached_dataset": True}, {"merge_lora": True, "adapters": ["a"]}],
}  # fmt: skip
RUNS["sft"] = [*RUNS["pt"], {"deepspeed": "zero3"}]
RUNS["pt"], NEEDED = RUNS["sft"], {"val_dataset": ["v"], "dataset": ["d"], "eval_dataset": ["arc"]}


def runs(command: str) -> Iterator[Any]:
    """Arguments of the runs of a command, finished by what it needs."""
    for settings in RUNS[command]:
        needed = {name: value for name, value in NEEDED.items() if name in specs_of(COMMANDS[command])}
        if command in ("pt", "sft", "rlhf"):
            del needed["val_dataset"]
        yield make_arguments(command, **{"model": "m", **needed, **settings})


# --- what the source reads ----------------------------------------------------------------------------------------


@functools.cache
def trees() -> dict[str, ast.Module]:
    """The package's modules by dotted name, without the declarations of the flags."""
    found = {}
    for path in PACKAGE.rglob("*.py"):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        name = ".".join(("rayswift", *(part for part in parts if part != "__init__")))
        if parts[0] not in ("cli", "arguments") and name != "rayswift":
            found[name] = ast.parse(path.read_text(encoding="utf-8"))
    return found


def last_name(node: ast.AST) -> str:
    return node.id if isinstance(node, ast.Name) else node.attr if isinstance(node, ast.Attribute) else ""


@functools.cache
def read_by(module: str) -> tuple[frozenset[str], frozenset[str]]:
    """The settings that a module reads from arguments, and the modules it imports.

    Read are ``args.NAME`` and ``getattr(args, "NAME")``; where names are looked up in a loop, every text of the module
    and the fields of its dataclasses (those that take fields of the same name) may be one.
    """
    names, imports, loops = set(), set(), False
    for node in ast.walk(trees()[module]):
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
            if last_name(node.value) in ("args", "settings", "one"):
                names.add(node.attr)
        elif isinstance(node, ast.Call) and last_name(node.func) == "getattr" and len(node.args) > 1:
            loops = loops or not isinstance(node.args[1], ast.Constant)
            names |= {node.args[1].value} if isinstance(node.args[1], ast.Constant) else set()
        elif isinstance(node, ast.Call) and last_name(node.func) == "get" and node.args:
            if last_name(node.func.value) == "training_args" and isinstance(node.args[0], ast.Constant):  # type: ignore[attr-defined]
                names.add(node.args[0].value)
        elif isinstance(node, ast.ImportFrom) and node.module:
            imports |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Constant) and str(node.value).startswith("rayswift."):
            imports.add(node.value.partition(":")[0])
    if loops:
        for node in ast.walk(trees()[module]):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                names.add(node.value)
            elif isinstance(node, ast.ClassDef):
                names |= {entry.target.id for entry in node.body  # type: ignore[union-attr]
                          if isinstance(entry, ast.AnnAssign)}  # fmt: skip
    return frozenset(names), frozenset(imports)


def read_for(command: str) -> set[str]:
    """The settings that anything reads which the command may import, and those that decide others."""
    names, todo, seen = set(resolved_from()), [WHERE[command][1].partition(":")[0]], set()
    while todo:
        module = todo.pop()
        if module in trees() and module not in seen:
            seen.add(module)
            read, imports = read_by(module)
            names |= read
            todo += imports
    return names


@functools.cache
def resolved_from() -> frozenset[str]:
    """Settings that work out others: read by ``resolve``, properties, or where a checkpoint's are taken over."""
    names = set()
    for path in (PACKAGE / "arguments").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef) and (
                node.name in ("resolve", "with_saved")
                or any(last_name(one) == "property" for one in node.decorator_list)
            ):
                for inner in ast.walk(node):
                    if isinstance(inner, ast.Attribute) and isinstance(inner.ctx, ast.Load):
                        names.add(inner.attr)
                    elif isinstance(inner, ast.Constant) and isinstance(inner.value, str):
                        names.add(inner.value)
    return frozenset(names)


@pytest.mark.parametrize("command", list(COMMANDS))
def test_every_flag_that_is_said_to_have_an_effect_is_read(command: str) -> None:
    read, done = read_for(command), list(runs(command))
    silent = [
        spec.flag
        for spec in specs_of(COMMANDS[command]).values()
        if spec.name not in read
        and len(spec.choices) != 1  # nothing else can be asked for
        and any(not why_no_effect(spec, args) for args in done)
    ]
    assert silent == []


def test_a_flag_that_nothing_reads_is_found() -> None:
    assert "vllm_mode" not in read_for("sft")
    assert {"lora_rank", "weight_decay", "ignore_data_skip"} <= read_for("sft")
    assert "eval_on_start" not in read_for("deploy")


# --- the records --------------------------------------------------------------------------------------------------


def test_rules_name_settings_and_values_that_exist() -> None:
    for command in COMMANDS:
        for spec in flags_of(command).values():
            for condition in rules_of(spec):
                for word in condition.split():
                    name, _, wanted = word.partition("=")
                    name = name.rstrip("!")
                    owners = [flags_of(other)[name] for other in COMMANDS if name in flags_of(other)]
                    allowed = {"command": set(COMMANDS), "engine": {"vllm", "transformers", "client", "no"}}.get(
                        name, {"none", *(choice.lower() for owner in owners for choice in owner.choices)}
                    )
                    assert owners or name in ("command", "engine"), (spec.flag, condition)
                    if name in ("command", "engine") or any(owner.choices for owner in owners):
                        assert set(wanted.split("|")) <= allowed, (spec.flag, condition)


@pytest.mark.parametrize(
    ("line", "flags", "why"),
    [
        ("sft --dataloader_num_workers 4", "--dataloader_num_workers has", "rows are encoded by Ray on all cores"),
        ("sft --packing_length 128", "--packing_length has", "only with --packing true"),
        ("sft --train_type full --lora_rank 4 --use_dora true", "--lora_rank, --use_dora have",
         "only with --train_type lora"),
        ("sft --split_dataset_ratio 0 --eval_strategy steps", "--eval_strategy has",
         "only with --val_dataset or --split_dataset_ratio"),
        ("sft --adapters a --lora_rank 4 --init_weights olora", "--init_weights, --lora_rank have",
         "only for a new adapter: that of --adapters keeps its own"),
        ("sft --streaming true --max_steps 5 --split_dataset_ratio 0.3", "--split_dataset_ratio has",
         "a stream holds nothing out: give --val_dataset"),
        ("sft --dataloader_prefetch_factor 3 --dataloader_drop_last true",
         "--dataloader_drop_last, --dataloader_prefetch_factor have", "RaySwift's own loader feeds the trainer"),
        ("sft --hub_model_id o/m", "--hub_model_id has",
         "training pushes nothing; rayswift export --push_to_hub true does"),
        ("rlhf --label_smoothing_factor 0.1", "--label_smoothing_factor has", "pairs have --label_smoothing"),
        ("sft --freeze_parameters_ratio 0.5", "--freeze_parameters_ratio has", "only with --train_type full"),
        ("sft --max_steps 5 --num_train_epochs 2", "--num_train_epochs has", "--max_steps says how long"),
        ("sft --dataloader_pin_memory false", "--dataloader_pin_memory has", "RaySwift's own loader feeds the trainer"),
        ("rlhf --label_smoothing 0.1", "--label_smoothing has", "only with --loss_type exo_pair, robust or aot"),
        ("rlhf --num_generations 4", "--num_generations has", "only with --rlhf_type ppo or grpo or gkd"),
        ("infer --streaming true", "--streaming has", "every row is read, once, in its order"),
        ("infer --vllm_enforce_eager true", "--vllm_enforce_eager has", "only with the vLLM engine"),
        ("deploy --num_beams 4", "--num_beams has", "OpenAI's interface has no beam search"),
        ("deploy --upscale_delay 5 --target_ongoing_requests 3", "--target_ongoing_requests, --upscale_delay have",
         "only with --max_replicas above --min_replicas"),
        ("deploy --max_replicas 2 --max_adapters 3", "--max_adapters has", "only with --adapters or --adapter_root"),
        ("deploy --infer_backend vllm --model_kwargs {\"a\":1}", "--model_kwargs has",
         "vLLM loads it: --vllm_engine_kwargs"),
        ("app --base_url http://h/v1 --torch_dtype float16", "--torch_dtype has", "the server at --base_url decides"),
        ("app --dry_run true", "--dry_run has", "only with rayswift deploy"),
        ("infer --infer_backend vllm --num_beams 4", "--num_beams has", "vLLM's answers are sampled, not searched for"),
        ("infer --resources_per_worker {\"CPU\":2}", "--resources_per_worker has",
         "only with --num_workers or --address"),
        ("export --merge_lora true --adapters a --quant_n_samples 9 --group_size 64",
         "--group_size, --quant_n_samples have",
         "only with --quant_method gptq or awq"),
        ("export --merge_lora true --adapters a --hub_model_id o/m", "--hub_model_id has",
         "only with --push_to_hub true"),
        ("sft --split_dataset_ratio 0 --greater_is_better true", "--greater_is_better has",
         "only with --val_dataset or --split_dataset_ratio"),
        ("sft --gradient_checkpointing false --gradient_checkpointing_kwargs {\"use_reentrant\":true}",
         "--gradient_checkpointing_kwargs has", "only with --gradient_checkpointing true"),
        ("sft --use_ray true", "--use_ray has", "RaySwift always runs on Ray"),
        ("sft --sequence_parallel_size 4", "--sequence_parallel_size has", "each worker holds its sequences whole"),
    ],
)  # fmt: skip
def test_what_has_no_effect_is_said_in_one_line(
    line: str, flags: str, why: str, caplog: pytest.LogCaptureFixture
) -> None:
    command, *words = line.split()
    needed = ["--model", "m", *(["--dataset", "d"] if command in ("sft", "rlhf", "infer") else [])]
    parse_arguments(command, [*needed, *words])
    assert caplog.messages == [f"{flags} no effect here: {why}"]


@pytest.mark.parametrize(
    "line",
    [
        "sft --dataset_num_proc 1 --freeze_vit true --padding_side right --vera_rank 256 --report_to tensorboard",
        "infer --vllm_gpu_memory_utilization 0.9 --lmdeploy_cache_max_entry_count 0.8 --write_batch_size 1000",
    ],
)
def test_a_default_asks_for_nothing(line: str, caplog: pytest.LogCaptureFixture) -> None:
    command, *words = line.split()
    parse_arguments(command, ["--model", "m", "--dataset", "d", *words])
    assert caplog.messages == []


@pytest.mark.parametrize(
    "line",
    [
        "deploy --min_replicas 0 --upscale_delay 5 --downscale_delay 5",
        "deploy --adapter_root . --max_adapters 3 --vllm_max_lora_rank 8",
        "app --base_url http://h/v1 --allowed_origins http://p",
        "eval --eval_dataset arc --eval_url http://h/v1 --served_model_name m",
        "rlhf --dataset d --rlhf_type grpo --teacher_model t --num_generations 1 --kl_in_reward true --loss_type fipo "
        "--fipo_clip_high_only false --fipo_safety_threshold 3.0",
    ],
)
def test_what_has_an_effect_is_not_said_to_have_none(line: str, caplog: pytest.LogCaptureFixture) -> None:
    command, *words = line.split()
    parse_arguments(command, ["--model", "m", *words])
    assert [text for text in caplog.messages if "no effect" in text] == []


@pytest.mark.parametrize("command", list(COMMANDS))
def test_help_says_where_a_flag_has_no_effect(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "400")
    text = format_help(command)
    never = {spec.flag: why_never(spec, command) for spec in flags_of(command).values()}
    for flag, why in never.items():
        said = why if why.startswith("only ") else f"no effect here: {why}"
        assert not why or f"; {said} (default" in text, flag
    assert any(never.values())


def test_the_page_of_flags_is_made_from_the_records() -> None:
    tools = PACKAGE.parent / "tools" / "flags_doc.py"
    module = runpy.run_path(str(tools))
    assert module["PAGE"].read_text(encoding="utf-8") == module["page"](), "run: python tools/flags_doc.py"


def test_swifts_flags_that_stand_for_others() -> None:
    base = {"model": "m", "dataset": ["d"]}
    assert make_arguments("sft", **base, experts_impl="eager").model_kwargs == {"experts_implementation": "eager"}
    grouped = make_arguments("sft", **base, group_by_length=True)
    assert grouped.training_args["train_sampling_strategy"] == "group_by_length"
    assert not make_arguments("rlhf", **base, padding_free=True).padding_free

"""A flag that is said to have an effect changes what can be seen: what is trained and how, what is started, how it is
asked. One value against another, everything else alike."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import observed_runs
import pytest
from observed_answers import WORK, observed
from observed_files import write_files
from observed_serving import asked, machine, plan
from observed_training import hf_arguments, whole
from observing import Observer, Settings, without_effect

from rayswift.arguments.commands import flags_of
from rayswift.arguments.effects import why_never

pytestmark = pytest.mark.slow  # a minute in all: every flag of every command

#: What a flag is given, where any other value will not do. {} is the folder of `files`.
VALUES: dict[str, Any] = {
    "model": "{}/other", "adapters": ["{}/adapter"], "adapter_root": "{}/root", "dataset": ["{}/others.jsonl"],
    "ssl_keyfile": "{}/key.pem", "ssl_certfile": "{}/a.py", "models": {"a": {"model": "{}/other"}},
    "val_dataset": ["{}/others.jsonl"], "external_plugins": ["{}/plugin.py"],
    "template": "llama3", "template_backend": "jinja", "template_date": "2020-01-01", "agent_template": "react_en",
    "address": "ray://h:1", "allowed_origins": ["http://h"], "new_special_tokens": ["new"], "enable_thinking": False,
    "columns": {"messages": "conversations"},
    "rope_scaling": {"rope_type": "linear", "factor": 2.0},
    "num_workers": 2, "target_modules": ["q_proj"], "target_regex": ".*q_proj", "modules_to_save": ["lm_head"],
    "init_weights": "gaussian", "freeze_parameters": ["model.layers.0"], "trainable_parameters": ["model.layers.0"],
    "boft_block_num": 4, "boft_block_size": 2, "reft_rank": 2, "max_steps": 3, "deepspeed": "zero2",
    "loss_scale": "last_round", "interleave_prob": [0.5, 0.5], "task_type": "seq_cls", "num_labels": 3,
    "model_kwargs": {"attention_dropout": 0.5}, "metric_for_best_model": "token_acc",
    "include_num_input_tokens_seen": "all", "train_sampling_strategy": "sequential",
    "accelerator_config": {"non_blocking": True}, "torch_compile_backend": "eager",
}  # fmt: skip
TWO = ["{}/pairs.jsonl", "{}/others_pairs.jsonl"]
KINDS = {
    "adalora": ("adalora_target_r", "adalora_init_r", "adalora_tinit", "adalora_tfinal", "adalora_deltaT",
                "adalora_beta1", "adalora_beta2", "adalora_orth_reg_weight"),
    "full": ("lisa_activated_layers", "freeze_parameters", "freeze_parameters_ratio"),
    "boft": ("boft_block_size", "boft_n_butterfly_factor", "boft_dropout"), "bone": ("reft_rank",),
    "vera": ("vera_rank", "vera_projection_prng_key", "vera_dropout", "vera_d_initial"),
}  # fmt: skip
#: What a flag needs beside it to have an effect.
BESIDE: dict[str, Settings] = {
    "template_date": {"template": "llama3_2"}, "template_backend": {"template": "llama3"},
    "enable_thinking": {"template": "qwen3"}, "hub_token": {"address": "ray://h:1"},
    "add_non_thinking_prefix": {"template": "qwen3", "enable_thinking": False},
    "ssl_keyfile": {"ssl_certfile": "{}/key.pem", "ssl_keyfile": "{}/a.py"},
    "ssl_certfile": {"ssl_keyfile": "{}/key.pem", "ssl_certfile": "{}/key.pem"},
    "lisa_step_interval": {"train_type": "full", "lisa_activated_layers": 1},
    "trainable_parameters": {"train_type": "full", "freeze_parameters_ratio": 0.5},
    "zero_hpz_partition_size": {"deepspeed": "zero3"},
    **{name: {"train_type": kind} for kind, names in KINDS.items() for name in names},
    "boft_block_num": {"train_type": "boft", "boft_block_size": 0, "boft_block_num": 2},
    "fourier_n_frequency": {"train_type": "fourierft", "fourier_n_frequency": 100},
    "fourier_scaling": {"train_type": "fourierft", "fourier_n_frequency": 100},
    "interleave_prob": {"dataset": TWO}, "interleave_by": {"dataset": TWO, "interleave_prob": [0.5, 0.5]},
    "stopping_strategy": {"dataset": TWO, "interleave_prob": [0.2, 0.8]},
    "task_type": {"dataset": ["{}/labels.jsonl"], "num_labels": 2},
    "num_labels": {"dataset": ["{}/labels.jsonl"], "task_type": "seq_cls", "num_labels": 2},
    "merge_lora": {"adapters": ["{}/adapter"]},
}  # fmt: skip
MODEL: Settings = {"model": "{}/model"}
TRAINED: Settings = {
    **MODEL, "dataset": ["{}/pairs.jsonl"], "output_dir": "out", "max_length": 64, "torch_dtype": "float32",
    "gradient_accumulation_steps": 2, "num_workers": 1, "split_dataset_ratio": 0.2, "report_to": "none",
    "load_from_cache_file": False,
}  # fmt: skip
#: The runs of each command; a name that ends with GPU is one on a machine with GPUs.
RUNS: dict[str, dict[str, Settings]] = {
    "sft": {
        "LoRA": TRAINED, "full": {**TRAINED, "train_type": "full"}, "packed": {**TRAINED, "packing": True},
    },
    "rlhf": {"LoRA": TRAINED, "full": {**TRAINED, "train_type": "full"}},
    "deploy": {
        "Transformers": MODEL, "vLLM": {**MODEL, "infer_backend": "vllm"}, "scaled": {**MODEL, "max_replicas": 2},
        "vLLM, GPU": {**MODEL, "infer_backend": "vllm"},
        "adapters": {**MODEL, "infer_backend": "vllm", "adapters": ["{}/adapter"]},
    },
    **observed_runs.RUNS,
}  # fmt: skip
OBSERVERS: dict[str, list[Observer]] = {
    "sft": [hf_arguments, whole], "rlhf": [hf_arguments, whole],
    "deploy": [plan, asked],
}  # fmt: skip
_TASKS, _PACKAGE = "tests/train/test_task_command.py", "its package is not installed here: tests/train/test_tuners.py"
#: What the observer of training does not see: it has no rows, no second value or no place for them.
_NOT_SEEN = (
    "adalora_orth_reg_weight", "agent_template", "attn_impl", "columns",
    "enable_thinking", "eval_steps", "experts_impl", "external_plugins", "freeze_parameters_ratio",
    "hub_token", "interleave_by", "lisa_step_interval", "load_best_model_at_end", "load_from_cache_file",
    "loss_scale", "max_length", "model_author", "model_name", "model_revision", "on_nan", "optim", "placement_strategy",
    "remove_unused_columns", "response_prefix", "save_steps", "split_dataset_ratio", "step_timeout", "strict",
    "truncation_strategy", "trust_remote_code", "tuner_backend", "use_cpu", "use_hf",
)  # fmt: skip
_TRAINING: dict[str, str] = {
    **dict.fromkeys(_NOT_SEEN, "not looked at"),
    "use_gpu": "no GPU is here", "tf32": "no GPU is here", "num_nodes": "tests/cluster/test_placement.py",
    "fp8": "tests/train/test_compiled.py",
    "ddp_timeout": "tests/slow/test_steps_without_numbers.py",
    "eval_async": "tests/train/test_eval_async.py", "target_parameters": "tests/train/test_tuners.py",
    **dict.fromkeys(("quant_method", "quant_bits", "hqq_axis", "bnb_4bit_compute_dtype", "bnb_4bit_quant_type",
                     "bnb_4bit_use_double_quant", "bnb_4bit_quant_storage", "galore_target_modules", "galore_rank",
                     "galore_update_proj_gap", "galore_scale", "galore_proj_type", "galore_quantization",
                     "optim_target_modules", "liger_kernel_config"), _PACKAGE),
    **dict.fromkeys(("run_name", "project"), "needs wandb or swanlab: tests/train/test_reporters.py"),
    **dict.fromkeys(("cached_dataset", "cached_val_dataset"), "tests/data_path/test_cached_dataset.py"),
    **dict.fromkeys(("streaming", "shuffle_buffer_size"), "starts Ray: tests/data_path/test_pipeline.py"),
    "custom_dataset_info": "tests/data_path/test_names.py",
    **dict.fromkeys(("problem_type", "loss_type", "mrl_dims", "eval_metric"), _TASKS),
    **dict.fromkeys(("load_args", "load_data_args"), "tests/train/test_new_adapters.py"),
    **dict.fromkeys(("resume_from_checkpoint", "resume_only_model", "reset_optimizer", "reset_scheduler",
                     "ignore_data_skip"), "tests/train/test_going_on.py"),
    **dict.fromkeys(("push_to_hub", "fsdp", "fsdp_config"), "refused: tests/train/test_bad_input.py"),
    "debug": "Transformers' own",
}  # fmt: skip
#: Flags that change nothing that is seen here, and why, or what shows it.
ELSEWHERE: dict[str, dict[str, str]] = {
    "deploy": {"add_non_thinking_prefix": "it marks what rerankers read"},
    "sft": _TRAINING,
    "rlhf": _TRAINING,
    **observed_runs.ELSEWHERE,
}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("observed")
    write_files(folder)
    return str(folder)


def there(value: Any, folder: str) -> Any:
    """Settings with the folder of `files` in their paths."""
    if isinstance(value, dict):
        return {key: there(one, folder) for key, one in value.items()}
    if isinstance(value, list):
        return [there(one, folder) for one in value]
    return value.replace("{}", folder) if isinstance(value, str) else value


@pytest.mark.parametrize("command", list(RUNS))
def test_flags_change_what_they_say(command: str, files: str) -> None:
    silent: list[str] = []
    proven: set[str] = set()
    values, beside, observers = there(VALUES, files), there(BESIDE, files), OBSERVERS.get(command)
    if observers is None:
        values, beside = values | there(observed_runs.VALUES, files), beside | there(observed_runs.BESIDE, files)
        observers = [observed(WORK[command], Path(files))]
    for label, run in there(RUNS[command], files).items():
        values |= {"use_gpu": not label.endswith("GPU"), "stream": "val_dataset" in run}
        with machine(8 if label.endswith("GPU") else 0):
            silent += without_effect(command, {label: run}, observers, values, beside, proven)
    silent += [] if command == "rlhf" else [  # most of whose flags are of GRPO, which is not built
        f"{spec.flag}: nothing shows an effect" for name, spec in flags_of(command).items()
        if not why_never(spec, command) and len(spec.choices) != 1 and name not in proven
    ]  # fmt: skip
    print("\n".join(silent))
    assert [line for line in silent if line.split()[0].strip(":")[2:] not in ELSEWHERE.get(command, {})] == []

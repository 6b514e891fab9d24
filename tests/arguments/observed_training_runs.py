"""The runs of ``sft`` and ``rlhf``, and what their flags are given there."""

from __future__ import annotations

from typing import Any

from observing import Settings

TWO = ["{}/pairs.jsonl", "{}/others_pairs.jsonl"]
TRAINED: Settings = {
    "model": "{}/model", "dataset": ["{}/pairs.jsonl"], "output_dir": "out", "max_length": 64,
    "torch_dtype": "float32", "gradient_accumulation_steps": 2, "num_workers": 1, "split_dataset_ratio": 0.2,
    "report_to": "none", "load_from_cache_file": False,
}  # fmt: skip
FULL: Settings = {**TRAINED, "train_type": "full"}
GPU: Settings = {**TRAINED, "gradient_checkpointing": False}
RUNS: dict[str, dict[str, Settings]] = {
    "sft": {"LoRA": TRAINED, "full": FULL, "packed": {**TRAINED, "packing": True}, "LoRA, GPU": GPU},
    "rlhf": {"LoRA": TRAINED, "full": FULL},
}
#: The flags that are looked at in a run, where not all are.
ONLY: dict[str, tuple[str, ...]] = {"LoRA, GPU": ("use_gpu", "use_cpu")}
#: What flags are given in these commands, where it is not what others give them.
VALUES: dict[str, Any] = {
    "val_dataset": ["{}/others.jsonl"], "enable_thinking": True, "columns": {"note": "system"},
    "target_parameters": ["mlp.experts.gate_up_proj"], "debug": "underflow_overflow",
    "custom_dataset_info": ['[{"dataset_path": "{}/rich.jsonl", "columns": {"note": "system"}}]'],
    "placement_strategy": "SPREAD",
    "target_modules": ["q_proj"], "target_regex": ".*q_proj", "modules_to_save": ["lm_head"],
    "init_weights": "gaussian", "freeze_parameters": ["model.layers.0"], "trainable_parameters": ["model.layers.0"],
    "freeze_parameters_ratio": 0.9, "boft_block_num": 4, "boft_block_size": 2, "reft_rank": 2,
    "max_steps": 3, "deepspeed": "zero2", "optim": "adafactor", "eval_steps": 1, "save_steps": 1,
    "split_dataset_ratio": 0.5, "max_length": 1024,
    "loss_scale": "all", "interleave_prob": [0.5, 0.5], "task_type": "seq_cls", "num_labels": 3,
    "attn_impl": "eager", "metric_for_best_model": "token_acc",
    "include_num_input_tokens_seen": "all", "train_sampling_strategy": "sequential",
    "problem_type": "multi_label_classification", "mrl_dims": {"16": 1.0}, "eval_metric": "paired",
    "loss_type": "cosine_similarity", "liger_kernel_config": {"rope": False}, "quant_method": "bnb", "quant_bits": 8,
    "bnb_4bit_quant_storage": "float16",
    "accelerator_config": {"non_blocking": True}, "torch_compile_backend": "eager",
}  # fmt: skip
KINDS = {
    "adalora": ("adalora_target_r", "adalora_init_r", "adalora_tinit", "adalora_tfinal", "adalora_deltaT",
                "adalora_beta1", "adalora_beta2", "adalora_orth_reg_weight"),
    "full": ("lisa_activated_layers", "freeze_parameters", "freeze_parameters_ratio"),
    "boft": ("boft_block_size", "boft_n_butterfly_factor", "boft_dropout"), "bone": ("reft_rank",),
    "vera": ("vera_rank", "vera_projection_prng_key", "vera_dropout", "vera_d_initial"),
}  # fmt: skip
RICH: Settings = {"dataset": ["{}/rich.jsonl"]}
#: What a flag needs beside it to have an effect.
BESIDE: dict[str, Settings] = {
    **{name: RICH for name in ("loss_scale", "max_length", "truncation_strategy", "columns", "remove_unused_columns",
                               "custom_dataset_info", "external_plugins")},
    **{name: {"model": "org/name"} for name in ("model_revision", "use_hf", "hub_token")},
    "model_name": {"dataset": ["{}/trained_identity.jsonl"], "model_author": ["an author"]},
    "model_author": {"dataset": ["{}/trained_identity.jsonl"], "model_name": ["a name"]},
    "agent_template": {"dataset": ["{}/rich.jsonl"], "max_length": 512}, "strict": {"dataset": ["{}/bad.jsonl"]},
    "trust_remote_code": {"model": "{}/coded"}, "experts_impl": {"model": "{}/mixture"},
    "use_cpu": {"use_gpu": True},
    "placement_strategy": {"num_workers": 2},
    "target_parameters": {"model": "{}/mixture"},
    "response_prefix": {"template": "llama3"},
    "lisa_step_interval": {"train_type": "full", "lisa_activated_layers": 1},
    "trainable_parameters": {"train_type": "full", "freeze_parameters_ratio": 0.5},
    "zero_hpz_partition_size": {"deepspeed": "zero3"},
    "pure_bf16": {"train_type": "full", "torch_dtype": "bfloat16"},
    **{name: {"train_type": kind} for kind, names in KINDS.items() for name in names},
    "boft_block_num": {"train_type": "boft", "boft_block_size": 0, "boft_block_num": 2},
    "fourier_n_frequency": {"train_type": "fourierft", "fourier_n_frequency": 100},
    "fourier_scaling": {"train_type": "fourierft", "fourier_n_frequency": 100},
    "interleave_prob": {"dataset": TWO},
    "interleave_by": {"dataset": ["{}/pairs.jsonl", "{}/rich.jsonl"], "interleave_prob": [0.5, 0.5]},
    "stopping_strategy": {"dataset": TWO, "interleave_prob": [0.2, 0.8]},
    **{name: {"train_type": "full", "use_galore": True}
       for name in ("galore_target_modules", "galore_rank", "galore_update_proj_gap", "galore_scale",
                    "galore_proj_type", "galore_quantization")},
    "optim_target_modules": {"optim": "apollo_adamw"}, "liger_kernel_config": {"use_liger_kernel": True},
    **{name: {"quant_method": "bnb", "quant_bits": 4}
       for name in ("quant_bits", "bnb_4bit_compute_dtype", "bnb_4bit_quant_type",
                    "bnb_4bit_use_double_quant", "bnb_4bit_quant_storage")},
    "quant_method": {"quant_bits": 4},
    "mrl_dims": {"dataset": ["{}/labels.jsonl"], "task_type": "embedding", "loss_type": "cosine_similarity"},
    "load_args": {"adapters": ["{}/adapter"]},
    "load_data_args": {"adapters": ["{}/adapter"], "load_args": True, "model_name": ["a name"],
                       "dataset": ["{}/trained_identity.jsonl"]},
    **{name: {"dataset": ["{}/labels.jsonl"], "task_type": "embedding"}
       for name in ("loss_type", "eval_metric")},
    "problem_type": {"dataset": ["{}/labels.jsonl"], "task_type": "seq_cls", "num_labels": 2},
    "task_type": {"dataset": ["{}/labels.jsonl"], "num_labels": 2},
    "num_labels": {"dataset": ["{}/labels.jsonl"], "task_type": "seq_cls", "num_labels": 2},
}  # fmt: skip
_ELSEWHERE: dict[str, str] = {
    "ddp_timeout": "tests/slow/test_steps_without_numbers.py",
    "num_nodes": "tests/cluster/test_placement.py", "tf32": "no GPU is here", "fp8": "tests/train/test_compiled.py",
    "hqq_axis": "hqq is not installed here",
    "strict": "it stops: tests/data_path/test_pipeline.py",
    **dict.fromkeys(("run_name", "project"), "needs wandb or swanlab: tests/train/test_reporters.py"),
    **dict.fromkeys(("cached_dataset", "cached_val_dataset"), "tests/data_path/test_cached_dataset.py"),
    **dict.fromkeys(("streaming", "shuffle_buffer_size"), "starts Ray: tests/data_path/test_pipeline.py"),
    **dict.fromkeys(("resume_from_checkpoint", "resume_only_model", "reset_optimizer", "reset_scheduler"),
                    "tests/train/test_going_on.py"),
    "ignore_data_skip": "tests/slow/test_resume.py",
    **dict.fromkeys(("push_to_hub", "fsdp", "fsdp_config"), "refused: tests/arguments/test_errors.py, test_effects.py"),
}  # fmt: skip
#: Flags that change nothing that is seen here, and why, or what shows it.
ELSEWHERE: dict[str, dict[str, str]] = {"sft": _ELSEWHERE, "rlhf": _ELSEWHERE}

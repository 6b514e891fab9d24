"""The runs of ``export``, and what its flags are given there."""

from __future__ import annotations

from typing import Any

from observed_training_runs import RICH, TWO
from observing import Settings

MADE: Settings = {"model": "{}/model", "output_dir": "made", "load_from_cache_file": False}
#: The runs; a name that ends with GPU is one on a machine with GPUs.
RUNS: dict[str, dict[str, Settings]] = {
    "export": {
        "merged": {**MADE, "adapters": ["{}/adapter"], "merge_lora": True},
        "quantised, GPU": {**MADE, **RICH, "quant_method": "gptq", "group_size": -1},
        "cached": {**MADE, **RICH, "to_cached_dataset": True},
        "Ollama": {**MADE, "to_ollama": True},
        "pushed": {"model": "{}/model", "push_to_hub": True, "hub_model_id": "org/new"},
        "adapter": {**MADE, "model": "{}/merged", "base_model": "{}/model", "to_peft_format": True, "lora_rank": 4},
    },
}
#: What flags are given there, where it is not what others give them.
VALUES: dict[str, Any] = {
    "enable_thinking": True, "task_type": "seq_cls", "columns": {"note": "system"}, "loss_scale": "all",
    "quant_n_samples": 2,
    "custom_dataset_info": ['[{"dataset_path": "{}/rich.jsonl", "columns": {"note": "system"}}]'],
    "split_dataset_ratio": 0.5, "val_dataset": ["{}/others.jsonl"], "num_labels": 1, "interleave_prob": [0.5, 0.5],
    "problem_type": "single_label_classification", "resources_per_worker": {"CPU": 2}, "quant_method": "int8",
    "quant_bits": 8, "group_size": 16, "to_gguf": "f16", "hub_model_id": "org/other", "max_shard_size": "1GB",
    "max_length": 16, "node_labels": {"zone": "a"}, "base_model": "{}/coded",
}  # fmt: skip
LABELS: Settings = {"dataset": ["{}/labels.jsonl"], "task_type": "seq_cls"}
#: What a flag needs beside it to have an effect.
BESIDE: dict[str, Settings] = {
    **{name: {"model": "org/name"} for name in ("model_revision", "use_hf", "hub_token")},
    "trust_remote_code": {"model": "{}/coded"}, "push_to_hub": {"hub_model_id": "org/new"},
    "exist_ok": {"output_dir": "{}/data"}, "val_dataset_shuffle": {"val_dataset": ["{}/rich.jsonl"]},
    "num_labels": {**LABELS, "num_labels": 2}, "problem_type": {**LABELS, "num_labels": 1},
    "task_type": {"dataset": LABELS["dataset"], "num_labels": 2}, "truncation_strategy": {"max_length": 64},
    "enable_thinking": {"template": "qwen3", "enable_thinking": False},
    "interleave_prob": {"dataset": TWO}, "strict": {"dataset": ["{}/bad.jsonl"]},
    "interleave_by": {"dataset": ["{}/pairs.jsonl", "{}/rich.jsonl"], "interleave_prob": [0.5, 0.5]},
    "stopping_strategy": {"dataset": TWO, "interleave_prob": [0.2, 0.8]},
    "model_name": {"dataset": ["{}/trained_identity.jsonl"], "model_author": ["an author"]},
    "model_author": {"dataset": ["{}/trained_identity.jsonl"], "model_name": ["a name"]},
    "load_data_args": {"dataset": ["{}/trained_identity.jsonl"], "model_name": ["a name"]},
}  # fmt: skip
#: Flags, some in one run, that change nothing that is seen here, and why, or what shows it.
ELSEWHERE: dict[str, dict[str, str]] = {
    "export": {
        "strict": "it stops: tests/data_path/test_pipeline.py",
        "exist_ok": "tests/exporting/test_export.py",
        "to_gguf": "tests/exporting/test_export.py",
        "trust_remote_code (Ollama)": "no tokenizer with code of its own is here",
        "to_cached_dataset": "a run of its own, as --to_peft_format",
        "to_peft_format": "a run of its own, as --to_cached_dataset",
        "cached_dataset": "tests/data_path/test_cached_dataset.py",
        "cached_val_dataset": "tests/data_path/test_cached_dataset.py",
    },
}

"""The runs of the commands that answer, and what their flags are given there."""

from __future__ import annotations

from typing import Any

from observing import Settings

MODEL: Settings = {"model": "{}/model"}
ASKED = ["{}/asked.jsonl", "{}/identity.jsonl", "org/rows"]
ROWS: Settings = {"val_dataset": ASKED, "result_path": "answers.jsonl"}
VLLM: Settings = {"infer_backend": "vllm"}
SAMPLES: Settings = {"dataset": ASKED, "num_return_sequences": 2, "output_file": "a.jsonl"}
SCALED: Settings = {**VLLM, "max_replicas": 2, "adapters": ["{}/adapter"]}
BENCHMARK: Settings = {**MODEL, "eval_backend": "OpenCompass", "eval_dataset": ["ARC_c"], "local_dataset": "{}/data"}
#: The runs of each command; a name that ends with GPU is one on a machine with GPUs.
RUNS: dict[str, dict[str, Settings]] = {
    "infer": {
        "chat": MODEL, "rows": {**MODEL, **ROWS}, "vLLM": {**MODEL, **ROWS, **VLLM},
        "vLLM, GPU": {**MODEL, **ROWS, **VLLM}, "pool": {**MODEL, **ROWS, "num_workers": 2},
        "chat, vLLM, GPU": {**MODEL, **VLLM}, "url": {"model": "served", **ROWS, "base_url": "http://h/v1"},
        "chat, url": {"model": "served", "base_url": "http://h/v1"},
    },
    "sample": {
        "Transformers": {**MODEL, **SAMPLES}, "vLLM, GPU": {**MODEL, **SAMPLES, "sampler_engine": "vllm"},
        "client": {**SAMPLES, "sampler_engine": "client", "base_url": "http://h/v1"},
        "scored": {**SAMPLES, "sampler_engine": "client", "base_url": "http://h/v1", "prm_model": "client",
                   "judge_base_url": "http://j/v1"},
    },
    "app": {
        "own": MODEL, "vLLM, GPU": {**MODEL, **VLLM}, "url": {"model": "served", "base_url": "http://h/v1"},
        "scaled": {**MODEL, **SCALED},
    },
    "eval": {
        "own": BENCHMARK, "vLLM, GPU": {**BENCHMARK, **VLLM}, "scaled": {**BENCHMARK, **SCALED},
        "VLMEvalKit": {**BENCHMARK, "eval_backend": "VLMEvalKit"},
        "url": {**BENCHMARK, "model": "served", "eval_url": "http://h/v1"},
    },
}  # fmt: skip
#: What flags are given in these commands, where it is not what others give them.
VALUES: dict[str, Any] = {
    "base_url": "http://other/v1", "result_path": "other.jsonl", "columns": {"note": "label"}, "task_type": "embedding",
    "custom_dataset_info": ['[{"dataset_path": "{}/asked.jsonl", "columns": {"note": "label"}}]'],
    "local_dataset": "{}/root", "eval_url": "http://other/v1", "judge_base_url": "http://other/v1",
    "output_file": "other.jsonl", "eval_dataset": ["ARC_e"], "prm_model": "client", "orm_model": "format",
    "data_range": [0, 2], "n_best_to_keep": 1, "prm_threshold": 0.9, "dataset_shuffle": True, "data_seed": 7,
    "cache_files": ["{}/sampled.jsonl"], "eval_dataset_args": {"ARC_c": {"a": 1}}, "eval_backend": "VLMEvalKit",
    "eval_generation_config": {"temperature": 0.5},
    "top_logprobs": 3, "top_k": 5, "val_dataset": ["{}/others.jsonl"],
}  # fmt: skip
#: What a flag needs beside it to have an effect.
BESIDE: dict[str, Settings] = {
    "model_revision": {"model": "org/name"}, "use_hf": {"model": "org/name"}, "hub_token": {"model": "org/name"},
    "data_seed": {"val_dataset_shuffle": True, "dataset_shuffle": True},
    "num_sampling_batch_size": {"num_sampling_batches": 1},
    "model_name": {"model_author": ["an author"]}, "model_author": {"model_name": ["a name"]},
    "prm_model": {"judge_base_url": "http://j/v1"},
    "override_exist_file": {"output_dir": "{}/data"}, "eval_base": {"adapters": ["{}/adapter"]},
    "top_logprobs": {"logprobs": True},
    "add_non_thinking_prefix": {"template": "qwen3", "enable_thinking": False, "task_type": "embedding"},
    "vllm_max_lora_rank": {"adapters": ["{}/adapter"]},
}  # fmt: skip
ELSEWHERE: dict[str, dict[str, str]] = {
    "app": {"num_beams": "refused"},
    "infer": {"strict": "it stops: tests/inference/test_infer.py"},
    "sample": {
        **dict.fromkeys(("cache_files", "easy_query_threshold"), "tests/sampling/test_sample_prompts.py"),
        "num_beams": "refused",
        "strict": "it stops: tests/sampling/test_sample_prompts.py",
        "resume": "tests/sampling/test_sample_command.py",
    },
}

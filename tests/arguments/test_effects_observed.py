"""A flag that is said to have an effect changes what can be seen: who is asked what and how, what is started, trained
and written. One value against another, everything else alike."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
from observed_answers import app, evaluate, infer, observed, sample
from observed_serving import asked, machine, plan
from observed_training import hf_arguments, whole
from observing import Observer, Settings, without_effect

from rayswift.arguments import make_arguments
from rayswift.arguments.commands import flags_of
from rayswift.arguments.effects import why_never

pytestmark = pytest.mark.slow  # a minute in all: every flag of every command

#: What a flag is given, where any other value will not do. {} is the folder of `files`.
VALUES: dict[str, Any] = {
    "model": "{}/other", "adapters": ["{}/adapter"], "adapter_root": "{}/root", "dataset": ["{}/others.jsonl"],
    "ssl_keyfile": "{}/key.pem", "ssl_certfile": "{}/a.py", "models": {"a": {"model": "{}/other"}},
    "val_dataset": ["{}/others.jsonl"], "external_plugins": ["{}/plugin.py"], "local_dataset": "{}/root",
    "template": "llama3", "template_backend": "jinja", "template_date": "2020-01-01", "agent_template": "react_en",
    "address": "ray://h:1", "allowed_origins": ["http://h"], "new_special_tokens": ["new"], "enable_thinking": False,
    "base_url": "http://other/v1", "eval_url": "http://other/v1", "judge_base_url": "http://other/v1",
    "output_file": "other.jsonl", "eval_dataset": ["ARC_e"], "prm_model": "client", "orm_model": "format",
    "data_range": [0, 2], "columns": {"messages": "conversations"},
}  # fmt: skip
#: What a flag needs beside it to have an effect.
BESIDE: dict[str, Settings] = {
    "template_date": {"template": "llama3_2"}, "template_backend": {"template": "llama3"},
    "enable_thinking": {"template": "qwen3"}, "hub_token": {"address": "ray://h:1"},
    "add_non_thinking_prefix": {"template": "qwen3", "enable_thinking": False},
    "ssl_keyfile": {"ssl_certfile": "{}/key.pem", "ssl_keyfile": "{}/a.py"},
    "ssl_certfile": {"ssl_keyfile": "{}/key.pem", "ssl_certfile": "{}/key.pem"},
    "merge_lora": {"adapters": ["{}/adapter"]},
}  # fmt: skip
MODEL: Settings = {"model": "{}/model"}
ROWS: Settings = {"val_dataset": ["{}/rows.jsonl"]}
SAMPLES: Settings = {"dataset": ["{}/rows.jsonl"], "num_return_sequences": 2, "output_file": "a.jsonl"}
BENCHMARK: Settings = {**MODEL, "eval_backend": "OpenCompass", "eval_dataset": ["ARC_c"], "local_dataset": "{}/data"}
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
    "infer": {
        "chat": MODEL, "rows": {**MODEL, **ROWS}, "vLLM": {**MODEL, **ROWS, "infer_backend": "vllm"},
        "vLLM, GPU": {**MODEL, **ROWS, "infer_backend": "vllm"}, "pool": {**MODEL, **ROWS, "num_workers": 2},
        "url": {"model": "served", **ROWS, "base_url": "http://h/v1"},
    },
    "sample": {
        "Transformers": {**MODEL, **SAMPLES}, "vLLM, GPU": {**MODEL, **SAMPLES, "sampler_engine": "vllm"},
        "client": {**SAMPLES, "sampler_engine": "client", "base_url": "http://h/v1"},
        "scored": {**MODEL, **SAMPLES, "orm_model": "accuracy", "prm_model": "client",
                   "judge_base_url": "http://j/v1"},
    },
    "app": {
        "own": MODEL, "vLLM, GPU": {**MODEL, "infer_backend": "vllm"},
        "url": {"model": "served", "base_url": "http://h/v1"},
    },
    "eval": {
        "own": BENCHMARK, "vLLM, GPU": {**BENCHMARK, "infer_backend": "vllm"},
        "url": {**BENCHMARK, "eval_url": "http://h/v1"},
    },
}  # fmt: skip
OBSERVERS: dict[str, list[Observer]] = {
    "sft": [hf_arguments, whole], "rlhf": [hf_arguments, whole],
    "deploy": [plan, asked], "infer": [observed(infer)], "sample": [observed(sample)], "app": [observed(app)],
    "eval": [observed(evaluate)],
}  # fmt: skip
#: Flags that change nothing that is seen here, and why.
ELSEWHERE: dict[str, str] = {}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> str:
    """What flags name: two models, an adapter, rows, a plugin."""
    from peft import LoraConfig, get_peft_model
    from tiny_models import llama, word_tokenizer

    from rayswift.data.chat.agents import load_agent_formats
    from rayswift.data.chat.families import load_templates

    folder = tmp_path_factory.mktemp("observed")
    tokenizer = word_tokenizer(160)
    written = [
        text for owner in (*load_templates().values(), *load_agent_formats().values()) for text in owner.literals
    ]
    tokenizer.add_tokens(sorted({mark for text in written for mark in re.findall(r"<[^<>\s]+>|\w+", text)}))
    tokenizer.add_tokens(["user", "one", "two", "three", "trained", "other"])
    tokenizer.chat_template = (
        "{% if tools %}{{ tools }}{% endif %}{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    tokenizer.eos_token = "<|im_end|>"
    for seed, name in enumerate(("model", "other")):
        model = llama(seed, vocab_size=len(tokenizer), max_position_embeddings=2048)
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    lora = LoraConfig(r=4, task_type="CAUSAL_LM", target_modules=["q_proj"])
    get_peft_model(model, lora).save_pretrained(folder / "adapter")
    made = make_arguments("sft", model=str(folder / "model"), dataset=["d"], system="trained")
    for name in ("model", "adapter"):
        made.save(folder / name / "args.json")
    for number, name in enumerate(("rows", "others")):
        rows = [
            {"messages": [{"role": "user", "content": f"one new w{10 * number + row}"},
                          {"role": "assistant", "content": "two three"}]}
            for row in range(6)
        ]  # fmt: skip
        pairs = [{**row, "rejected_response": "other"} for row in rows]
        (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pairs + pairs))
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name in ("root", "data"):
        (folder / name).mkdir()
    for name in ("a.py", "key.pem", "plugin.py"):
        (folder / name).write_text("x = 1\n")
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
    values, beside = there(VALUES, files), there(BESIDE, files)
    for label, run in there(RUNS[command], files).items():
        values["use_gpu"] = not label.endswith("GPU")
        with machine(8 if label.endswith("GPU") else 0):
            silent += without_effect(command, {label: run}, OBSERVERS[command], values, beside, proven)
    silent += [
        f"{spec.flag}: nothing shows an effect" for name, spec in flags_of(command).items()
        if not why_never(spec, command) and len(spec.choices) != 1 and name not in proven
    ]  # fmt: skip
    print("\n".join(silent))
    assert [line for line in silent if line.split()[0].strip(":")[2:] not in ELSEWHERE] == []

"""A flag that is said to have an effect changes what can be seen: what is started, and how it is asked. One value
against another, everything else alike."""

from __future__ import annotations

import re
from typing import Any

import pytest
from observed_serving import asked, machine, plan
from observing import Observer, Settings, without_effect

from rayswift.arguments import make_arguments
from rayswift.arguments.commands import flags_of
from rayswift.arguments.effects import why_never

pytestmark = pytest.mark.slow  # ten seconds of computing for a command

#: What a flag is given, where any other value will not do. {} is the folder of `files`.
VALUES: dict[str, Any] = {
    "model": "{}/other", "adapters": ["{}/adapter"], "adapter_root": "{}/root",
    "ssl_keyfile": "{}/key.pem", "ssl_certfile": "{}/a.py", "models": {"a": {"model": "{}/other"}},
    "template": "llama3", "template_backend": "jinja", "template_date": "2020-01-01", "agent_template": "react_en",
    "address": "ray://h:1", "allowed_origins": ["http://h"], "new_special_tokens": ["new"], "enable_thinking": False,
    "rope_scaling": {"rope_type": "linear", "factor": 2.0},
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
#: The runs of each command; a name that ends with GPU is one on a machine with GPUs.
RUNS: dict[str, dict[str, Settings]] = {
    "deploy": {
        "Transformers": MODEL, "vLLM": {**MODEL, "infer_backend": "vllm"}, "scaled": {**MODEL, "max_replicas": 2},
        "vLLM, GPU": {**MODEL, "infer_backend": "vllm"},
        "adapters": {**MODEL, "infer_backend": "vllm", "adapters": ["{}/adapter"]},
    },
}  # fmt: skip
OBSERVERS: dict[str, list[Observer]] = {"deploy": [plan, asked]}
#: Flags that change nothing that is seen here, and why.
ELSEWHERE: dict[str, str] = {
    "add_non_thinking_prefix": "it marks answers, which training shows and a prompt for a new one has not",
}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> str:
    """What flags name: two models, an adapter, files."""
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
        "{% if tools %}{{ tools }}{% endif %}"
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
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
    (folder / "root").mkdir()
    for name in ("a.py", "key.pem"):
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

"""A flag that is said to have an effect changes what can be seen: what is trained and how, what is started, how it is
asked. One value against another, everything else alike."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import observed_export_runs
import observed_runs
import observed_training_runs
import pytest
from observed_answers import WORK, observed
from observed_files import write_files
from observed_serving import asked, machine, plan
from observed_training import hf_arguments, whole
from observing import Settings, without_effect

from rayswift.arguments.commands import flags_of
from rayswift.arguments.effects import why_never

pytestmark = pytest.mark.slow  # a minute in all: every flag of every command

MODEL: Settings = {"model": "{}/model"}
#: The runs of each command; a name that ends with GPU is one on a machine with GPUs.
RUNS: dict[str, dict[str, Settings]] = {
    **observed_training_runs.RUNS,
    "deploy": {
        "Transformers": MODEL, "vLLM": {**MODEL, "infer_backend": "vllm"}, "scaled": {**MODEL, "max_replicas": 2},
        "vLLM, GPU": {**MODEL, "infer_backend": "vllm"},
        "adapters": {**MODEL, "infer_backend": "vllm", "adapters": ["{}/adapter"]},
    },
    **observed_runs.RUNS,
    **observed_export_runs.RUNS,
}  # fmt: skip
#: What a flag is given, where any other value will not do. {} is the folder of `files`.
VALUES: dict[str, Any] = {
    "model": "{}/other", "adapters": ["{}/adapter"], "adapter_root": "{}/root", "dataset": ["{}/others.jsonl"],
    "external_plugins": ["{}/plugin.py"],
    "ssl_keyfile": "{}/key.pem", "ssl_certfile": "{}/a.py", "models": {"a": {"model": "{}/other"}},
    "template": "llama3", "template_backend": "jinja", "template_date": "2020-01-01", "agent_template": "react_en",
    "num_workers": 2, "address": "ray://h:1", "allowed_origins": ["http://h"], "new_special_tokens": ["new"],
    "enable_thinking": False,
    "rope_scaling": {"rope_type": "linear", "factor": 2.0}, "task_type": "seq_cls",
    "model_kwargs": {"attention_dropout": 0.5},
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
VALUES_IN, BESIDE_IN = (
    {
        command: getattr(runs, table)
        for runs in (observed_training_runs, observed_runs, observed_export_runs)
        for command in runs.RUNS
    }
    for table in ("VALUES", "BESIDE")
)
#: Flags that change nothing that is seen here, and why, or what shows it.
ELSEWHERE: dict[str, dict[str, str]] = {
    "deploy": {"add_non_thinking_prefix": "it marks what rerankers read"},
    **observed_training_runs.ELSEWHERE,
    **observed_runs.ELSEWHERE,
    **observed_export_runs.ELSEWHERE,
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
    values, beside = (
        there(VALUES | VALUES_IN.get(command, {}), files),
        there(BESIDE | BESIDE_IN.get(command, {}), files),
    )
    observers = {
        "deploy": [plan, asked], **{name: [observed(work, Path(files))] for name, work in WORK.items()},
        **{name: [hf_arguments, whole(Path(files))] for name in observed_training_runs.RUNS},
    }[command]  # fmt: skip
    for label, run in there(RUNS[command], files).items():
        values |= {"use_gpu": not label.endswith("GPU"), "stream": "val_dataset" in run}
        names = observed_training_runs.ONLY.get(label, ())
        with machine(8 if label.endswith("GPU") else 0):
            silent += without_effect(command, {label: run}, observers, values, beside, proven, names)
    silent += [] if command == "rlhf" else [  # most of whose flags are of GRPO, which is not built
        f"{spec.flag}: nothing shows an effect" for name, spec in flags_of(command).items()
        if not why_never(spec, command) and len(spec.choices) != 1 and name not in proven
    ]  # fmt: skip
    print("\n".join(silent))
    known = {f"--{name}" for name in ELSEWHERE.get(command, {})}
    assert [line for line in silent if known.isdisjoint((line.split()[0].strip(":"), line.partition(":")[0]))] == []

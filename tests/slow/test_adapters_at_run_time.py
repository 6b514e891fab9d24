"""Adapters of a running server, with both engines: loaded, replaced under a stream, evicted, all unloaded."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import wait_for
from safetensors.torch import save_file
from serving import MODEL, Deployment, deployed

pytestmark = pytest.mark.slow

CHAT = "/v1/chat/completions"
LONG = 40


def write_adapter(folder: Path, seed: int, hidden: int = 576) -> Path:
    """A LoRA of SmolLM2-135M with random weights: every seed answers in its own way."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 4, "target_modules": ["q_proj", "o_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    random, tensors = torch.Generator().manual_seed(seed), {}
    for layer in range(30):
        for module in ("q_proj", "o_proj"):
            name = f"base_model.model.model.layers.{layer}.self_attn.{module}"
            tensors[f"{name}.lora_A.weight"] = torch.randn(4, hidden, generator=random) * 0.12
            tensors[f"{name}.lora_B.weight"] = torch.randn(576, 4, generator=random) * 0.12
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for seed, name in enumerate(("red", "blue", "green")):
        write_adapter(tmp_path / "root" / name, seed)
    write_adapter(tmp_path / "root" / "broken", 9, hidden=1152)
    write_adapter(tmp_path / "poet", 5)
    return tmp_path / "root"


@pytest.fixture(params=["vllm", "transformers"])
def server(request: Any, root: Path, smollm2_dir: str, tmp_path: Path) -> Iterator[Deployment]:
    flags = ["--infer_backend", request.param, "--served_model_name", MODEL, "--max_adapters", "2",
             "--adapters", f"poet={root.parent / 'poet'}", "--adapter_root", str(root)]  # fmt: skip
    with deployed(smollm2_dir, tmp_path, *flags) as running:
        yield running


def asker(server: Deployment) -> Callable[..., Any]:
    def ask(model: str, max_tokens: int = 12, content: Any = "Name three colours.") -> Any:
        """The answer's text; the status where there is none."""
        body = {"model": model, "messages": [{"role": "user", "content": content}], "temperature": 0,
                "max_tokens": max_tokens, "ignore_eos": True}  # fmt: skip
        status, answer = server.request("POST", CHAT, body, timeout=300)
        if status != 200:
            return status
        assert json.loads(answer)["model"] == model
        return json.loads(answer)["choices"][0]["message"]["content"]

    return ask


def test_adapters_of_a_running_server(server: Deployment, root: Path) -> None:
    ask = asker(server)

    def post(what: str, name: str, path: str | None = None, inplace: bool = False) -> int:
        body = {"lora_name": name, "load_inplace": inplace} | ({"lora_path": path} if path else {})
        return server.request("POST", f"/v1/{what}_lora_adapter", body, timeout=300)[0]

    base = ask(MODEL)
    own = {name: ask(name) for name in ("red", "blue", "green", "poet")}  # of which two are loaded at once
    assert len({base, *own.values()}) == 5, own
    assert {name: ask(name) for name in own} == own and ask(MODEL) == base

    # Under a name of a client's, replaced while it answers.
    assert [post("load", "mine", "red"), ask("mine")] == [200, own["red"]]
    assert [post("load", "mine", "blue"), post("load", "mine", "broken", True), ask("mine")] == [400, 422, own["red"]]
    whole = ask("mine", LONG)
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(ask, "mine", LONG)
        assert [post("load", "mine", "blue", True), ask("mine")] == [200, own["blue"]]
        assert running.result() in (whole, ask("mine", LONG))  # it may have come after the other
    assert ask("red") == own["red"]

    # Other weights in the same folder and under the same name, for the same prompt.
    shutil.copytree(root / "green", root / "red", dirs_exist_ok=True)
    assert [post("load", "red", None, True), ask("red")] == [200, own["green"]]

    # Neither the model's name nor that of a kind of content reaches those who ask for the model.
    assert [post("load", MODEL, "red"), post("load", MODEL, "red", True), post("load", "text", "blue")] == [
        400,
        400,
        200,
    ]
    assert ask(MODEL, content=[{"type": "text", "text": "Name three colours."}]) == base == ask(MODEL)
    assert ask("text") == own["blue"]

    # Unloaded to the last one, and back.
    for name in ("mine", "text", "red", "poet", "blue", "green"):
        assert post("unload", name) == 200, name
        assert ask(MODEL) == base, name
    assert [ask("mine"), ask("text"), post("unload", "mine")] == [404, 404, 404]
    assert [post("load", "poet"), ask("poet"), ask("blue")] == [200, own["poet"], own["blue"]]

    # Another replica has the names too; until it can answer, the server says that it cannot.
    assert [post("load", "mine", "green"), server.get("/health")[0], server.get("/livez")[0]] == [200, 200, 200]
    for replica in server.replicas():
        os.kill(replica.pid, signal.SIGKILL)
    wait_for(lambda: server.get("/health", timeout=30)[0] == 503, 60, "a 503 of /health")
    assert server.get("/livez")[0] == 200
    wait_for(lambda: server.get("/health", timeout=30)[0] == 200, 400, "a 200 of /health")
    assert [ask("mine"), ask("poet"), ask(MODEL)] == [own["green"], own["poet"], base]

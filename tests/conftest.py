"""Fixtures that several test packages share."""

from __future__ import annotations

import importlib.util
import os
import shutil
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import time_limit

if TYPE_CHECKING:
    from rayswift.generate.transformers import TransformersEngine

REPOSITORY = Path(__file__).resolve().parent.parent


def pytest_configure(config: pytest.Config) -> None:
    """As a plugin it sees fixtures of the session too, which hooks of this file would not."""
    config.pluginmanager.register(time_limit)


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Tests find nothing in the user's token cache, and leave nothing there."""
    os.environ["RAYSWIFT_CACHE"] = str(tmp_path_factory.mktemp("rayswift-cache"))


@pytest.fixture(scope="session")
def smollm2_dir() -> str:
    """A real small chat model, SmolLM2-135M-Instruct in bf16: made once by tools/smollm2.py, then found there."""
    spec = importlib.util.spec_from_file_location("smollm2", REPOSITORY / "tools" / "smollm2.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.smollm2()


@pytest.fixture(scope="session")
def tiny_dir(smollm2_dir: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A random two-layer Llama that speaks SmolLM2's tokens, for tests that ask how answers travel, not which. Its
    weights are strong enough that other prompts get other answers."""
    from tiny_models import llama

    folder = tmp_path_factory.mktemp("tiny") / "tiny-llama"
    llama(vocab_size=49152, max_position_embeddings=2048, initializer_range=0.5).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja"):
        if (Path(smollm2_dir) / name).exists():
            shutil.copy(Path(smollm2_dir) / name, folder)
    return str(folder)


@pytest.fixture(scope="session")
def every_family(smollm2_dir: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """SmolLM2's tokenizer with the special tokens of every template family and agent format."""
    from chat_templates import save_every_family

    return save_every_family(smollm2_dir, tmp_path_factory.mktemp("every_family"))


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[None]:
    """One embedded Ray for the whole session, small enough for a laptop. Asking for it is what starts it."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    import ray

    ray.init(
        address="local",
        num_cpus=3,
        include_dashboard=False,
        log_to_driver=False,
        logging_level="error",
        object_store_memory=256 * 2**20,
    )
    yield
    ray.shutdown()


@pytest.fixture(scope="session")
def engine(smollm2_dir: str) -> TransformersEngine:
    """The real small model, loaded once."""
    from rayswift.data.tokens.encoder import Encoder
    from rayswift.generate.transformers import TransformersEngine

    return TransformersEngine.load(Encoder(smollm2_dir), use_gpu=False)


@pytest.fixture(scope="session")
def checkpoint(smollm2_dir: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A LoRA checkpoint as a run leaves it, with a random adapter strong enough to change every answer."""
    import torch
    from peft import LoraConfig, get_peft_model

    from rayswift.arguments import make_arguments
    from rayswift.modeling.loading import load_model

    torch.manual_seed(0)
    config = LoraConfig(task_type="CAUSAL_LM", r=1, target_modules=r".*layers\.29\.mlp\.down_proj")
    peft_model = get_peft_model(load_model(smollm2_dir), config)
    for name, parameter in peft_model.named_parameters():
        if "lora_" in name:
            parameter.data.normal_(std=5)
    folder = tmp_path_factory.mktemp("run") / "checkpoint-7"
    peft_model.save_pretrained(folder)
    make_arguments("sft", model=smollm2_dir, dataset=["x.jsonl"], system="Answer with one word.").save(
        folder / "args.json"
    )
    return str(folder)


SERVED_KEY = "sk-of-the-endpoint-tests"


@contextmanager
def serving(engine: TransformersEngine, name: str) -> Iterator[ServedEngine]:
    """An engine behind OpenAI's interface on a port of 127.0.0.1, with a key, as ``rayswift deploy`` serves it."""
    import uvicorn
    from starlette.responses import JSONResponse

    from rayswift.serve.replica.transformers import TransformersServing

    serving = TransformersServing(engine, name)

    async def app(scope: Any, receive: Any, send: Any) -> None:
        allowed = scope["type"] != "http" or (b"authorization", f"Bearer {SERVED_KEY}".encode()) in scope["headers"]
        refusal = JSONResponse({"error": {"message": "wrong key", "type": "authentication_error"}}, 401)
        await (serving.app if allowed else refusal)(scope, receive, send)

    listener = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(app, log_level="error"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    yield ServedEngine(f"http://127.0.0.1:{listener.getsockname()[1]}/v1", SERVED_KEY, serving)
    server.should_exit = True
    thread.join(20)


@pytest.fixture(scope="session")
def served(engine: TransformersEngine) -> Iterator[ServedEngine]:
    """The real small model behind OpenAI's interface."""
    with serving(engine, "small") as found:
        yield found


@pytest.fixture(scope="session")
def tiny_served(tiny_dir: str) -> Iterator[ServedEngine]:
    """The random model behind OpenAI's interface."""
    from rayswift.data.tokens.encoder import Encoder
    from rayswift.generate.transformers import TransformersEngine

    engine = TransformersEngine.load(Encoder(tiny_dir), torch_dtype="float32", use_gpu=False)
    with serving(engine, "tiny") as found:
        yield found


@dataclass(frozen=True)
class ServedEngine:
    """Where the endpoint is, its key, and what runs behind it."""

    base_url: str
    api_key: str
    serving: Any

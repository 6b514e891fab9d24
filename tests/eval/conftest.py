"""A tiny model behind OpenAI's interface, served in this process."""

from __future__ import annotations

import os
import shutil
import socket
import threading
from collections.abc import Iterator
from typing import Any

import pytest

# No test reaches a hub: a benchmark without local data has to fail at once.
os.environ.setdefault("HF_HUB_OFFLINE", "1")


@pytest.fixture(scope="session", autouse=True)
def _one_index_of_tasks() -> None:
    """lm-eval reads all its task files for each TaskManager, for seconds: once is enough here."""
    try:
        from lm_eval.tasks import TaskManager
    except ImportError:
        return
    real, read = TaskManager.__init__, {}

    def once(self: TaskManager, **settings: Any) -> None:
        if not read:
            real(self, **settings)
            read.update(vars(self))
        vars(self).update(read)

    TaskManager.__init__ = once


@pytest.fixture(scope="session")
def small_endpoint(smollm2_dir: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Base URL of a random two-layer Llama that speaks SmolLM2's tokens, under the name ``small``."""
    import uvicorn
    from tiny_models import llama

    from rayswift.data.tokens.encoder import Encoder
    from rayswift.generate.transformers import TransformersEngine
    from rayswift.serve.replica.transformers import TransformersServing

    folder = tmp_path_factory.mktemp("tiny") / "small"
    shutil.copytree(smollm2_dir, folder, ignore=shutil.ignore_patterns("*.safetensors", "*config.json"))
    shutil.copy(os.path.join(smollm2_dir, "tokenizer_config.json"), folder)
    llama(vocab_size=49152, max_position_embeddings=2048, initializer_range=0.5).save_pretrained(folder)
    serving = TransformersServing(TransformersEngine.load(Encoder(str(folder)), use_gpu=False), "small")
    listener = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(serving.app, log_level="error"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{listener.getsockname()[1]}/v1"
    server.should_exit = True
    thread.join(20)

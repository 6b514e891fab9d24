"""One served model for all tests that only ask questions."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest
from serving import KEYS, MODEL, Deployment, deployed


@pytest.fixture(scope="session")
def server(smollm2_dir: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    """SmolLM2-135M with two keys, and a folder of adapters in which one cannot be used."""
    folder = tmp_path_factory.mktemp("served")
    broken = folder / "adapters" / "broken"
    broken.mkdir(parents=True)
    config = {"peft_type": "LORA", "r": 8, "lora_alpha": 32, "target_modules": ["q_proj"]}
    (broken / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": smollm2_dir}))
    (broken / "adapter_model.bin").write_bytes(b"\x80\x04not safetensors")
    flags = ["--api_key", *KEYS, "--served_model_name", MODEL, "--adapter_root", str(broken.parent)]
    # Small limits, so that a crowd of a test's size is too much.
    flags += ["--max_ongoing_requests", "32", "--max_queued_requests", "64"]
    with deployed(smollm2_dir, folder, *flags, api_key=KEYS[0]) as running:
        yield running

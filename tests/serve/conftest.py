"""The engine of the serve tests: the real small model, loaded once."""

from __future__ import annotations

import pytest

from rayswift.data.encoding import Encoder
from rayswift.serve.transformers_engine import TransformersEngine


@pytest.fixture(scope="session")
def engine(smollm2_dir: str) -> TransformersEngine:
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

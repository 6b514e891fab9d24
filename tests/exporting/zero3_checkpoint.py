"""Write a LoRA checkpoint as a ZeRO-3 run leaves it that does not gather weights: run by test_zero_shards.py.

    python zero3_checkpoint.py BASE_MODEL CHECKPOINT EXPECTED_ADAPTER deepspeed|own

The run trains one step in one process. EXPECTED_ADAPTER gets the same adapter as PEFT saves it. The shards
are DeepSpeed's or RaySwift's own.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path


def main(base: str, checkpoint: str, expected: str, shards: str) -> None:
    os.environ.update(DS_ACCELERATOR="cpu", RANK="0", LOCAL_RANK="0", WORLD_SIZE="1")
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=os.environ.get("TEST_PORT", "29517"))
    import deepspeed
    import torch
    from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
    from pyarrow import fs
    from safetensors.torch import save_file

    from rayswift.modeling.loading import load_model
    from rayswift.train.checkpoints.manifest import hash_files, write_manifest
    from rayswift.train.checkpoints.zero import save_zero_state
    from rayswift.train.deepspeed import prepare_deepspeed

    prepare_deepspeed(use_gpu=False, local_world_size=1)
    config = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    model = get_peft_model(load_model(base, torch_dtype="float32"), config)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    settings = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 3},
                "zero_allow_untested_optimizer": True}  # fmt: skip
    engine, *_ = deepspeed.initialize(model=model, optimizer=torch.optim.AdamW(trained, lr=0.01), config=settings)
    tokens = torch.arange(3, 40)[None]
    engine.backward(engine(input_ids=tokens, labels=tokens).loss)
    engine.step()
    if shards == "deepspeed":
        engine.save_checkpoint(checkpoint, tag="global_step1")
    else:
        assert save_zero_state(engine, checkpoint, 0, 1)
    model.peft_config["default"].save_pretrained(checkpoint)
    write_manifest(fs.LocalFileSystem(), checkpoint, 1, hash_files(checkpoint))
    with deepspeed.zero.GatheredParameters(list(model.parameters())):
        whole = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
        tensors = get_peft_model_state_dict(model, state_dict=whole)
    Path(expected).mkdir()
    save_file(tensors, Path(expected) / "adapter_model.safetensors", metadata={"format": "pt"})
    model.peft_config["default"].save_pretrained(expected)


if __name__ == "__main__":
    main(*sys.argv[1:])

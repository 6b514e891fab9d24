"""A micro-step never has the host wait for the device: on ``meta``, where nothing can be read, it runs through."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_trainer import Run, plain_steps
from tiny_models import llama
from torch.utils._python_dispatch import TorchDispatchMode

from rayswift.data.tokens.table import TokenizedRow
from rayswift.modeling.packed_rows import keep_rows_apart
from rayswift.modeling.varlen_attention import FUSED, NAME
from rayswift.train.collate import Collator
from rayswift.train.fused_lora import fuse_lora


def row(length: int, trained: int) -> TokenizedRow:
    ids = np.arange(3, 3 + length, dtype=np.int32)
    return TokenizedRow(ids, np.where(np.arange(length) < length - trained, -100, ids).astype(np.int32))


class Waits(TorchDispatchMode):
    """Copies between host and device that the host waits for. (What reads a value fails on ``meta`` by itself.)"""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        tensors = [one for one in (*args, out) if isinstance(one, torch.Tensor)]
        if "copy" in str(func) and len({one.device.type for one in tensors}) > 1 and not kwargs.get("non_blocking"):
            self.found.append(str(func))
        return out


def on_meta(trainer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have the trainer take ``meta`` for its accelerator."""
    device = torch.device("meta")
    trainer.model.to(device)
    trainer.args.__dict__["_setup_devices"] = device
    trainer._counts = trainer._counts.to(device)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor)
    for name in ("is_autocast_enabled", "get_autocast_dtype"):  # which know no meta
        own = getattr(torch, name)
        monkeypatch.setattr(torch, name, lambda _device, own=own: own("cpu"))
    autocast = torch.autocast
    monkeypatch.setattr(torch, "autocast", lambda _device, **settings: autocast("cpu", **settings))


@pytest.mark.parametrize(
    ("joined", "attention", "checkpointing", "lora"),
    [
        (False, "sdpa", False, False),
        (False, "sdpa", True, True),
        (True, NAME, False, True),
        (True, FUSED, True, False),
    ],
)
def test_a_micro_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, joined: bool, attention: str, checkpointing: bool, lora: bool
) -> None:
    class OneModel(Run):
        def model(self) -> Any:
            model = llama(attn_implementation=attention)
            model.config.use_cache = False
            if joined:
                keep_rows_apart(model, ())
            if lora:
                from peft import LoraConfig, get_peft_model

                model = get_peft_model(model, LoraConfig(target_modules="all-linear", lora_dropout=0.1))
                fuse_lora(model)
            return model

    trainer = OneModel(tmp_path, plain_steps(1)).trainer
    if checkpointing:
        trainer.model.enable_input_require_grads()
        trainer.model.gradient_checkpointing_enable({"use_reentrant": True})
    assert trainer.loss_head is not None
    on_meta(trainer, monkeypatch)
    for rows in ([row(7, 3)], [row(7, 3), row(4, 2)]):
        with Waits() as waits:
            trainer.training_step(trainer.model, Collator(0, flat=joined)(rows), torch.ones((), device="meta"))
        assert waits.found == []
    assert any(parameter.grad is not None for parameter in trainer.model.parameters())

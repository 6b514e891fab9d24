"""Every kind of adapter, and every other optimiser: trained, saved, loaded, gone on with, merged."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from peft.tuners.lora import Linear
from tiny_models import llama, word_tokenizer

from rayswift.arguments import make_arguments
from rayswift.arguments.tuner import TunerArguments
from rayswift.data.tokens.table import TokenizedRow
from rayswift.errors import UserError
from rayswift.modeling.adapter_kinds import not_trainable, only_merged
from rayswift.modeling.adapters import load_adapter
from rayswift.modeling.loading import load_model
from rayswift.modeling.merging import merge_adapter
from rayswift.train.collate import Collator
from rayswift.train.hf_arguments import hf_training_arguments
from rayswift.train.loader import Rank
from rayswift.train.model import build_model
from rayswift.train.schedule import StepSchedule
from rayswift.train.optimizers import trainer_settings
from rayswift.train.stopping import Wish

IDS = torch.arange(3, 40)[None]
STEPS = 4
#: Settings that a model of 32 dimensions needs.
KINDS: dict[str, dict[str, Any]] = {
    "adalora": {"adalora_init_r": 4, "adalora_target_r": 2},
    "boft": {"lora_dtype": "float32"},
    "bone": {"init_weights": "bat"},
    "fourierft": {"fourier_n_frequency": 50},
    "ia3": {},
    "vera": {"vera_rank": 8},
}


def rows(step: int, count: int = 2) -> dict[str, torch.Tensor]:
    """A batch of rows of unlike lengths, the first four tokens not trained."""
    generator = torch.Generator().manual_seed(step)
    found = []
    for row in range(count):
        ids = torch.randint(3, 150, (10 + row,), generator=generator, dtype=torch.int32).numpy()
        labels = ids.copy()
        labels[:4] = -100
        found.append(TokenizedRow(ids, labels))
    return Collator(2)(found)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A model folder."""
    folder = tmp_path_factory.mktemp("base")
    llama().save_pretrained(folder)
    word_tokenizer().save_pretrained(folder)
    return str(folder)


class Run:
    """A supervised training in this process, from its beginning or a checkpoint."""

    def __init__(self, base: str, folder: Path, resume: str | None = None, **flags: Any) -> None:
        from rayswift.train.trainers.sft import SftTrainer

        settings = {"learning_rate": 1e-2, "lr_scheduler_type": "constant", "save_steps": 2, "logging_steps": 1}
        args = make_arguments("sft", model=base, dataset=["d"], split_dataset_ratio=0, gradient_checkpointing=False,
                              **settings | flags)  # fmt: skip
        plan = StepSchedule(2, 2, STEPS, STEPS)
        events: list[dict[str, Any]] = []
        torch.manual_seed(0)
        begin = int(resume.rsplit("-", 1)[1]) if resume else 0
        self.trainer = SftTrainer(
            model=build_model(args, base, "float32", None, resume, max_steps=STEPS),
            args=hf_training_arguments(args, plan, 1, str(folder), "float32", False, False),
            processing_class=word_tokenizer(),
            loader=[rows(step) for step in range(begin, STEPS)],
            schedule=plan,
            val_rows=None,
            rank=Rank(0, 1),
            push=events.append,
            save=lambda _, write: write() is None,
            wish=lambda: Wish.NOTHING,
            collate=Collator(2),
            router_aux_loss_coef=args.router_aux_loss_coef,
            **trainer_settings(args),
        )
        self.begun = {name: p.detach().clone() for name, p in self.trainer.model.named_parameters()}
        self.trainer.train(resume_from_checkpoint=resume)
        self.losses = [event["row"]["loss"] for event in events if event["event"] == "log" and "loss" in event["row"]]

    @property
    def changed(self) -> set[str]:
        """Names of the weights that training has changed."""
        return {n for n, p in self.trainer.model.named_parameters() if not torch.equal(p, self.begun[n])}


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_adapter_trains_loads_goes_on_and_merges(kind: str, base: str, tmp_path: Path) -> None:
    flags = {"train_type": kind, "lora_dropout": 0.0, **KINDS[kind]}
    run = Run(base, tmp_path / "a", **flags)
    trained = logits(run.trainer.model)
    assert run.changed and not any("base_layer" in name or "embed" in name for name in run.changed)
    assert not torch.allclose(trained, logits(load_model(base, torch_dtype="float32")), atol=1e-4)
    checkpoint = str(tmp_path / "a" / f"checkpoint-{STEPS}")
    assert torch.allclose(logits(load_adapter(load_model(base, torch_dtype="float32"), checkpoint)), trained, atol=1e-4)
    outside = PeftModel.from_pretrained(load_model(base, torch_dtype="float32"), checkpoint)
    assert torch.allclose(logits(outside), trained, atol=1e-4)
    again = Run(base, tmp_path / "b", str(tmp_path / "a" / "checkpoint-2"), **flags)
    assert again.losses == pytest.approx(run.losses[2:], abs=1e-6)
    assert torch.allclose(logits(again.trainer.model), trained, atol=1e-5)
    merged = merge_adapter(checkpoint, base, str(tmp_path / "merged"), "float32")
    assert torch.allclose(logits(load_model(merged, torch_dtype="float32")), trained, atol=2e-4)
    reason = only_merged(json.loads(Path(checkpoint, "adapter_config.json").read_text()))
    assert reason and "only LoRA is served" in reason

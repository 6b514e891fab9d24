"""What training with adapters leaves behind fits the model it began with, and goes on from there exactly."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from tiny_models import llama, word_tokenizer

from rayswift.arguments import make_arguments
from rayswift.data.tokens.table import TokenizedRow
from rayswift.errors import UserError
from rayswift.modeling.adapters import add_adapter
from rayswift.modeling.loading import load_model
from rayswift.modeling.merging import merge_adapter
from rayswift.train.collate import PairCollator
from rayswift.train.hf_arguments import hf_training_arguments
from rayswift.train.loader import Rank
from rayswift.train.model import build_model
from rayswift.train.resume import Resume
from rayswift.train.schedule import StepSchedule
from rayswift.train.stopping import Wish

IDS = torch.arange(3, 40)[None]
STEPS = 4
PAIR = PairCollator(2)


def pairs(step: int) -> dict[str, torch.Tensor]:
    """A batch of two pairs with a question of four tokens."""
    rng = np.random.RandomState(step)
    rows = []
    for answer in (5, 7):
        sides = [np.append(np.arange(3, 7), rng.randint(10, 150, answer)).astype(np.int32) for _ in range(2)]
        labels = [np.where(np.arange(len(side)) < 4, -100, side).astype(np.int32) for side in sides]
        rows.append(TokenizedRow(np.concatenate(sides), np.concatenate(labels), rejected_start=len(sides[0])))
    return PAIR(rows)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A model folder."""
    folder = tmp_path_factory.mktemp("base")
    llama().save_pretrained(folder)
    word_tokenizer().save_pretrained(folder)
    return str(folder)


class Run:
    """A DPO training in this process of an adapter with ``flags``, from its beginning or a checkpoint."""

    def __init__(self, base: str, folder: Path, resume: str | None = None, **flags: Any) -> None:
        from rayswift.train.trainers.dpo import PreferenceTrainer

        args = make_arguments(
            "rlhf", model=base, dataset=["d"], learning_rate=1e-2, lr_scheduler_type="constant", save_steps=2,
            logging_steps=1, split_dataset_ratio=0, gradient_checkpointing=False, **flags,
        )  # fmt: skip
        plan = StepSchedule(1, 1, STEPS, STEPS)
        events: list[dict[str, Any]] = []
        torch.manual_seed(0)
        begin = int(resume.rsplit("-", 1)[1]) if resume else 0
        self.trainer = PreferenceTrainer(
            model=build_model(args, base, "float32", None, resume),
            args=hf_training_arguments(args, plan, 1, str(folder), "float32", False, False),
            processing_class=word_tokenizer(),
            loader=[pairs(step) for step in range(begin, STEPS)],
            schedule=plan,
            val_rows=None,
            rank=Rank(0, 1),
            push=events.append,
            save=lambda _, write: write() is None,
            wish=lambda: Wish.NOTHING,
            collate=PAIR,
        )
        self.references: list[torch.Tensor] = []
        compute = self.trainer.compute_ref_log_probs

        def computed(*of: Any) -> Any:
            found = compute(*of)
            self.references.append(torch.cat(found))
            return found

        self.trainer.compute_ref_log_probs = computed
        self.trainer.train(resume_from_checkpoint=resume)
        self.rows = [event["row"] for event in events if event["event"] == "log" and "loss" in event["row"]]
        self.checkpoint = str(folder / f"checkpoint-{STEPS}")

    def logits(self) -> torch.Tensor:
        """What the trained model says."""
        return logits(self.trainer.model)


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(IDS).logits


def model_of(folder: str) -> Any:
    return load_model(folder, torch_dtype="float32").eval()


def reference_of(base: str, step: int) -> torch.Tensor:
    """Log-probabilities of a batch's answers by the model itself."""
    batch = pairs(step)
    found = logits_of(model_of(base), batch["input_ids"])[:, :-1].log_softmax(-1)
    chosen = found.gather(-1, batch["input_ids"][:, 1:, None].long())[..., 0]
    return (chosen * batch["completion_mask"][:, 1:]).sum(1)


def logits_of(model: Any, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(ids.long()).logits


WAYS: dict[str, dict[str, Any]] = {
    "pissa_niter": {"init_weights": "pissa_niter_2", "use_rslora": True, "modules_to_save": ["all-norm"]},
    "olora": {"init_weights": "olora", "lora_dtype": "bfloat16"},
    "plain": {"lora_dropout": 0.5},
}


@dataclass(frozen=True)
class Trained:
    """A run and what it began with."""

    run: Run
    folder: Path
    flags: dict[str, Any]


@pytest.fixture(scope="module", params=WAYS)
def trained(request: pytest.FixtureRequest, base: str, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    folder = tmp_path_factory.mktemp(request.param)
    return Trained(Run(base, folder, **WAYS[request.param]), folder, WAYS[request.param])


def test_training_starts_from_the_model_and_is_compared_with_it(trained: Trained, base: str) -> None:
    assert trained.run.rows[0]["loss"] == pytest.approx(math.log(2), abs=1e-4)
    for step, found in enumerate(trained.run.references):
        assert torch.allclose(found, reference_of(base, step), atol=1e-3), step


def test_a_checkpoint_is_an_adapter_of_the_unchanged_model(trained: Trained, base: str) -> None:
    """By PEFT alone, beside another adapter in one model as a replica has them, and merged."""
    expected, plain = trained.run.logits(), logits(model_of(base))
    assert (expected - plain).abs().max() > 0.1
    found = PeftModel.from_pretrained(model_of(base), trained.run.checkpoint)
    near = 2e-3 if "lora_dtype" in trained.flags else 1e-4  # training itself multiplied in bfloat16
    assert torch.allclose(logits(found), expected, atol=near)
    with found.disable_adapter():
        assert torch.equal(logits(found), plain)
    config = json.loads(Path(trained.run.checkpoint, "adapter_config.json").read_text())
    assert config["init_lora_weights"] is True
    assert not Path(trained.run.checkpoint, "ref").exists()
    merged = merge_adapter(trained.run.checkpoint, base, str(trained.folder / "merged"))
    assert torch.allclose(logits(model_of(merged)), expected, atol=near)
    if "modules_to_save" in trained.flags:
        with pytest.raises(UserError, match="merge it"):
            add_adapter(model_of(base), trained.run.checkpoint, "one")
        return
    model = add_adapter(model_of(base), trained.run.checkpoint, "one")
    model = add_adapter(model, str(trained.folder / "checkpoint-2"), "two")
    model.set_adapter("one")
    assert torch.allclose(logits(model), expected, atol=near)
    with model.disable_adapter():
        assert torch.equal(logits(model), plain)


def test_a_run_goes_on_from_its_checkpoint_exactly(trained: Trained, base: str) -> None:
    again = Run(base, trained.folder / "again", str(trained.folder / "checkpoint-2"), **trained.flags)
    assert [row["loss"] for row in again.rows] == [row["loss"] for row in trained.run.rows[2:]]
    one, other = (load_file(f"{run.checkpoint}/adapter_model.safetensors") for run in (trained.run, again))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_the_reference_is_without_noise_and_dropout(base: str, tmp_path: Path) -> None:
    run = Run(base, tmp_path, neftune_noise_alpha=50, save_strategy="no")
    assert abs(run.rows[0]["loss"] - math.log(2)) > 1e-3, "the policy has no noise"
    for step, found in enumerate(run.references):
        assert torch.allclose(found, reference_of(base, step), atol=1e-4), step


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ({"init_weights": "orthogonal"}, None),
        ({"init_weights": "pissa", "use_dora": True}, None),
        ({"init_weights": "pissa", "target_modules": ["all-linear", "all-embedding"]}, "is for linear layers"),
        ({"init_weights": "pissa", "target_modules": ["lm_head"]}, "changes model.embed_tokens by"),
        ({"init_weights": "corda"}, "--init_weights corda"),
    ],
)
def test_a_run_checks_that_its_first_policy_is_the_model(flags: dict[str, Any], says: str | None, base: str) -> None:
    args = make_arguments("sft", model=base, dataset=["d"], **flags)
    if says is None:
        found = build_model(args, base, "float32", None)
        assert torch.allclose(logits(found), logits(model_of(base)), atol=1e-4)
        return
    with pytest.raises(UserError, match=says):
        build_model(args, base, "float32", None)


def test_an_adapter_saved_before_its_conversion_is_no_checkpoint_to_go_on_from(base: str, tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=8, init_lora_weights="pissa", target_modules="all-linear", task_type="CAUSAL_LM")
    get_peft_model(model_of(base), config).save_pretrained(tmp_path / "checkpoint-1")
    args = make_arguments("sft", model=base, dataset=["d"], init_weights="pissa")
    with pytest.raises(UserError, match="--resume_from_checkpoint"):
        build_model(args, base, "float32", None, str(tmp_path / "checkpoint-1"))


@pytest.mark.parametrize(
    ("trained", "flags", "says"),
    [
        ({"init_weights": "PiSSA"}, {}, "--init_weights true: the checkpoint was trained with pissa"),
        ({"deepspeed": "zero2"}, {}, "--deepspeed left out: the checkpoint was trained with zero2"),
        ({}, {"deepspeed": "zero1"}, "--deepspeed zero1: the checkpoint was trained with none"),
        ({"deepspeed": "zero0", "init_weights": "True"}, {}, None),
    ],
)
def test_what_going_on_cannot_change_is_refused(
    trained: dict[str, Any], flags: dict[str, Any], says: str | None, base: str, tmp_path: Path
) -> None:
    make_arguments("sft", model=base, dataset=["d"], **trained).save(tmp_path / "args.json")
    resume = Resume(str(tmp_path), None, None, str(tmp_path))
    args = make_arguments("sft", model=base, dataset=["d"], **flags)
    if says is None:
        resume.check_model(args, base)
        return
    with pytest.raises(UserError, match=says):
        resume.check_model(args, base)

"""Every kind of adapter, and every other optimiser: trained, saved, loaded, gone on with, merged."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from tiny_models import llama, qwen3_mixture, word_tokenizer

from rayswift.arguments import make_arguments
from rayswift.data.tokens.table import TokenizedRow
from rayswift.errors import UserError
from rayswift.modeling.adapter_kinds import only_merged
from rayswift.modeling.adapters import expert_parameters, find_parameters, load_adapter
from rayswift.modeling.loading import load_model
from rayswift.modeling.merging import merge_adapter
from rayswift.train.collate import Collator
from rayswift.train.hf_arguments import hf_training_arguments
from rayswift.train.loader import Rank
from rayswift.train.model import build_model
from rayswift.train.optimizers import Lisa, MuonWithAdam, trainer_settings
from rayswift.train.schedule import StepSchedule
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


@pytest.mark.slow
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


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A model of experts."""
    folder = tmp_path_factory.mktemp("mixture")
    qwen3_mixture().save_pretrained(folder)
    word_tokenizer().save_pretrained(folder)
    return str(folder)


EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]


@pytest.mark.slow
def test_target_parameters_trains_experts_and_keeps_what_it_trained(mixture: str, tmp_path: Path) -> None:
    flags = {"target_parameters": EXPERTS, "target_modules": ["q_proj"]}
    run = Run(mixture, tmp_path / "a", **flags)
    assert {"q_proj", "experts"} == {part for name in run.changed for part in ("q_proj", "experts") if part in name}
    trained, checkpoint = logits(run.trainer.model), str(tmp_path / "a" / f"checkpoint-{STEPS}")
    again = Run(mixture, tmp_path / "b", str(tmp_path / "a" / "checkpoint-2"), **flags)
    assert again.losses == pytest.approx(run.losses[2:], abs=1e-6)
    assert torch.allclose(logits(again.trainer.model), trained, atol=1e-5)
    merged = merge_adapter(checkpoint, mixture, str(tmp_path / "merged"), "float32")
    plain = load_model(merged, torch_dtype="float32")
    assert type(plain).__name__ == "Qwen3MoeForCausalLM"
    assert torch.allclose(logits(plain), trained, atol=1e-4)
    assert not torch.allclose(logits(load_model(mixture, torch_dtype="float32")), trained, atol=1e-3)
    assert "target_parameters" in (only_merged(json.loads(Path(checkpoint, "adapter_config.json").read_text())) or "")


def test_what_experts_there_are_is_known_by_name(mixture: str) -> None:
    model = load_model(mixture, torch_dtype="float32")
    assert expert_parameters(model) == sorted(EXPERTS)
    assert expert_parameters(llama()) == []
    with pytest.raises(UserError, match=r"--target_parameters mlp.x: the model has no such parameter; it has mlp.exp"):
        find_parameters(model, ["mlp.x"])


@pytest.mark.slow
def test_the_auxiliary_loss_is_that_of_transformers(mixture: str, tmp_path: Path) -> None:
    """One micro-batch a step, the first loss: the tokens' own plus Transformers' with this coefficient."""
    from transformers import AutoModelForCausalLM

    flags = {"train_type": "full", "learning_rate": 0.0, "gradient_accumulation_steps": 1}
    plain = Run(mixture, tmp_path / "a", **flags).losses[0]
    balanced = Run(mixture, tmp_path / "b", router_aux_loss_coef=0.5, **flags)
    expected = AutoModelForCausalLM.from_pretrained(mixture, router_aux_loss_coef=0.5, output_router_logits=True)
    batch = rows(0)
    assert balanced.losses[0] == pytest.approx(float(expected(**batch).loss), abs=1e-5)
    assert balanced.losses[0] - plain > 0.4
    saved = json.loads(Path(tmp_path, "b", "checkpoint-4", "config.json").read_text())
    assert not saved.get("output_router_logits")


@pytest.mark.slow
def test_lisa_trains_few_layers_at_a_time_and_goes_on_exactly(base: str, tmp_path: Path) -> None:
    flags = {"train_type": "full", "lisa_activated_layers": 1, "lisa_step_interval": 1, "seed": 3}
    run = Run(base, tmp_path / "a", **flags)
    turns = [Lisa(1, 1, 3), Lisa(1, 1, 3)]
    assert len({_active(turns[0], step) for step in range(20)}) == 2
    assert [_active(turns[0], step) for step in range(20)] == [_active(turns[1], step) for step in range(20)]
    again = Run(base, tmp_path / "b", str(tmp_path / "a" / "checkpoint-2"), **flags)
    assert torch.allclose(logits(again.trainer.model), logits(run.trainer.model), atol=1e-6)
    one = Run(base, tmp_path / "c", **flags | {"lisa_step_interval": 99})
    layers = {name.split(".")[2] for name in one.changed if ".layers." in name}
    assert len(layers) == 1 and "model.embed_tokens.weight" in one.changed
    with pytest.raises(UserError, match="--lisa_activated_layers 3: the model has 2 layers"):
        Run(base, tmp_path / "d", **flags | {"lisa_activated_layers": 3})


def _active(lisa: Lisa, step: int) -> int:
    lisa.layers = [torch.nn.Linear(1, 1) for _ in range(2)]
    lisa._choose(step)
    return next(number for number, layer in enumerate(lisa.layers) if layer.weight.requires_grad)


@pytest.mark.slow
@pytest.mark.parametrize("train_type", ["lora", "full"])
def test_muon_trains_matrices_and_adam_the_rest_and_both_go_on_exactly(
    train_type: str, base: str, tmp_path: Path
) -> None:
    flags = {"train_type": train_type, "optimizer": "muon", "lora_dropout": 0.0, "optim_args": "ns_steps=4"}
    run = Run(base, tmp_path / "a", **flags)
    optimizer: Any = run.trainer.optimizer.optimizer
    by_kind = {group["is_muon"]: group for group in optimizer.param_groups}
    assert all(p.ndim == 2 for p in by_kind[True]["params"]) and by_kind[True]["ns_steps"] == 4
    if train_type == "full":
        embeddings = run.trainer.model.get_input_embeddings().weight
        adams = [p for group in optimizer.param_groups if not group["is_muon"] for p in group["params"]]
        assert any(p is embeddings for p in adams) and any(p.ndim == 1 for p in adams)
    again = Run(base, tmp_path / "b", str(tmp_path / "a" / "checkpoint-2"), **flags)
    assert torch.allclose(logits(again.trainer.model), logits(run.trainer.model), atol=1e-6)


def test_one_step_of_muon_is_pytorchs(base: str) -> None:
    model, alone = llama(), llama()
    mine = MuonWithAdam(model, 0.1, 0.0, (0.9, 0.95), 1e-8, {})
    name, weight = next((n, p) for n, p in alone.named_parameters() if n.endswith("q_proj.weight"))
    theirs = torch.optim.Muon([weight], lr=0.1, weight_decay=0.0, adjust_lr_fn="match_rms_adamw")
    for each in (model, alone):
        each(input_ids=IDS, labels=IDS).loss.backward()
    mine.step(), theirs.step()
    assert torch.equal(dict(model.named_parameters())[name], weight)


def test_fused_lora_leaves_all_but_plain_lora_alone(base: str, mixture: str) -> None:
    from rayswift.train.fused_lora import fuse_lora

    def fused(model: str, **flags: Any) -> int:
        args = make_arguments("sft", model=model, dataset=["d"], **flags)
        built = build_model(args, model, "float32", None, max_steps=STEPS)
        fuse_lora(built)
        return sum("forward" in vars(layer) and hasattr(layer, "lora_A") for layer in built.modules())

    assert all(fused(base, train_type=kind, **KINDS[kind]) == 0 for kind in KINDS)
    assert fused(mixture, target_parameters=EXPERTS, target_modules=["q_proj"]) == 2

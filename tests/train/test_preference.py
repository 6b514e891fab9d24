"""Preference training on a small real model: losses are DPO's, and every pair of a step counts the same."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_models import llama
from transformers import PreTrainedTokenizerBase

from rayswift.arguments import make_arguments
from rayswift.data.tokens.table import TokenizedRow
from rayswift.errors import UserError
from rayswift.modeling.loading import load_tokenizer
from rayswift.train.collate import PairCollator
from rayswift.train.hf_arguments import hf_training_arguments
from rayswift.train.loader import Rank
from rayswift.train.schedule import StepSchedule
from rayswift.train.stopping import Wish

BETA = 0.3
PAIR = PairCollator(0)


def pair(seed: int) -> TokenizedRow:
    """A question of four tokens and two answers of different lengths."""
    rng = np.random.RandomState(seed)
    sides = [rng.randint(1, 90, 4 + answer).astype(np.int32) for answer in (3 + seed % 3, 2 + seed % 4)]
    sides[1][:4] = sides[0][:4]
    labels = [np.where(np.arange(len(side)) < 4, -100, side).astype(np.int32) for side in sides]
    return TokenizedRow(np.concatenate(sides), np.concatenate(labels), rejected_start=len(sides[0]))


def test_all_chosen_conversations_come_before_all_rejected_ones() -> None:
    rows = [
        TokenizedRow(np.array([1, 2, 3, 1, 4]), np.array([-100, 2, 3, -100, 4]), rejected_start=3),
        TokenizedRow(np.array([5, 6, 5, 7, 8, 9]), np.array([-100, 6, -100, -100, 8, 9]), rejected_start=2),
    ]
    batch = {name: tensor.tolist() for name, tensor in PAIR(rows).items()}
    assert batch == {
        "input_ids": [[1, 2, 3, 0], [5, 6, 0, 0], [1, 4, 0, 0], [5, 7, 8, 9]],
        "attention_mask": [[1, 1, 1, 0], [1, 1, 0, 0], [1, 1, 0, 0], [1, 1, 1, 1]],
        "completion_mask": [[0, 1, 1, 0], [0, 1, 0, 0], [0, 1, 0, 0], [0, 0, 1, 1]],
        "num_pairs": 2,
    }


@pytest.fixture(scope="module")
def tokenizer(smollm2_dir: str) -> PreTrainedTokenizerBase:
    return load_tokenizer(smollm2_dir, trust_remote_code=False)


class Run:
    """A training of a small Llama in this process, and what it logged."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        folder: Path,
        micro_batches: list[list[TokenizedRow]],
        accumulation: int = 1,
        val: list[TokenizedRow] | None = None,
        **flags: Any,
    ) -> None:
        from rayswift.train.trainers.dpo import PreferenceTrainer

        args = make_arguments(
            "rlhf", model="m/m", dataset=["d"], train_type="full", beta=BETA, learning_rate=1.0, optim="sgd",
            lr_scheduler_type="constant", warmup_ratio=0, weight_decay=0, save_strategy="no", logging_steps=1,
            max_grad_norm=1e9, split_dataset_ratio=0, **flags,
        )  # fmt: skip
        steps = len(micro_batches) // accumulation
        plan = StepSchedule(accumulation, 1, steps, steps)
        events: list[dict[str, Any]] = []
        model = llama(vocab_size=49152)
        self.reference = copy.deepcopy(model)
        self.trainer = PreferenceTrainer(
            model=model,
            ref_model=copy.deepcopy(model),
            args=hf_training_arguments(args, plan, 1, str(folder), "float32", False, False),
            processing_class=tokenizer,
            loader=[PAIR(rows) for rows in micro_batches],
            schedule=plan,
            val_rows=val,
            rank=Rank(0, 1),
            push=events.append,
            save=lambda _, write: write() is None,
            wish=lambda: Wish.NOTHING,
            collate=PAIR,
        )
        self.trainer.train()
        self.rows = [event["row"] for event in events if event["event"] == "log" and "loss" in event["row"]]


def log_probability(model: Any, ids: np.ndarray, labels: np.ndarray) -> torch.Tensor:
    """Summed log-probability of the answer's tokens."""
    with torch.no_grad():
        logits = model(input_ids=torch.tensor(ids, dtype=torch.long)[None]).logits[0].float().log_softmax(-1)
    places = np.flatnonzero(labels != -100)
    return logits[places - 1, torch.tensor(ids[places], dtype=torch.long)].sum()


def dpo(model: Any, reference: Any, rows: list[TokenizedRow]) -> dict[str, float]:
    """The DPO paper's equation 7 and the rewards beside it, written out."""
    rewards = [
        [BETA * float(log_probability(model, side.input_ids, side.labels) -
                      log_probability(reference, side.input_ids, side.labels)) for side in row.chosen_and_rejected()]
        for row in rows
    ]  # fmt: skip
    margins = torch.tensor([chosen - rejected for chosen, rejected in rewards])
    return {
        "loss": float(-torch.nn.functional.logsigmoid(margins).mean()),
        "rewards/chosen": float(np.mean([chosen for chosen, _ in rewards])),
        "rewards/rejected": float(np.mean([rejected for _, rejected in rewards])),
        "rewards/margins": float(margins.mean()),
        "rewards/accuracies": float((margins > 0).float().mean()),
    }


def test_losses_and_rewards_are_those_of_the_paper(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    micro_batches = [[pair(0), pair(1)], [pair(2), pair(3)]]
    run = Run(tokenizer, tmp_path / "two", micro_batches)
    assert run.rows[0]["loss"] == pytest.approx(np.log(2), abs=1e-6)
    first = Run(tokenizer, tmp_path / "one", micro_batches[:1])
    expected = dpo(first.trainer.model, first.reference, micro_batches[1])
    assert abs(expected["rewards/margins"]) > 1e-2, "the first step changed nothing"
    assert {name: run.rows[1][name] for name in expected} == pytest.approx(expected, rel=1e-3, abs=1e-5)


def test_every_pair_of_a_step_counts_the_same(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    """Micro-batches of three, no and two pairs train what one of five trains."""
    rows = [pair(number) for number in range(5)]
    whole = Run(tokenizer, tmp_path / "whole", [rows, rows])
    parts = Run(tokenizer, tmp_path / "parts", [rows[:3], [], rows[3:]] * 2, accumulation=3)
    for one, other in zip(whole.rows, parts.rows, strict=True):
        names = [name for name in one if name.startswith(("loss", "rewards", "logps", "grad_norm"))]
        assert len(names) == 8
        assert {name: other[name] for name in names} == pytest.approx({name: one[name] for name in names}, rel=1e-4)


def test_an_evaluation_is_the_mean_over_all_pairs(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    rows = [pair(number) for number in range(5)]
    run = Run(tokenizer, tmp_path, [rows], val=rows, per_device_eval_batch_size=2)
    found = run.trainer.evaluate()
    expected = dpo(run.trainer.model, run.reference, rows)
    assert {name: found[f"eval_{name}"] for name in expected} == pytest.approx(expected, rel=1e-3)


@pytest.mark.slow
def test_the_likelihood_of_the_chosen_answer_can_be_trained_too(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    rows = [pair(0), pair(1)]
    plain, both = (Run(tokenizer, tmp_path / name, [rows], **flags) for name, flags in
                   (("plain", {}), ("both", {"rpo_alpha": 0.5})))  # fmt: skip
    sides = [row.chosen_and_rejected()[0] for row in rows]
    tokens = sum(int((side.labels != -100).sum()) for side in sides)
    likelihood = sum(float(log_probability(plain.reference, side.input_ids, side.labels)) for side in sides)
    added = both.rows[0]["loss"] - plain.rows[0]["loss"]
    assert added == pytest.approx(-0.5 * likelihood / tokens, rel=1e-4)


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ({"packing": True}, "--packing true: pairs are padded"),
        ({"truncation_strategy": "split"}, "a pair cannot be split"),
        ({"truncation_strategy": "split", "rlhf_type": "kto"}, "a pair cannot be split"),
        ({"loss_type": ["nothing"]}, "--loss_type nothing: DPO has no such loss"),
        ({"loss_type": ["exo_pair"]}, "--loss_type exo_pair needs --label_smoothing"),
        ({"loss_type": ["robust"], "label_smoothing": 0.5}, "--loss_type robust needs --label_smoothing below 0.5"),
        ({"ref_model": "other/model"}, "--ref_model needs --train_type full"),
        ({"ref_adapters": ["elsewhere"]}, "--ref_adapters"),
    ],
)
def test_what_pairs_cannot_do_is_refused(flags: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError, match=says):
        make_arguments("rlhf", model="m/m", dataset=["d"], **flags)


@pytest.mark.parametrize("method", ["orpo", "kto", "rm"])
def test_methods_that_are_not_built_are_refused_before_anything_starts(method: str) -> None:
    import rayswift

    with pytest.raises(UserError, match=f"--rlhf_type {method}: not built yet"):
        rayswift.rlhf(model="m/m", dataset=["d"], rlhf_type=method)

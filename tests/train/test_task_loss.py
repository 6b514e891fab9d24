"""Losses and metrics of tasks that tell numbers: the values that ms-swift 4.6's own functions give for these inputs."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from rayswift.arguments.tasks import TaskSettings
from rayswift.errors import UserError
from rayswift.train.task_loss import (
    classification_loss,
    infonce_loss,
    pair_loss,
    rank_loss,
    ranked_lists,
    with_matryoshka,
)
from rayswift.train.task_metrics import infonce_metrics, paired_metrics

SIZES = {"even": [4, 4, 4], "odd": [3, 5, 2], "pairs": [2, 2, 2]}
ALL = {"include_qq": True, "include_dd": True, "mask_fake_negative": True, "temperature": 0.05, "fake_neg_margin": 0.2}
#: Texts of the rows, settings, ms-swift's loss.
INFONCE = [
    ("even", {}, 3.4101047),
    ("even", {"use_batch": False}, 3.1923482),
    ("even", {"mask_fake_negative": True}, 0.3634302),
    ("even", {"include_qq": True}, 3.5586834),
    ("even", {"include_dd": True}, 3.5437317),
    ("even", ALL, 4.8993258),
    ("even", {"hard_negatives": 1}, 2.0413072),
    ("odd", {}, 4.5178227),
    ("odd", {"use_batch": False}, 2.1665292),
    ("odd", {"mask_fake_negative": True}, 0.6524453),
    ("odd", {"include_qq": True}, 4.5227809),
    ("odd", {"include_dd": True}, 5.2122626),
    ("odd", ALL, 9.2143373),
    ("pairs", {}, 4.2425175),
    ("pairs", {"use_batch": False}, 0.0),
    ("pairs", {"include_dd": True}, 4.2465219),
    ("pairs", ALL, 5.4584785),
]


def vectors(count: int, seed: int = 0) -> torch.Tensor:
    found = np.random.RandomState(seed).randn(count, 6).astype(np.float32)
    return torch.tensor(found / np.linalg.norm(found, axis=1, keepdims=True))


@pytest.mark.parametrize(("rows", "settings", "loss"), INFONCE)
def test_infonce(rows: str, settings: dict[str, float], loss: float) -> None:
    found = TaskSettings(**{f"infonce_{name}": value for name, value in settings.items()})  # type: ignore[arg-type]
    sizes = SIZES[rows]
    assert float(infonce_loss(vectors(sum(sizes), 1), sizes, found)) == pytest.approx(loss, abs=1e-5)


def test_losses_of_pairs_and_ranks() -> None:
    pairs, like = vectors(10), torch.tensor([0.0, 1, 0, 1, 1])
    assert float(pair_loss(pairs, torch.tensor([0.0, 1, 0.3, 1, 0]), "cosine_similarity")) == pytest.approx(0.3702926)
    assert float(pair_loss(pairs, like, "contrastive")) == pytest.approx(0.1971793)
    assert float(pair_loss(pairs, like, "online_contrastive")) == pytest.approx(1.5741041)
    scores = torch.tensor(np.random.RandomState(2).randn(9).astype(np.float32))
    fits = torch.tensor([1.0, 0, 0, 1, 0, 0, 0, 1, 0])
    for kind, settings, loss in (
        ("pointwise_reranker", TaskSettings(), 0.5735301),
        ("listwise_reranker", TaskSettings(), 0.7046595),
        (
            "listwise_reranker",
            TaskSettings(listwise_reranker_temperature=0.5, listwise_reranker_min_group_size=3),
            0.616412,
        ),
    ):
        assert float(rank_loss(scores, fits, kind, settings)) == pytest.approx(loss, abs=1e-6)
    ranks = [1 + int((one[1:] > one[0]).sum()) for one in ranked_lists(scores, fits)]
    assert np.mean([1 / rank for rank in ranks]) == pytest.approx(0.6666667)
    assert np.mean([1 / math.log2(rank + 1) for rank in ranks]) == pytest.approx(0.7539532)


def test_metrics_of_vectors() -> None:
    wanted = {"even": (-0.1026574, -0.0911223, 0.3484567), "odd": (-0.2377666, -0.0776915, 0.1168669),
              "pairs": (-0.0461587, 0.0111434, 0.1022028)}  # fmt: skip
    for rows, expected in wanted.items():
        found = infonce_metrics(vectors(sum(SIZES[rows]), 1), SIZES[rows], True)
        assert list(found) == ["margin", "mean_neg", "mean_pos"]
        assert list(found.values()) == pytest.approx(expected, abs=1e-6)
    one = torch.eye(4)
    pairs = torch.stack([one[0], one[0], one[0], (one[0] + one[1]) / 2**0.5, one[0], one[1]])
    found = paired_metrics(pairs, [2, 2, 2], [1.0, 0.8, 0.1])
    assert found["spearman_cosine"] == pytest.approx(1) and 0.9 < found["pearson_cosine"] < 1
    assert len(found) == 8


def test_losses_of_classes_and_of_shorter_vectors() -> None:
    logits = torch.tensor([[2.0, -1.0], [0.5, 0.5]])
    assert float(classification_loss(logits, torch.tensor([0, 1]), "single_label_classification")) == pytest.approx(
        (math.log1p(math.exp(-3)) + math.log(2)) / 2
    )
    assert float(classification_loss(logits, torch.zeros(2, 2), "regression")) == pytest.approx(5.5 / 4)
    several = classification_loss(logits, torch.tensor([[1.0, 0], [0, 1]]), "multi_label_classification")
    right, wrong = math.log1p(math.exp(-2)), math.log1p(math.exp(0.5))
    assert float(several) == pytest.approx((right + math.log1p(math.exp(-1)) + wrong + math.log1p(math.exp(-0.5))) / 4)
    texts, sizes = vectors(6, 1), [2, 2, 2]
    whole = float(infonce_loss(texts, sizes, TaskSettings()))
    assert float(with_matryoshka(lambda part: infonce_loss(part, sizes, TaskSettings()), texts, {6: 0.5})) == (
        pytest.approx(whole / 2)
    )


def test_swifts_environment_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("INFONCE_TEMPERATURE", "0.05")
    monkeypatch.setenv("INFONCE_USE_BATCH", "False")
    monkeypatch.setenv("MAX_NEGATIVE_SAMPLES", "3")
    found = TaskSettings.from_environment()
    assert (found.infonce_temperature, found.infonce_use_batch, found.max_negative_samples) == (0.05, False, 3)
    monkeypatch.setenv("INFONCE_HARD_NEGATIVES", "many")
    with pytest.raises(UserError, match="INFONCE_HARD_NEGATIVES=many: expected a whole number"):
        TaskSettings.from_environment()

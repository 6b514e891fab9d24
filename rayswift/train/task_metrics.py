"""What an evaluation measures of vectors: SWIFT's ``--eval_metric infonce`` and ``paired``."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise

import numpy as np
import torch


def infonce_metrics(vectors: torch.Tensor, sizes: Sequence[int], use_batch: bool) -> dict[str, float]:
    """How alike anchors are to their positives and to all other documents, and by how much the first wins on average.

    Args:
        vectors: (texts, size): of each row its anchor, its positive, its negatives.
        sizes: texts of each row.
        use_batch: all documents are compared, not those of the row alone.
    """
    groups = [vectors[start:end] for start, end in pairwise(accumulate(sizes, initial=0))]
    documents = torch.cat([group[1:] for group in groups])
    place, positive, negative, margins = 0, [], [torch.zeros(0)], []
    for group in groups:
        scores = documents @ group[0] if use_batch else group[1:] @ group[0]
        own = place if use_batch else 0
        others = torch.cat([scores[:own], scores[own + 1 :]])
        positive.append(float(scores[own]))
        negative.append(others)
        if len(others):
            margins.append(positive[-1] - float(others.max()))
        place += len(group) - 1
    every = torch.cat(negative)
    return {
        "margin": float(np.mean(margins)) if margins else 0.0,
        "mean_neg": float(every.mean()) if len(every) else 0.0,
        "mean_pos": float(np.mean(positive)),
    }


def paired_metrics(vectors: torch.Tensor, sizes: Sequence[int], likeness: Sequence[float]) -> dict[str, float]:
    """How the likeness of anchor and positive goes with what rows say of it: correlations of values and of ranks."""
    starts = list(accumulate(sizes[:-1], initial=0))
    one, other = vectors[starts].double(), vectors[[start + 1 for start in starts]].double()
    found = {
        "cosine": torch.nn.functional.cosine_similarity(one, other),
        "euclidean": -(one - other).norm(dim=1),
        "manhattan": -(one - other).abs().sum(1),
        "dot_product": (one * other).sum(1),
    }
    wanted = np.asarray(likeness, float)
    pearson = {f"pearson_{name}": _correlation(wanted, values.numpy()) for name, values in found.items()}
    ranks = {f"spearman_{name}": _correlation(_ranks(wanted), _ranks(values.numpy())) for name, values in found.items()}
    return pearson | ranks


def _correlation(one: np.ndarray, other: np.ndarray) -> float:
    """Pearson's; 0 where one side never changes."""
    one, other = one - one.mean(), other - other.mean()
    norm = np.sqrt((one**2).sum() * (other**2).sum())
    return float((one * other).sum() / norm) if norm else 0.0


def _ranks(values: np.ndarray) -> np.ndarray:
    """Ranks, the mean one for equal values."""
    _, place, counts = np.unique(values, return_inverse=True, return_counts=True)
    ends = np.cumsum(counts)
    return (ends - (counts - 1) / 2)[place]

"""The losses of tasks that tell numbers (``--loss_type``), as SWIFT defines them.

Each takes what the model tells of the texts of a micro-batch, and its groups: the texts of one row stand together. Each
gives the mean over its items (rows, groups or documents), but online contrastive, which is a sum.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate, pairwise

import torch
from torch.nn import functional

from rayswift.arguments.tasks import TaskSettings

#: Distance from which contrastive losses leave unlike texts alone.
MARGIN = 0.5


def classification_loss(logits: torch.Tensor, targets: torch.Tensor, problem: str) -> torch.Tensor:
    """Cross entropy of the class, binary cross entropy of each, or the mean squared error.

    Args:
        logits: (rows, labels).
        targets: class numbers (rows,), or of the same shape as `logits`.
        problem: ``--problem_type``.
    """
    logits = logits.float()
    if problem == "single_label_classification":
        return functional.cross_entropy(logits, targets)
    if problem == "multi_label_classification":
        return functional.binary_cross_entropy_with_logits(logits, targets)
    return functional.mse_loss(logits, targets)


def pair_loss(vectors: torch.Tensor, likeness: torch.Tensor, kind: str) -> torch.Tensor:
    """``cosine_similarity``, ``contrastive`` or ``online_contrastive`` of (pairs · 2, size) vectors, one pair after the
    other, whose `likeness` (pairs,) is a number, or 1 for like and 0 for unlike."""
    cosine = functional.cosine_similarity(vectors[0::2], vectors[1::2])
    likeness = likeness.to(cosine.dtype)
    if kind == "cosine_similarity":
        return functional.mse_loss(cosine, likeness)
    distance = 1 - cosine
    if kind == "contrastive":
        unlike = functional.relu(MARGIN - distance).pow(2)
        return (0.5 * (likeness * distance.pow(2) + (1 - likeness) * unlike)).mean()
    far, near = distance[likeness == 1], distance[likeness == 0]
    # Only what is mistaken for the other kind; of a single pair, what is beyond the mean of the others.
    hard_near = near[near < (far.max() if len(far) > 1 else near.mean())]
    hard_far = far[far > (near.min() if len(near) > 1 else far.mean())]
    return hard_far.pow(2).sum() + functional.relu(MARGIN - hard_near).pow(2).sum()


def infonce_loss(vectors: torch.Tensor, sizes: Sequence[int], settings: TaskSettings) -> torch.Tensor:
    """Cross entropy of finding each anchor's positive among the documents of the batch, or of its own row.

    Args:
        vectors: (texts, size): of each row its anchor, its positive, and its negatives.
        sizes: texts of each row.
    """
    groups = [vectors[start:end] for start, end in pairwise(accumulate(sizes, initial=0))]
    if settings.infonce_hard_negatives is not None:
        groups = [_with_negatives(group, settings.infonce_hard_negatives) for group in groups]
    minus = torch.tensor(float("-inf"), device=vectors.device, dtype=vectors.dtype)
    if not settings.infonce_use_batch:
        each = [_found((group[1:] @ group[0]) / settings.infonce_temperature, 0) for group in groups]
        return torch.stack(each).mean()
    anchors, documents = torch.stack([group[0] for group in groups]), torch.cat([group[1:] for group in groups])
    positives = list(accumulate((len(group) - 1 for group in groups[:-1]), initial=0))
    rows, places = torch.arange(len(groups)), torch.tensor(positives)
    scores = anchors @ documents.T
    limit = scores[rows, places][:, None].detach() + settings.infonce_fake_neg_margin
    hidden = (lambda part: torch.where(part > limit, minus, part)) if settings.infonce_mask_fake_negative else _as_is
    parts = [hidden(scores)]
    if settings.infonce_include_qq:
        own = torch.eye(len(groups), dtype=torch.bool, device=vectors.device)
        parts.append(hidden((anchors @ anchors.T).masked_fill(own, minus)))
    if settings.infonce_include_dd:
        between = documents[places] @ documents.T
        parts.append(between.index_put((rows, places), minus))
    every = torch.cat(parts, dim=1) / settings.infonce_temperature
    return functional.cross_entropy(every, places.to(every.device))


def _as_is(part: torch.Tensor) -> torch.Tensor:
    return part


def _found(scores: torch.Tensor, place: int) -> torch.Tensor:
    return functional.cross_entropy(scores[None], torch.tensor([place], device=scores.device))


def _with_negatives(group: torch.Tensor, count: int) -> torch.Tensor:
    """Anchor, positive and `count` negatives: the first of them, or with some again."""
    negatives = group[2:]
    if len(negatives) == 0 or len(negatives) >= count:
        return group[: count + 2]
    again = torch.arange(count - len(negatives)) % len(negatives)
    return torch.cat([group, negatives[again]])


def rank_loss(scores: torch.Tensor, fits: torch.Tensor, kind: str, settings: TaskSettings) -> torch.Tensor:
    """``pointwise_reranker`` or ``listwise_reranker`` of documents (documents,), of which those that fit (1) begin a
    list with the others (0) behind them."""
    scores = scores.float()
    if kind == "pointwise_reranker":
        return functional.binary_cross_entropy_with_logits(scores, fits.to(scores.dtype))
    lists = [one for one in ranked_lists(scores, fits) if len(one) >= settings.listwise_reranker_min_group_size]
    if not lists:
        return scores[:0].sum()
    return torch.stack([_found(one / settings.listwise_reranker_temperature, 0) for one in lists]).mean()


def ranked_lists(scores: torch.Tensor, fits: torch.Tensor) -> list[torch.Tensor]:
    """The scores of each query's documents, the one that fits first."""
    starts = torch.nonzero(fits == 1).flatten().tolist()
    return [scores[start:end] for start, end in pairwise([*starts, len(scores)])]


def with_matryoshka(
    loss: Callable[[torch.Tensor], torch.Tensor], vectors: torch.Tensor, dims: dict[int, float] | None
) -> torch.Tensor:
    """The loss of whole vectors; with ``--mrl_dims`` the weighted sum of those of their beginnings."""
    if not dims:
        return loss(vectors)
    shorter = [(weight, functional.normalize(vectors[:, :dim], dim=-1)) for dim, weight in dims.items()]
    return torch.stack([weight * loss(part) for weight, part in shorter]).sum()

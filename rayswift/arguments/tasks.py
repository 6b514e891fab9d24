"""The settings of models that tell numbers instead of text: ``--task_type seq_cls``, ``embedding``, ``reranker``,
``generative_reranker``."""

# ruff: noqa: RUF009 (arg() makes a dataclass field: it is meant to be called in the class body)
from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from typing import Any, ClassVar

from rayswift.arguments.fields import arg, read_json
from rayswift.arguments.training import BatchingArguments, CheckpointArguments, TrainingRules
from rayswift.errors import UserError

_RANK_LOSSES = ("pointwise_reranker", "listwise_reranker")
#: The losses of a task, its default first.
LOSSES: dict[str, tuple[str, ...]] = {
    "causal_lm": ("cross_entropy",),
    "seq_cls": ("cross_entropy",),
    "embedding": ("infonce", "cosine_similarity", "contrastive", "online_contrastive"),
    "reranker": _RANK_LOSSES,
    "generative_reranker": _RANK_LOSSES,
}
#: SWIFT's names for what an evaluation measures, by task; of vectors by ``--eval_metric``.
METRICS_OF_TASK: dict[str, tuple[str, ...]] = {
    "seq_cls": ("loss", "acc"),
    "regression": ("loss",),
    "infonce": ("loss", "margin", "mean_neg", "mean_pos"),
    "paired": ("loss", *(f"{kind}_{of}" for kind in ("pearson", "spearman")
                         for of in ("cosine", "euclidean", "manhattan", "dot_product"))),
    "reranker": ("loss", "acc", "mrr", "ndcg"),
}  # fmt: skip


def read_dims(raw: Any) -> dict[int, float]:
    """``{"64": 1.0, "256": 0.5}``: first numbers of a vector, and how much their loss weighs."""
    found = {int(dim): float(weight) for dim, weight in read_json(raw).items()}
    if min(found, default=1) < 1:
        raise ValueError("expected sizes of at least 1")
    return found


@dataclass(init=False, repr=False, eq=False)
class TaskRules(BatchingArguments, CheckpointArguments, TrainingRules):
    """What a model that tells numbers is trained by."""

    topic: ClassVar[str] = "Tasks other than text"

    loss_type: list[str] = arg(
        [], "loss of the task: infonce, cosine_similarity, contrastive or online_contrastive of vectors, "
        "pointwise_reranker or listwise_reranker of ranks",
        shown="cross_entropy; embedding: infonce; rerankers: pointwise_reranker",
        no_effect={"task_type=causal_lm|seq_cls": "text and classes have one loss"},
    )  # fmt: skip
    mrl_dims: dict[int, float] | None = arg(
        None, "Matryoshka: lengths of the vector that are trained, with the weight of each, as JSON", parse=read_dims,
        example='\'{"64": 1.0}\'', no_effect={"task_type!=embedding": "only with --task_type embedding"},
    )  # fmt: skip

    def problems(self) -> Iterator[str]:
        task = self.task_type
        if self.command == "rlhf":  # its losses are TRL's
            return
        if (given := " ".join(self.loss_type)) and given not in LOSSES[task]:
            yield f"--loss_type {given}: with --task_type {task} choose one of {', '.join(LOSSES[task])}"
        if task == "causal_lm":
            return
        if task == "seq_cls" and not self.num_labels:
            yield "--task_type seq_cls needs --num_labels, for example --num_labels 2"
        if task == "seq_cls" and self.problem_type == "single_label_classification" and self.num_labels == 1:
            yield "--problem_type single_label_classification contradicts --num_labels 1: one class tells nothing"
        wanted = self.eval_metric
        if wanted and wanted not in {"seq_cls": ("acc",), "embedding": ("infonce", "paired")}.get(task, ("reranker",)):
            yield f"--eval_metric {wanted}: is not measured with --task_type {task}; leave it out"
        if self.truncation_strategy == "split":
            yield f"--truncation_strategy split contradicts --task_type {task}: a text is read whole; use right or left"
        if self.streaming:
            yield f"--streaming true contradicts --task_type {task}: not built; leave it out"
        if self.training_args.get("use_liger_kernel"):
            yield f"--use_liger_kernel true contradicts --task_type {task}: its fused loss is for text; leave it out"

    def remarks(self) -> Iterator[str]:
        if (
            self.task_type == "embedding"
            and self.loss_type in ([], ["infonce"])
            and self.per_device_train_batch_size == 1
        ):
            yield ("--loss_type infonce with --per_device_train_batch_size 1: a row without negative_messages is told "
                   "from nothing; take more rows, which are each other's negatives")  # fmt: skip

    def metric_names(self) -> tuple[str, ...]:
        """What an evaluation measures."""
        name = self.task_type
        if name == "causal_lm":
            return super().metric_names()
        if name == "seq_cls" and self.problem_type == "regression":
            name = "regression"
        elif name == "embedding":
            name = self.measured
        return METRICS_OF_TASK["reranker" if name == "generative_reranker" else name]

    @property
    def measured(self) -> str:
        """The metrics of vectors: ``infonce`` or ``paired``."""
        return self.eval_metric or ("infonce" if self.loss_type in ([], ["infonce"]) else "paired")

    def resolve(self) -> None:
        if self.task_type == "causal_lm":
            return
        self.packing, self.padding_free = False, False  # texts are padded
        self.loss_type = self.loss_type or [LOSSES[self.task_type][0]]
        if self.task_type == "seq_cls" and self.problem_type is None:
            self.problem_type = "regression" if self.num_labels == 1 else "single_label_classification"


@dataclass(frozen=True)
class TaskSettings:
    """What SWIFT's environment variables say of the losses of vectors and ranks; see docs/train.md.

    ``infonce_temperature`` and so on: the variable in lower case.
    """

    infonce_temperature: float = 0.1
    infonce_use_batch: bool = True
    infonce_hard_negatives: int | None = None
    infonce_mask_fake_negative: bool = False
    infonce_fake_neg_margin: float = 0.1
    infonce_include_qq: bool = False
    infonce_include_dd: bool = False
    listwise_reranker_temperature: float = 1.0
    listwise_reranker_min_group_size: int = 2
    max_positive_samples: int = 1
    max_negative_samples: int = 7
    generative_reranker_positive_token: str = "yes"
    generative_reranker_negative_token: str = "no"

    @classmethod
    def from_environment(cls) -> TaskSettings:
        """UserError for a variable that is no number, or true or false."""
        found: dict[str, Any] = {}
        for field in fields(cls):
            if (text := os.environ.get(field.name.upper())) is None:
                continue
            kind = str(field.type).partition(" ")[0]
            try:
                found[field.name] = _READ[kind](text)
            except ValueError:
                raise UserError(f"{field.name.upper()}={text}: expected {_EXPECTED[kind]}") from None
        return cls(**found)


_EXPECTED = {"float": "a number", "int": "a whole number", "bool": "true or false"}


def _switch(text: str) -> bool:
    known = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
    if text.strip().lower() not in known:
        raise ValueError(text)
    return known[text.strip().lower()]


_READ: dict[str, Callable[[str], Any]] = {"float": float, "int": int, "bool": _switch, "str": str}

"""Training of models that tell numbers: classes, vectors, ranks (``--task_type``)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch
from peft import PeftModel

from rayswift.arguments.tasks import TaskSettings
from rayswift.modeling.task_models import write_sentence_transformers_files
from rayswift.modeling.telling import Teller
from rayswift.train import task_loss
from rayswift.train.collate import Batch
from rayswift.train.task_metrics import infonce_metrics, paired_metrics
from rayswift.train.trainers.step import StepTraining

#: What is counted: items of the loss, tokens, summed losses, judged things, right ones, lists, their sums of 1 / rank
#: and of the discounted gain.
_COUNTS = ("items", "tokens", "loss", "judged", "right", "lists", "mrr", "ndcg")


class TaskTrainer(StepTraining):
    """Classes, vectors or ranks, over the batches of :class:`~rayswift.train.collate.TaskCollator`.

    The mean over the items of a step (rows, lists or documents) is what SWIFT's mean over micro-batches of one size is.
    """

    NUM_COUNTS = len(_COUNTS)

    def __init__(self, *, run_args: Any, model_dir: str, task_settings: TaskSettings, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.run_args, self.model_dir, self.settings = run_args, model_dir, task_settings
        self.teller = Teller(self.model, run_args.task_type, model_dir, self.processing_class, task_settings)
        self.model_accepts_loss_kwargs = False
        self._items_of_step = 1.0
        self._told: list[tuple[torch.Tensor, list[int], list[float]]] = []

    @property
    def _loss_type(self) -> str:
        return str(self.run_args.loss_type[0])

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: Any) -> tuple[list[Batch], None]:
        """The micro-batches of a step; on the way their items are counted, over all workers."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        items = torch.tensor(sum(self._items(batch) for batch in batches), dtype=torch.float64)
        self._items_of_step = max(float(self._all_reduce(items.to(self._counts.device))), 1.0)
        return batches, None

    def compute_loss(
        self, model: Any, inputs: Batch, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The loss of a micro-batch, weighed so that every item of the step counts the same."""
        loss, items, counts, _ = self._loss_and_counts(model, inputs)
        self._counts += counts
        if self._loss_type != "online_contrastive":  # a sum, whatever the batch holds
            workers = 1 if self._sees_all else self.rank.world_size
            loss = loss * (items * self.current_gradient_accumulation_steps * workers / self._items_of_step)
        return (loss, None) if return_outputs else loss

    @property
    def _sees_all(self) -> bool:
        """Whether the rows of all workers are each other's negatives."""
        return self._loss_type == "infonce" and self.settings.infonce_use_batch and self.rank.world_size > 1

    def _items(self, batch: Batch) -> int:
        """What the loss is a mean over."""
        sizes = batch["sizes"].tolist()
        if self._loss_type == "pointwise_reranker":
            return int(sum(sizes))
        if self._loss_type == "listwise_reranker":
            return sum(size >= self.settings.listwise_reranker_min_group_size for size in sizes)
        return len(sizes)

    def _loss_and_counts(self, model: Any, batch: Batch) -> tuple[torch.Tensor, int, torch.Tensor, torch.Tensor]:
        """Loss, what it is a mean over (of all workers where all see all), counts of this worker, what was told."""
        sizes, targets, items = batch["sizes"].tolist(), batch["targets"], self._items(batch)
        told = self.teller(model, batch)
        used = told[: sum(sizes)]
        counts = dict.fromkeys(_COUNTS, 0.0)
        if self._sees_all:
            loss, everyones = self._loss_over_workers(used, sizes)
        else:
            loss, everyones = self._loss(used, targets, sizes) if items else used[:0].sum(), items
        loss = loss + told.sum() * 0  # every worker's pass counts for the collectives of its gradients
        tokens = int(batch["attention_mask"].sum()) if sizes else 0
        counts |= {"items": items, "tokens": tokens, "loss": float(loss.detach()) * items}
        if sizes:
            counts |= self._judged(used.detach(), targets, sizes)
        return loss, everyones, torch.tensor(list(counts.values()), dtype=torch.float64).to(self._counts), used.detach()

    def _loss(self, told: torch.Tensor, targets: torch.Tensor, sizes: Sequence[int]) -> torch.Tensor:
        args, settings = self.run_args, self.settings
        if args.task_type == "seq_cls":
            return task_loss.classification_loss(told, targets, args.problem_type)
        if args.task_type != "embedding":
            return task_loss.rank_loss(told, targets, self._loss_type, settings)

        def loss(vectors: torch.Tensor) -> torch.Tensor:
            if self._loss_type == "infonce":
                return task_loss.infonce_loss(vectors, sizes, settings)
            starts = torch.tensor([0, *torch.tensor(sizes).cumsum(0).tolist()[:-1]], device=vectors.device)
            pairs = torch.stack([starts, starts + 1], dim=1).flatten()  # anchor and positive
            return task_loss.pair_loss(vectors[pairs], targets, self._loss_type)

        return task_loss.with_matryoshka(loss, told, args.mrl_dims)

    def _loss_over_workers(self, told: torch.Tensor, sizes: list[int]) -> tuple[torch.Tensor, int]:
        """InfoNCE in which the rows of all workers are each other's negatives, and their number. Each worker's vectors
        get the gradient of the whole; averaged over the workers it would be a part."""
        found: list[Any] = [None] * self.rank.world_size
        torch.distributed.all_gather_object(found, (told.detach().cpu(), sizes))
        vectors = [told if rank == self.rank.rank else one.to(told.device) for rank, (one, _) in enumerate(found)]
        every = [size for _, one in found for size in one]
        if not every:
            return told[:0].sum(), 0
        empty = torch.zeros(0, device=told.device)
        loss = self._loss(torch.cat(vectors), empty, every)
        return loss.detach() + self.rank.world_size * (loss - loss.detach()), len(every)

    def _judged(self, told: torch.Tensor, targets: torch.Tensor, sizes: Sequence[int]) -> dict[str, float]:
        """What is right, and how far ahead the documents that fit are."""
        args = self.run_args
        if args.task_type == "embedding" or args.problem_type == "regression":
            return {}
        if args.task_type == "seq_cls":
            one_class = args.problem_type == "single_label_classification"
            good = told.argmax(-1) == targets if one_class else ((told > 0) == (targets > 0.5)).all(-1)
            return {"judged": len(told), "right": float(good.sum())}
        lists = task_loss.ranked_lists(told, targets)
        ranks = [1 + int((one[1:] > one[0]).sum()) for one in lists if len(one) > 1]
        listwise = self._loss_type == "listwise_reranker"
        right = [bool(one.argmax() == 0) for one in lists] if listwise else ((told > 0) == (targets > 0.5)).tolist()
        return {
            "judged": len(right),
            "right": float(sum(map(int, right))),
            "lists": len(ranks),
            "mrr": sum(1 / rank for rank in ranks),
            "ndcg": sum(1 / math.log2(rank + 1) for rank in ranks),
        }

    def train_metrics(self, counts: torch.Tensor, seconds: float, loss: float) -> dict[str, float]:
        """Loss, accuracy where there is one, and speed."""
        found = dict(zip(_COUNTS, counts.tolist(), strict=True))
        speed = {"tokens/s": found["tokens"] / seconds}
        if not found["items"]:
            return speed
        return {"loss": loss, **({"acc": found["right"] / found["judged"]} if found["judged"] else {}), **speed}

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """The metrics of the task over the validation rows of all workers."""
        self._told = []
        return super().evaluate(*args, **kwargs)

    def eval_counts(self, batch: Batch) -> torch.Tensor:
        """The counts of a validation batch."""
        with self.accelerator.autocast():
            _, _, counts, told = self._loss_and_counts(self.model_wrapped, batch)
        if self.run_args.task_type == "embedding":
            self._told.append((told.cpu(), batch["sizes"].tolist(), batch["targets"].tolist()))
        return counts

    def eval_means(self, counts: torch.Tensor) -> dict[str, float]:
        """Loss, and what SWIFT measures of the task."""
        found = dict(zip(_COUNTS, counts.tolist(), strict=True))
        means = {"loss": found["loss"] / found["items"] if found["items"] else math.nan}
        if self.run_args.task_type == "embedding":
            return means | self._vector_metrics()
        if found["judged"]:
            means["acc"] = found["right"] / found["judged"]
        if self.run_args.task_type != "seq_cls":
            means |= {name: found[name] / max(found["lists"], 1.0) for name in ("mrr", "ndcg")}
        return means

    def _vector_metrics(self) -> dict[str, float]:
        told: list[Any] = [self._told]
        if self.rank.world_size > 1:
            told = [None] * self.rank.world_size
            torch.distributed.all_gather_object(told, self._told)
        every = [one for part in told for one in part]
        vectors = torch.cat([one for one, _, _ in every])
        sizes = [size for _, part, _ in every for size in part]
        if self.run_args.measured == "infonce":
            return infonce_metrics(vectors, sizes, self.settings.infonce_use_batch)
        return paired_metrics(vectors, sizes, [like for _, _, part in every for like in part])

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        """The model; beside one that makes vectors, how they are made."""
        super()._save(output_dir, state_dict)
        if self.run_args.task_type == "embedding" and not isinstance(self.model, PeftModel):
            folder, model = Path(output_dir or str(self.args.output_dir)), cast("Any", self.model)
            write_sentence_transformers_files(folder, self.model_dir, model.config.get_text_config().hidden_size)

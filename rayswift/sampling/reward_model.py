"""Scores from a reward model: a pool of actors on the cluster, as the engines are."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rayswift import cluster, hub
from rayswift.data.tokens.encoder import Dropped, Encoder
from rayswift.errors import UserError, telling_line
from rayswift.modeling.loading import folder_fingerprint, read_config, resolve_dtype

if TYPE_CHECKING:
    from rayswift.arguments import SampleArguments
    from rayswift.sampling.tasks import Task

#: Answers that are scored together.
_BATCH = 16


@dataclass
class RewardModel:
    """A sequence classifier with one output, by folder or id (``rayswift rlhf --rlhf_type rm`` trains such)."""

    args: SampleArguments
    flag: str
    model: str
    needs_reference: bool = False

    def __post_init__(self) -> None:
        if os.path.isdir(self.model):
            self.check(self.model)

    def sources(self) -> dict[str, str]:
        """What tells the model in the folder from another's."""
        folder = os.path.expanduser(self.model)
        return {f"{self.flag} {self.model}": folder_fingerprint(folder)} if os.path.isdir(folder) else {}

    def check(self, model_dir: str) -> None:
        """UserError unless the folder holds a reward model."""
        kinds = read_config(model_dir).get("architectures") or ["unknown"]
        if not str(kinds[0]).endswith("ForSequenceClassification"):
            raise UserError(f"{self.flag} {self.model}: a {kinds[0]} gives no score, expected a model for sequence "
                            "classification; one that judges in words is --prm_model client")  # fmt: skip

    def score(self, tasks: Iterable[Task]) -> Iterator[tuple[int, list[float]]]:
        """Score the tasks on one actor for each GPU, or on one with CPUs."""
        import ray

        args = self.args
        model_dir = hub.resolve_model(self.model, use_hf=args.use_hf, token=args.hub_token)
        self.check(model_dir)
        connected = cluster.connect(args)
        use_gpu = bool(connected.gpus) if args.use_gpu is None else args.use_gpu
        items = [{"index": task.index, "requests": json.dumps(task.requests)} for task in tasks]
        if not items:
            return
        context = ray.data.DataContext.get_current()
        context.enable_progress_bars = False
        scored = ray.data.from_items(items, override_num_blocks=len(items) // _BATCH + 1).map_batches(
            RewardWorker,
            fn_constructor_args=(Encoder(model_dir, truncation_strategy="left", max_length=args.max_length), use_gpu),
            batch_size=1,
            compute=ray.data.ActorPoolStrategy(min_size=1, max_size=max(1, int(connected.gpus)) if use_gpu else 1),
            num_cpus=1,
            num_gpus=int(use_gpu),
        )
        try:
            for found in scored.iter_rows():
                yield int(found["index"]), json.loads(found["scores"])
        except ray.exceptions.RayError as error:
            raise UserError(
                f"{self.flag} {self.model}: scoring failed ({telling_line(str(error), type(error).__name__)})"
            ) from None


class RewardWorker:
    """One reward model in an actor of the pool."""

    def __init__(self, encoder: Encoder, use_gpu: bool) -> None:
        import torch
        from transformers import AutoModelForSequenceClassification

        self.encoder = encoder
        self.device = "cuda" if use_gpu else "cpu"
        if not use_gpu:
            torch.set_num_threads(cluster.cpu_count())
        dtype = resolve_dtype(None, encoder.model_dir, use_gpu, training=False)
        self.model = AutoModelForSequenceClassification.from_pretrained(encoder.model_dir, dtype=dtype)
        self.model.to(self.device).eval()
        self.model.config.pad_token_id = self.pad = encoder.tokenizer.pad_token_id or 0

    def __call__(self, batch: dict[str, Any]) -> dict[str, list[Any]]:
        scores = [json.dumps(self.scores(json.loads(requests))) for requests in batch["requests"]]
        return {"index": list(batch["index"]), "scores": scores}

    def scores(self, rows: list[dict[str, Any]]) -> list[float]:
        """The score of each conversation; one that cannot be encoded gets that of nothing good, the least."""
        import torch

        encoded = self.encoder.encode_batch(rows)
        found: dict[int, float] = {}
        usable = [sample for sample in encoded if not isinstance(sample, Dropped)]
        for first in range(0, len(usable), _BATCH):
            batch = usable[first : first + _BATCH]
            width = max(len(sample.input_ids) for sample in batch)
            ids = torch.full((len(batch), width), self.pad)
            mask = torch.zeros_like(ids)
            for place, sample in enumerate(batch):
                count = len(sample.input_ids)
                ids[place, :count] = torch.tensor(sample.input_ids.tolist())
                mask[place, :count] = 1
            with torch.inference_mode():
                logits = self.model(input_ids=ids.to(self.device), attention_mask=mask.to(self.device)).logits
            found.update(zip((sample.row for sample in batch), logits[:, 0].float().tolist(), strict=True))
        least = min(found.values(), default=0.0)
        return [found.get(row, least) for row in range(len(rows))]

"""TRL's DPOTrainer as RaySwift uses it: fed by the data path with encoded pairs, exact on any number of workers."""

from __future__ import annotations

from typing import Any

import torch
from datasets import Dataset
from trl import DPOTrainer

from rayswift.arguments.rlhf import PREFERENCE_METRICS
from rayswift.train.collate import Batch
from rayswift.train.trainers.step import StepTraining


class PreferenceTrainer(StepTraining, DPOTrainer):
    """DPO and the losses that TRL has beside it (``--loss_type``), over pairs of :class:`PairCollator`.

    Args:
        ref_model: the frozen model of full training; None for adapters.
        kwargs: those of :class:`StepTraining` and ``DPOTrainer``.
    """

    #: Pairs, all tokens, summed losses, the summed metrics.
    NUM_COUNTS = 3 + len(PREFERENCE_METRICS)
    REFERENCE_PASSES = 1

    def __init__(self, **kwargs: Any) -> None:
        # TRL looks at a dataset when it is built; what is trained comes from the loader.
        unused = Dataset.from_dict({"prompt_ids": [[0]], "chosen_ids": [[0]], "rejected_ids": [[0]]})
        super().__init__(train_dataset=unused, eval_dataset=unused, **kwargs)
        self._pairs_of_step = 1.0
        self.precompute_ref_logps = True  # TRL then reads from the batch what `_add_reference` puts there

    def _prepare_dataset(self, dataset: Dataset, *_args: Any) -> Dataset:
        """Nothing: rows come encoded."""
        return dataset

    def create_model_card(self, *_args: Any, **_kwargs: Any) -> None:
        """None: ``rayswift export --push_to_hub`` writes one that knows the data and the scores."""

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: Any) -> tuple[list[Batch], None]:
        """The micro-batches of a step; on the way their pairs are counted, over all workers."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        pairs = torch.tensor(sum(int(batch["num_pairs"]) for batch in batches), dtype=torch.float64)
        self._pairs_of_step = max(float(self._all_reduce(pairs.to(self._counts.device))), 1.0)
        return batches, None

    def compute_loss(
        self, model: Any, inputs: Batch, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The mean loss of the micro-batch's pairs, weighed so that every pair of the step counts the same: the
        Trainer takes the mean over micro-batches, the workers' gradients are averaged."""
        loss, pairs, counts = self._loss_and_counts(model, inputs)
        self._counts += counts
        share = pairs * self.current_gradient_accumulation_steps * self.rank.world_size / self._pairs_of_step
        return (loss * share, None) if return_outputs else loss * share

    def _loss_and_counts(self, model: Any, inputs: Batch) -> tuple[torch.Tensor, int, torch.Tensor]:
        pairs = int(inputs.pop("num_pairs"))
        tokens = int(inputs["attention_mask"].sum()) if pairs else 0
        gathering, self.accelerator = self.accelerator, _EachForItself(self.accelerator)
        try:
            self._add_reference(inputs)
            loss = super()._compute_loss(model, inputs, return_outputs=False)
        finally:
            self.accelerator = gathering
        metrics = self._metrics["train" if model.training else "eval"]
        sums = [pairs * value for value in (float(loss.detach()), *(metrics[name][-1] for name in PREFERENCE_METRICS))]
        metrics.clear()
        return loss, pairs, torch.tensor([pairs, tokens, *sums], dtype=torch.float64, device=self._counts.device)

    def _add_reference(self, inputs: Batch) -> None:
        """The reference's log-probabilities: as it answers, without what training does to the modules that policy and
        reference share (NEFTune's noise, dropout, a router's jitter). TRL computes them in training mode."""
        model: Any = self.model if self.ref_model is None else self.ref_model
        was_training = model.training
        model.eval()
        try:
            inputs["ref_chosen_logps"], inputs["ref_rejected_logps"] = self.compute_ref_log_probs(model, inputs)
        finally:
            model.train(was_training)

    def train_metrics(self, counts: torch.Tensor, seconds: float, loss: float) -> dict[str, float]:
        """Loss, rewards, log-probabilities and speed."""
        pairs, tokens, _, *sums = counts.tolist()
        if not pairs:
            return {"tokens/s": tokens / seconds}
        means = {name: value / pairs for name, value in zip(PREFERENCE_METRICS, sums, strict=True)}
        return {"loss": loss, **means, "tokens/s": tokens / seconds}

    def eval_counts(self, batch: Batch) -> torch.Tensor:
        """The counts of a validation batch."""
        with self.accelerator.autocast():
            return self._loss_and_counts(self.model_wrapped, batch)[2]

    def eval_means(self, counts: torch.Tensor) -> dict[str, float]:
        """Loss, rewards and log-probabilities per pair."""
        pairs, _, *sums = counts.tolist()
        return {name: value / max(pairs, 1.0) for name, value in zip(("loss", *PREFERENCE_METRICS), sums, strict=True)}


class _EachForItself:
    """Accelerate without gathering: TRL gathers a dozen metrics at every micro-batch, and every worker must then have
    the same number of pairs. Here they are summed, and added up over the workers once per row of the log."""

    def __init__(self, accelerator: Any) -> None:
        self._accelerator = accelerator

    def __getattr__(self, name: str) -> Any:
        return getattr(self._accelerator, name)

    def gather(self, values: torch.Tensor) -> torch.Tensor:
        """The values of this worker."""
        return values

    gather_for_metrics = gather

"""What is common to every stage: a Trainer fed by the data path, telling the driver, saving whole checkpoints."""

from __future__ import annotations

import math
import os
import resource
import shutil
import time
from collections.abc import Callable, Collection
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from accelerate.utils import DeepSpeedSchedulerWrapper
from peft import PeftModel, set_peft_model_state_dict
from transformers import TrainerCallback
from transformers.trainer import SCHEDULER_NAME
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from rayswift.data.tokens.table import TokenRows
from rayswift.modeling.part_of_base import read_plain, write_plain
from rayswift.train import adalora
from rayswift.train.checkpoints.zero import has_zero_state, load_zero_state, save_zero_state
from rayswift.train.clock import Clock
from rayswift.train.collate import Batch, Collate
from rayswift.train.flops import flop_count
from rayswift.train.loader import Rank, eval_batches
from rayswift.train.stopping import Wish
from rayswift.train.trainers.checked_steps import CheckedSteps
from rayswift.train.trainers.going_on import GoingOn
from rayswift.train.trainers.spikes import Spikes

if TYPE_CHECKING:
    from rayswift.train.schedule import StepSchedule

Push = Callable[[dict[str, Any]], None]


def peak_memory() -> float:
    """The most GiB that this worker has taken: of its accelerator, or without one of its process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_reserved() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


class StepTraining(GoingOn, CheckedSteps):
    """What RaySwift changes about any trainer of Transformers or TRL: it trains from a loader that knows its own
    position, reports every step, and saves whole checkpoints.

    To be put before the class of a special trainer. A subclass sums what it counts into ``_counts``, and says what
    that means.

    Args:
        loader: iterable of micro-batches from the step to resume at.
        kept: steps of the run's checkpoints; a best step that is not among them is forgotten.
        schedule: the run's steps.
        val_rows: validation rows, or None.
        rank: this worker's share.
        push: sends an event to the driver.
        save: called on every worker with what writes a checkpoint's files; makes it whole, perhaps while training goes
            on, False where it could not.
        settle: waits until a checkpoint that is being written is whole, or tells `not_saved`.
        wish: what the workers do after a step beside training on, which all of them agree about.
        collate: validation rows to a batch.
        on_nan: what happens at a step whose loss or gradients are no numbers, ``stop`` or ``skip``.
        clock: where its time goes.
        own_optimizer: Transformers' factory of an optimiser and its keywords; None for that of ``args``.
    """

    #: How many numbers ``_counts`` holds.
    NUM_COUNTS: ClassVar[int]
    #: Forward passes of a reference beside the model's.
    REFERENCE_PASSES: ClassVar[int] = 0

    def __init__(
        self,
        *args: Any,
        loader: Any,
        kept: Collection[int] = (),
        schedule: StepSchedule,
        val_rows: TokenRows | None,
        rank: Rank,
        push: Push,
        save: Callable[[Any, Callable[[], None]], bool],
        settle: Callable[[Any], None] = lambda trainer: None,
        wish: Callable[[], Wish],
        collate: Collate,
        on_nan: str = "stop",
        clock: Clock | None = None,
        own_optimizer: tuple[Any, dict[str, Any]] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        if own_optimizer is not None:
            self.optimizer_cls_and_kwargs = own_optimizer
        self.loader, self.schedule, self.val_rows, self.rank = loader, schedule, val_rows, rank
        self.kept = kept
        self.push, self.save, self.settle, self.wish, self.collate = push, save, settle, wish, collate
        self.last_saved_step = self._last_tried_step = -1
        self._best_saved: tuple[int | None, float | None] = (None, None)
        self._best_before: tuple[int | None, float | None] = (None, None)
        # On the device, so that counting never waits for it.
        self._counts = torch.zeros(self.NUM_COUNTS, dtype=torch.float64, device=self.args.device)
        self._logged_at = time.monotonic()
        self.evaluations: Any = None  # those beside training, of the first worker
        self.stopped = False  # somebody asked for it
        self.on_nan, self.clock, self._spikes = on_nan, clock or Clock(), Spikes()
        self._flops, self._work = flop_count(self.model, self.REFERENCE_PASSES), torch.zeros(3, dtype=torch.float64)
        self._busy, self._steps_logged = 0.0, 0
        self._waited = 0.0  # for rows, until the last row of the log
        self.remove_callback(PrinterCallback)
        self.remove_callback(ProgressCallback)
        self.add_callback(_StepEvents(self))
        if self._is_adalora:
            self.add_callback(adalora.Ranks(self))

    @property
    def _is_adalora(self) -> bool:
        config: Any = getattr(self.model, "peft_config", {}).get("default")
        return config is not None and config.peft_type == "ADALORA"

    # --- data: RaySwift's loaders are already sharded, so Accelerate must not shard them again ---

    def get_train_dataloader(self) -> Any:
        """The loader itself."""
        return self.loader

    def _prepare_input(self, data: Any) -> Any:
        """A batch to the device, from memory that the device reads by itself: the host goes on meanwhile."""
        if isinstance(data, torch.Tensor) and data.device.type == "cpu" != self.args.device.type:
            data = data.pin_memory().to(self.args.device, non_blocking=True)
        return super()._prepare_input(data)

    def _prepare_inputs(self, inputs: Any) -> Any:
        """With the lengths of joined rows, which the host knows."""
        prepared: Any = super()._prepare_inputs(inputs)
        if (bounds := inputs.get("cu_seq_lens_q")) is not None:
            prepared["cu_seq_lens_q"].row_lengths = bounds.diff().tolist()
        return prepared

    # --- metrics ---

    def floating_point_ops(self, inputs: Batch) -> int:
        """What a micro-batch costs, and on the way what there is in it."""
        all_tokens, trained, flops = self._flops.of_batch(inputs)
        self._work += torch.tensor([all_tokens, trained, flops], dtype=torch.float64)
        return int(flops)

    def train_metrics(self, counts: torch.Tensor, seconds: float, loss: float) -> dict[str, float]:
        """What a row of the log says, ``loss`` among it where anything was trained; ``counts`` are those of all workers
        since the last row, ``loss`` the mean over their steps."""
        raise NotImplementedError

    def eval_counts(self, batch: Batch) -> torch.Tensor:
        """What one validation batch adds to the counts of an evaluation, float64."""
        raise NotImplementedError

    def eval_means(self, counts: torch.Tensor) -> dict[str, float]:
        """What an evaluation says, ``loss`` among it; ``counts`` are those of all workers."""
        raise NotImplementedError

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Complete a row with the metrics of all workers and send it to the driver. Its memory is the peak of this
        worker's accelerator, or without one of its process."""
        event: dict[str, Any] = {"event": "log"}
        if "loss" in logs:
            steps = self.state.global_step - self._steps_logged
            if steps > self._skipped:
                logs["loss"] *= steps / (steps - self._skipped)
            self._steps_logged, self._skipped = self.state.global_step, 0
            if not math.isfinite(logs.get("grad_norm", 0.0)):  # of float16, whose scaler left the step out
                del logs["grad_norm"]
            counts = self._all_reduce(self._counts)
            event["work"] = self._work_done()
            now = time.monotonic()
            seconds = max(now - self._logged_at, 1e-9)
            logs.update(self.train_metrics(counts, seconds, logs.pop("loss")))
            waited = self.clock.read()["data"]
            event["data_wait"], self._waited = (waited - self._waited) / seconds, waited
            if self.args.include_num_input_tokens_seen != "no":
                logs["num_input_tokens_seen"] = self.state.num_input_tokens_seen
            self._counts.zero_()
            self._logged_at = now
        logs["epoch"] = self.schedule.epoch_of(self.state.global_step)
        row = {**logs, "global_step": self.state.global_step, "memory(GiB)": peak_memory()}
        self.state.log_history.append(row)
        if self.is_world_process_zero():
            self.push({**event, "row": row, "seconds": self.clock.read()})

    def _work_done(self) -> dict[str, float]:
        """Tokens, trained tokens and floating-point operations of all workers since the last row of the log, and the
        seconds that they took: of steps, and of waiting for their rows."""
        tokens, trained, flops = self._all_reduce(self._work.to(self._counts.device)).tolist()
        self._work.zero_()
        seconds = self.clock.read()
        before, self._busy = self._busy, seconds["step"] + seconds["data"]
        return {"tokens": tokens, "trained": trained, "flops": flops, "seconds": self._busy - before}

    def _all_reduce(self, values: torch.Tensor) -> torch.Tensor:
        total = values.clone()
        if self.rank.world_size > 1:
            torch.distributed.all_reduce(total)
        return total.cpu()

    # --- evaluation ---

    @torch.no_grad()
    def evaluate(self, *_args: Any, metric_key_prefix: str = "eval", **_kwargs: Any) -> dict[str, float]:
        """The means over the validation rows of all workers."""
        if self.val_rows is None:
            return {}
        started, model = time.monotonic(), self.model_wrapped
        was_training = model.training
        model.eval()
        counts = []
        with self.clock.within("evaluation"):
            for batch in eval_batches(self.val_rows, self.args.per_device_eval_batch_size, self.rank, self.collate):
                counts.append(self.eval_counts(self._prepare_inputs(batch)))
                self.clock.tick()
        model.train(was_training)
        seconds = time.monotonic() - started
        named = self.eval_means(self._all_reduce(torch.stack(counts).sum(0))) | {
            "runtime": seconds,
            "samples_per_second": len(self.val_rows) / seconds,
            "steps_per_second": len(counts) / seconds,
        }
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in named.items()}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        self._logged_at += time.monotonic() - started
        return metrics

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        """Whether a step is the best so far: one that is saved as well, for what is not kept is the best of nothing."""
        if not self.control.should_save and self.args.save_strategy != "best":
            return False
        self.settle(self)
        return bool(super()._determine_best_metric(metrics, trial))

    def take_scores(self, wait: bool = False) -> None:
        """First worker: log what evaluations beside training have found since the last time, and follow it. ``wait``:
        for all of them."""
        if self.evaluations is None:
            return
        for step, scores in self.evaluations.finished(wait, self.clock.tick):
            if isinstance(scores, str):
                self.push({"event": "note", "line": f"checkpoint-{step} was not evaluated ({scores})"})
                continue
            row = {**scores, "epoch": self.schedule.epoch_of(step), "global_step": step}
            self.state.log_history.append(row)
            self.push({"event": "log", "row": row, "seconds": self.clock.read()})
            self._rank_checkpoint(step, scores)
            self.evaluations.note(step, scores, self.state)

    def _rank_checkpoint(self, step: int, scores: dict[str, float]) -> None:
        """Whether a checkpoint is the best so far."""
        metric, best = str(self.args.metric_for_best_model).removeprefix("eval_"), self.state.best_metric
        value = scores[f"eval_{metric}"]
        if best is None or (value > best if self.args.greater_is_better else value < best):
            self.state.best_global_step, self.state.best_metric = step, value
            self.state.best_model_checkpoint = os.path.join(str(self.args.output_dir), f"checkpoint-{step}")

    # --- checkpoints ---

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Let Transformers write the files, then make the checkpoint whole."""
        if self.state.best_global_step:
            best = f"checkpoint-{self.state.best_global_step}"
            self.state.best_model_checkpoint = os.path.join(str(self.args.output_dir), best)
        self._last_tried_step = self.state.global_step
        write = super()._save_checkpoint
        if self.rank.rank == 0:  # it may be whole only later
            self.push({"event": "save", "step": self.state.global_step, "seconds": self.clock.read()})
        with self.clock.within("checkpoint"):
            saved = self.save(self, lambda: write(model, trial))
        if saved:
            self.last_saved_step = self.state.global_step
            self._best_before = self._best_saved
            self._best_saved = (self.state.best_global_step, self.state.best_metric)
            if self.evaluations is not None:
                self.evaluations.ask(self.state.global_step)
        else:
            self._no_best(self.state.global_step)

    def not_saved(self, step: int) -> None:
        """A checkpoint that was being written had no room."""
        self._best_saved = self._best_before
        self._no_best(step)

    def _no_best(self, step: int) -> None:
        """A step that nobody can have is not the best."""
        if self.state.best_global_step == step:
            self.state.best_global_step, self.state.best_metric = self._best_saved
            self.state.best_model_checkpoint = None

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        """The trained adapter alone, as one that fits the model; of a full model Transformers' way."""
        super()._save(output_dir, state_dict)
        if isinstance(self.model, PeftModel):
            folder = output_dir or str(self.args.output_dir)
            shutil.rmtree(os.path.join(folder, "ref"), ignore_errors=True)  # TRL's copy of the run's first policy
            base: Any = self.model.get_base_model()
            if (generation := getattr(base, "generation_config", None)) is not None:  # a model of numbers has none
                generation.save_pretrained(folder)
            if first := getattr(self.model, "first_values", None):
                write_plain(folder, first)
            if self._is_adalora:
                adalora.save_state(self.model, folder)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """The trained adapter; beside folders of others Transformers would pass it over."""
        if not isinstance(self.model, PeftModel) or self.is_fsdp_enabled:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        elif getattr(self.model, "first_values", None):
            config: Any = self.model.peft_config["default"]
            set_peft_model_state_dict(self.model, read_plain(resume_from_checkpoint, config.r)[0])
        elif self._is_adalora:
            adalora.load_state(self.model, resume_from_checkpoint)
        else:
            self.model.load_adapter(resume_from_checkpoint, "default", is_trainable=True)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        """Of ZeRO's state every worker its part, in files that any number of workers goes on from."""
        own = self.is_deepspeed_enabled and save_zero_state(
            self.model_wrapped, output_dir, self.rank.rank, self.rank.world_size
        )
        if not own:
            super()._save_optimizer_and_scheduler(output_dir)
        elif self.args.should_save:
            assert self.lr_scheduler is not None
            torch.save(self.lr_scheduler.state_dict(), os.path.join(output_dir, SCHEDULER_NAME))

    def _prepare_for_training(self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: str | None) -> Any:
        """Transformers' own, which knows DeepSpeed's shards only."""
        if not self.is_deepspeed_enabled or not resume_from_checkpoint or not has_zero_state(resume_from_checkpoint):
            return super()._prepare_for_training(max_steps, train_dataloader, resume_from_checkpoint)
        prepared = super()._prepare_for_training(max_steps, train_dataloader, None)
        load_zero_state(self.model_wrapped, resume_from_checkpoint)
        if isinstance(self.lr_scheduler, DeepSpeedSchedulerWrapper):  # of a --deepspeed file, DeepSpeed's to load
            scheduler = torch.load(os.path.join(resume_from_checkpoint, SCHEDULER_NAME), weights_only=True)
            self.lr_scheduler.load_state_dict(scheduler)
        self._load_optimizer_and_scheduler(resume_from_checkpoint)
        return prepared

    def save_final(self) -> None:
        """The last step is always evaluated and saved (SWIFT), also when a stream ended early."""
        if self.args.save_strategy != "no" and self._last_tried_step != self.state.global_step > 0:
            self._save_checkpoint(self.model_wrapped, None)
        self.settle(self)

    def load_checkpoint(self, folder: str) -> None:
        """Take the weights of a checkpoint of this run, as ``--load_best_model_at_end`` asks for."""
        if self.is_deepspeed_enabled and self.args.save_only_model:  # its engine loads nothing without optimiser state
            return
        self.state.best_model_checkpoint = folder
        if self.is_deepspeed_enabled and has_zero_state(folder):
            load_zero_state(self.model_wrapped, folder)
        else:
            self._load_best_model()
        if self.is_world_process_zero():
            self.push({"event": "drops", "lines": [f"{os.path.basename(folder)} is the best: its weights are loaded"]})


class _StepEvents(TrainerCallback):
    """One event per optimiser step, SWIFT's rule that the last step is evaluated and saved, and an end before it."""

    def __init__(self, trainer: StepTraining) -> None:
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """A state that came with a checkpoint: intervals are those given now, and its best may be elsewhere."""
        state.compute_steps(args, state.max_steps)
        if state.best_global_step not in self.trainer.kept:
            state.best_global_step = state.best_metric = state.best_model_checkpoint = None
        self.trainer._best_saved = (state.best_global_step, state.best_metric)
        self.trainer._steps_logged = state.global_step
        if self.trainer.evaluations is not None:
            for step, scores in self.trainer.evaluations.scored():
                self.trainer._rank_checkpoint(step, scores)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> Any:
        """After each optimiser step."""
        if state.is_world_process_zero:
            self.trainer.push({"event": "step", "step": state.global_step, "seconds": self.trainer.clock.read()})
        self.trainer.take_scores()
        if state.global_step >= state.max_steps:
            control.should_log = True
            control.should_evaluate = control.should_evaluate or args.eval_strategy != "no"
            control.should_save = control.should_save or args.save_strategy != "no"
        elif (wish := self.trainer.wish()) is Wish.KEEP:
            self.trainer.keeps_step = True
        elif wish:
            control.should_save = control.should_save or args.save_strategy != "no"
            if wish is Wish.STOP:
                control.should_training_stop, control.should_evaluate = True, False
                self.trainer.stopped = True
        return control

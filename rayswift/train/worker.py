"""What each Ray Train worker runs: model, data share, Trainer, checkpoints. Reads top to bottom."""

from __future__ import annotations

import copy
import functools
import logging
import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from pyarrow.fs import LocalFileSystem

from rayswift import private
from rayswift.data.tokens.row_index import LazyRows
from rayswift.data.tokens.table import LazyItems, StreamPlaces, StreamPosition, TokenRows, TrainItems
from rayswift.errors import RunFailedError, UserError, one_line
from rayswift.train.checkpoints.last_step import LastStep
from rayswift.train.checkpoints.reshard import check_zero_resume
from rayswift.train.checkpoints.store import CheckpointStore
from rayswift.train.clock import Clock
from rayswift.train.collate import Collate, Collator, PairCollator, TaskCollator
from rayswift.train.config import WorkerConfig
from rayswift.train.deepspeed import deepspeed_config, zero_stage
from rayswift.train.evaluation import Evaluations
from rayswift.train.failures import LIMIT, at_step
from rayswift.train.loader import EpochLoader, Rank, StreamLoader
from rayswift.train.stopping import Notices, Wish
from rayswift.train.watch import watch

if TYPE_CHECKING:
    import pyarrow as pa

    from rayswift.data.tokens.encoder import Encoder
    from rayswift.train.trainers.step import StepTraining

logger = logging.getLogger("rayswift.train")

#: The share of a worker's memory that estimates may fill.
ROOM = 0.8


def train_loop(loop_config: dict[str, Any]) -> dict[str, Any]:
    """The ``train_loop_per_worker`` of Ray Train; every rank returns the run's outcome."""
    import ray.train

    config: WorkerConfig = loop_config["config"]
    context = ray.train.get_context()
    rank, clock = Rank(context.get_world_rank(), context.get_world_size()), Clock()
    prepare_process(config, rank, context.get_local_world_size())
    local_world_size = context.get_local_world_size()
    store = CheckpointStore(config, rank, context.get_local_rank(), local_world_size)
    last_step = LastStep(store)
    resume, start_step, is_first = store.resume_from(last_step.step())
    weights_only = resume if is_first and config.args.begins_anew else None
    position, streams = store.position(None if weights_only else resume), config.data.stream
    places: StreamPlaces = () if streams is None else streams.start()  # also after --ignore_data_skip
    if position is not None and position.stream is not None and position.data == config.data.fingerprint:
        places = tuple(StreamPosition(*place) for place in position.stream)
    wish = Notices(config.events, rank, last_step.is_due, config.args.ddp_timeout).wish
    try:
        left_out = config.args.left_out if is_first else frozenset()
        if resume and "optimizer" not in left_out:  # of an attempt of this run, on another number of workers
            stage = zero_stage(deepspeed_config(config.args.deepspeed))
            check_zero_resume(LocalFileSystem(), resume, stage, rank.world_size)
        trainer = build_trainer(config, rank, local_world_size, store, resume, start_step, places, clock, wish)
    except Exception as error:
        # What fails before the first step fails again: restarting the group would only cost minutes.
        logger.exception("the trainer could not be built")
        return {"user_error" if isinstance(error, UserError) else "error": one_line(error, LIMIT)}
    trainer.left_out, trainer.keep = left_out, last_step.keep
    if config.spare and rank.rank == 0:
        trainer.evaluations = Evaluations(config, store, Evaluator)
    if config.args.step_timeout:
        watch(clock, rank, config.args.step_timeout, functools.partial(config.events.tell, "push"))
    try:
        with private.no_pickled_code():  # a checkpoint may be a stranger's
            if weights_only:
                trainer._load_from_checkpoint(weights_only)
                resume = None
            if rank.rank == 0:
                history, seconds = store.history(resume), clock.read()
                event = {"event": "resume", "step": start_step, "history": history, "seconds": seconds}
                config.events.tell("push", event)
            trainer.train(resume_from_checkpoint=resume)
        trainer.save_final()
    except (UserError, RunFailedError):
        raise
    except Exception as error:
        step = max(trainer.state.global_step, start_step)
        raise at_step(error, step, has_begun=step > start_step) from error
    _tell_end(config, rank, clock)
    state = trainer.state
    if config.spare:
        _await_scores(trainer, rank)
    if config.args.load_best_model_at_end and state.best_global_step:
        trainer.load_checkpoint(store.fetch(f"{config.run_uri}/checkpoint-{state.best_global_step}"))
    store.close()
    return {
        "global_step": state.global_step,
        "best_metric": state.best_metric,
        "best_step": state.best_global_step,
        "last_step": trainer.last_saved_step if trainer.last_saved_step > 0 else None,
    }


def _tell_end(config: WorkerConfig, rank: Rank, clock: Clock) -> None:
    """What the summary says of the workers."""
    import torch

    from rayswift.train.trainers.step import peak_memory

    clock.enter("start")  # nothing is watched any more
    memory: list[Any] = [peak_memory()] * rank.world_size
    if rank.world_size > 1:
        torch.distributed.all_gather_object(memory, memory[0])
    if rank.rank == 0:
        config.events.tell("push", {"event": "end", "memory": memory, "seconds": clock.read()})


def _await_scores(trainer: StepTraining, rank: Rank) -> None:
    """Have the best checkpoint known to every worker, when all are evaluated; who asks for the end does not wait."""
    import torch

    state = trainer.state
    if trainer.evaluations is not None:
        trainer.take_scores(wait=not trainer.stopped)
        trainer.evaluations.close()
    best: list[Any] = [state.best_global_step, state.best_metric]
    if rank.world_size > 1:
        torch.distributed.broadcast_object_list(best, src=0)
    state.best_global_step, state.best_metric = best


def prepare_process(config: WorkerConfig, rank: Rank, local_world_size: int) -> None:
    """Threads, DeepSpeed and seeds, before any model is loaded."""
    import torch
    from transformers import set_seed
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    if not config.use_gpu:
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // local_world_size))
    if config.args.deepspeed:
        from rayswift.train.deepspeed import prepare_deepspeed

        prepare_deepspeed(config.use_gpu, local_world_size)
    elif rank.world_size == 1 and (not config.use_gpu or torch.cuda.device_count() <= 1):
        # Accelerate reads it, and would wrap the model for a group of one. (Of several GPUs without it, the Trainer
        # would make replicas.)
        os.environ.pop("LOCAL_RANK", None)
    set_seed(config.args.seed)


def _needs_checkpointing(config: WorkerConfig, model_dir: str, world_size: int, local_world_size: int) -> bool:
    """Whether a worker's share of the memory could be too little to keep what a forward pass computes."""
    from rayswift.modeling.loading import read_config
    from rayswift.plan.memory import activation_bytes, free_bytes, memory_need

    if config.use_gpu:
        import torch

        free: float | None = torch.cuda.mem_get_info()[0]
    else:
        machine = free_bytes()
        free = None if machine is None else machine / local_world_size
    if free is None or config.largest_pass is None:
        return True
    need = memory_need(config.args, model_dir, config.dtype, world_size, config.use_gpu)
    without_head = zero_stage(deepspeed_config(config.args.deepspeed)) == 3  # see SftTrainer.loss_head
    kept = activation_bytes(read_config(model_dir), config.largest_pass, config.dtype, all_logits=without_head)
    return need.device + kept > ROOM * free


def build_trainer(
    config: WorkerConfig,
    rank: Rank,
    local_world_size: int,
    store: CheckpointStore,
    resume: str | None,
    start_step: int,
    places: StreamPlaces,
    clock: Clock,
    wish: Callable[[], Wish],
) -> StepTraining:
    import torch

    from rayswift.data.tokens.carried_template import carry_ends, carry_template
    from rayswift.hub import resolve_model
    from rayswift.modeling.adapters import linear_suffixes, parameter_info
    from rayswift.modeling.loading import load_tokenizer
    from rayswift.modeling.task_models import is_classifier, use_own_pad
    from rayswift.train.hf_arguments import hf_training_arguments
    from rayswift.train.model import build_model, check_savable, reference_model, remarks
    from rayswift.train.optimizers import trainer_settings

    args, data, schedule = config.args, config.data, config.schedule
    # What the driver found may be on its machine only.
    model_dir = resolve_model(config.model, revision=args.model_revision, use_hf=args.use_hf, token=args.hub_token)
    checkpointing = args.gradient_checkpointing
    if checkpointing is None:
        checkpointing = _needs_checkpointing(config, model_dir, rank.world_size, local_world_size)
    # DeepSpeed's ZeRO-3 shards the model while it loads, and learns of it from these arguments: they come first.
    hf_arguments = hf_training_arguments(
        args, schedule, rank.world_size, store.local_dir, config.dtype, config.use_gpu,
        data.val is not None and not config.spare,
        checkpointing,
    )  # fmt: skip
    encoder = replace(data.encoder, model_dir=model_dir)
    tokenizer = load_tokenizer(model_dir, trust_remote_code=args.trust_remote_code)
    tokenizer.add_tokens(args.new_special_tokens, special_tokens=True)
    if is_classifier(args.task_type):
        use_own_pad(tokenizer)
    model = build_model(args, model_dir, config.dtype, config.packing, resume, checkpointing, schedule.max_steps)
    carried = carry_template(encoder, tokenizer)
    if (generation_config := getattr(model, "generation_config", None)) is not None:
        carry_ends(encoder, generation_config)
    if args.save_strategy != "no":
        check_savable(model, model_dir)
        store.check_room(model)
    pad_token_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id or 0

    push = functools.partial(config.events.tell, "push")

    if rank.rank == 0:
        kept = "computed twice" if checkpointing else "kept"
        device = torch.cuda.get_device_name() if torch.cuda.is_available() else None
        push({"event": "start", "parameter_info": parameter_info(model), "activations": kept, "device": device,
              "workers": rank.world_size})  # fmt: skip
        lines = remarks(model, args)
        if not carried:
            lines.append(f"--template {encoder.template_name} cannot be written as a chat template: the checkpoints' "
                         "tokenizer keeps what it has, and other programs need the template's own prompts")  # fmt: skip
        if lines:
            push({"event": "drops", "lines": lines})
    if args.use_galore and not args.galore_target_modules:
        hf_arguments.optim_target_modules = sorted(linear_suffixes(model))
    collate: Collate = PairCollator(pad_token_id) if encoder.preference else Collator(pad_token_id)
    if args.task_type != "causal_lm":
        collate = TaskCollator(pad_token_id, args.task_type, encoder.problem, args.num_labels or 1, config.task)
    train_collate = Collator(pad_token_id, flat=True) if config.packing else collate
    val_rows = TokenRows(data.val) if data.val is not None else None
    settings: dict[str, Any] = {
        "model": model,
        "args": hf_arguments,
        "processing_class": tokenizer,
        "loader": _loader(config, encoder, rank, train_collate, start_step, places),
        "schedule": schedule,
        "val_rows": val_rows,
        "rank": rank,
        "push": push,
        "kept": store.kept_steps(),
        "save": store.save,
        "settle": store.settle,
        "wish": wish,
        "collate": collate,
        "on_nan": args.on_nan,
        "clock": clock,
        **trainer_settings(args),
    }
    if encoder.preference:
        from rayswift.train.trainers.dpo import PreferenceTrainer

        reference = reference_model(args, model_dir, config.dtype)
        trainer: StepTraining = PreferenceTrainer(ref_model=reference, **settings)
    elif args.task_type != "causal_lm":
        from rayswift.train.trainers.task import TaskTrainer

        trainer = TaskTrainer(
            run_args=args, model_dir=model_dir, task_settings=config.task, eval_dataset=val_rows, **settings
        )
    else:
        from rayswift.train.trainers.sft import SftTrainer

        trainer = SftTrainer(eval_dataset=val_rows, router_aux_loss_coef=args.router_aux_loss_coef, **settings)
    if args.torch_compile:
        from rayswift.train.compiled import compile_layers

        compile_layers(model, args.torch_compile_backend, args.torch_compile_mode, config.packing)
    if args.early_stop_interval and val_rows is not None:
        from transformers import EarlyStoppingCallback

        trainer.add_callback(EarlyStoppingCallback(args.early_stop_interval))
    return trainer


def _loader(
    config: WorkerConfig, encoder: Encoder, rank: Rank, collate: Collate, start_step: int, places: StreamPlaces
) -> EpochLoader | StreamLoader:
    args, data, schedule = config.args, config.data, config.schedule
    if data.train is not None:

        def report(line: str) -> None:
            config.events.tell("push", {"event": "drops", "lines": [line]})

        rows = data.train
        items = LazyItems(rows, encoder, report) if isinstance(rows, LazyRows) else TrainItems(rows, data.packs)
        sampling = args.training_args.get("train_sampling_strategy")
        shuffle, bucket = args.train_dataloader_shuffle and sampling != "sequential", sampling == "group_by_length"
        return EpochLoader(items, schedule, rank, collate, start_step, args.data_seed, shuffle, bucket)
    from ray.train.collective import broadcast_from_rank_zero

    from rayswift.data.flow.stream import read_stream, start_stream_readers

    assert data.stream is not None
    readers = None
    if rank.rank == 0:
        readers = start_stream_readers(data.stream, encoder, config.events, places, rank.world_size)
    shared = broadcast_from_rank_zero(readers)
    order = data.stream.order(start_step * schedule.global_batch_size)

    def tables() -> list[Iterator[pa.Table]]:
        return [read_stream(reader, rank.rank) for reader in shared]

    return StreamLoader(tables, places, order, schedule, rank, collate, start_step)


class _Nobody:
    """An event queue that nobody reads."""

    def tell(self, *_: Any) -> None:
        """Nothing."""


class Evaluator:
    """What evaluates checkpoints beside training; an actor (see :mod:`rayswift.train.evaluation`)."""

    def __init__(self, config: WorkerConfig) -> None:
        args, data = copy.copy(config.args), config.data
        args.deepspeed, args.gradient_checkpointing, args.save_strategy = None, False, "no"
        # Training rows are none of its business, a stream's readers least of all.
        only_val = replace(data, train=data.val, packs=None, stream=None)
        self._config = replace(config, args=args, data=only_val, events=_Nobody(), spare=None)
        self._cpus = (config.spare or {}).get("CPU", 1.0)
        self._trainer: Any = None

    def ready(self) -> None:
        """Return when it is there."""

    def evaluate(self, checkpoint: str) -> dict[str, float]:
        """The scores of a checkpoint, by their names in the log."""
        import torch

        rank = Rank(0, 1)
        store = CheckpointStore(self._config, rank, 0, 1)
        folder = store.fetch(checkpoint)
        if self._trainer is None:
            prepare_process(self._config, rank, 1)
            if not self._config.use_gpu:  # the other cores are the workers'
                torch.set_num_threads(max(1, int(self._cpus)))
            self._trainer = build_trainer(self._config, rank, 1, store, folder, 0, (), Clock(), lambda: Wish.NOTHING)
        self._trainer._load_from_checkpoint(folder)
        metrics: dict[str, float] = self._trainer.evaluate()
        return {name: value for name, value in metrics.items() if name.startswith("eval_")}

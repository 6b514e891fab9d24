"""What each Ray Train worker runs: model, data share, Trainer, checkpoints. Reads top to bottom."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from rayswift.data.tokens.packing import Packs
from rayswift.data.tokens.row_index import LazyRows, RowIndex
from rayswift.data.tokens.table import LazyItems, StreamPlaces, StreamPosition, TokenRows, TrainItems
from rayswift.errors import UserError
from rayswift.train.checkpoints.store import CheckpointStore
from rayswift.train.loader import Collate, Collator, EpochLoader, PairCollator, Rank, StreamLoader
from rayswift.train.schedule import StepPlan

if TYPE_CHECKING:
    import pyarrow as pa

    from rayswift.data.flow.plan import StreamMix
    from rayswift.data.tokens.encoder import Encoder
    from rayswift.train.checkpoints.manifest import Position
    from rayswift.train.trainers.sft import StepTraining

logger = logging.getLogger("rayswift.train")


@dataclass(frozen=True)
class WorkerConfig:
    """Everything a worker needs; the same on every rank and every attempt.

    Args:
        args: the command's arguments.
        plan: the run's steps.
        model_dir: the model's local folder, or its hub id when nodes fetch it themselves.
        dtype: ``bfloat16``, ``float16`` or ``float32``.
        use_gpu: whether workers have accelerators.
        run_uri: the run directory, a local path or a URI.
        train: token rows, or standard ones to encode on the way; None for a stream.
        packs: how rows are packed; None without packing, or for a stream.
        stream: the plans of streams; None for token rows.
        encoder: turns a stream's rows into token ids.
        data_fingerprint: tells one data order from another; kept in checkpoints.
        val: validation token rows, or None.
        resume: the checkpoint to start from, or None.
        events: the driver's event queue.
    """

    args: Any
    plan: StepPlan
    model: str
    dtype: str
    use_gpu: bool
    run_uri: str
    train: RowIndex | None
    packs: Packs | None
    stream: StreamMix | None
    encoder: Encoder
    data_fingerprint: str
    val: RowIndex | None
    resume: str | None
    events: Any


def train_loop(loop_config: dict[str, Any]) -> dict[str, Any]:
    """The ``train_loop_per_worker`` of Ray Train; every rank returns the run's outcome."""
    import ray.train

    from rayswift.errors import one_line

    config: WorkerConfig = loop_config["config"]
    context = ray.train.get_context()
    rank = Rank(context.get_world_rank(), context.get_world_size())
    _prepare_process(config, context.get_local_world_size())
    store = CheckpointStore(config, rank, context.get_local_rank(), context.get_local_world_size())
    resume, start_step = store.resume_from()
    position = store.position(resume)
    start = _stream_places(config, position)
    try:
        trainer = _build_trainer(config, rank, store, start_step, start)
    except Exception as error:
        # What fails before the first step fails again: restarting the group would only cost minutes.
        logger.exception("the trainer could not be built")
        return {"user_error" if isinstance(error, UserError) else "error": one_line(error)}
    if rank.rank == 0:
        config.events.push.remote({"event": "resume", "step": start_step, "history": store.history(resume)})
    trainer.train(resume_from_checkpoint=resume)
    trainer.save_final()
    store.close()
    state = trainer.state
    return {
        "global_step": state.global_step,
        "best_metric": state.best_metric,
        "best_step": state.best_global_step,
        "last_step": trainer.last_saved_step if trainer.last_saved_step > 0 else None,
    }


def _stream_places(config: WorkerConfig, position: Position | None) -> StreamPlaces:
    """Where the streams begin: at the checkpoint's places, else (also after ``--ignore_data_skip``) at their start."""
    if config.stream is None:
        return ()
    if position is None or position.stream is None or position.data != config.data_fingerprint:
        return config.stream.start()
    return tuple(StreamPosition(*place) for place in position.stream)


def _prepare_process(config: WorkerConfig, local_world_size: int) -> None:
    """Threads, DeepSpeed and seeds, before any model is loaded."""
    import torch
    from transformers import set_seed
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    if not config.use_gpu:
        cpus = len(os.sched_getaffinity(0))
        torch.set_num_threads(max(1, cpus // local_world_size))
    if config.args.deepspeed:
        from rayswift.train.deepspeed import prepare_deepspeed

        prepare_deepspeed(config.use_gpu, local_world_size)
    set_seed(config.args.seed)


def _build_trainer(
    config: WorkerConfig, rank: Rank, store: CheckpointStore, start_step: int, start: StreamPlaces
) -> StepTraining:
    from rayswift.hub import resolve_model
    from rayswift.modeling.adapters import parameter_info
    from rayswift.modeling.loading import load_tokenizer
    from rayswift.train.hf_arguments import hf_training_arguments

    args = config.args
    # DeepSpeed's ZeRO-3 shards the model while it loads, and learns of it from these arguments: they come first.
    hf_arguments = hf_training_arguments(
        args, config.plan, rank.world_size, store.local_dir, config.dtype, config.use_gpu, config.val is not None
    )
    model_dir = resolve_model(config.model, revision=args.model_revision, use_hf=args.use_hf, token=args.hub_token)
    # What the driver found may be on its machine only.
    config = replace(config, encoder=replace(config.encoder, model_dir=model_dir))
    tokenizer = load_tokenizer(model_dir, trust_remote_code=args.trust_remote_code)
    model = _build_model(config, model_dir)
    pad_token_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id or 0

    def push(event: dict[str, Any]) -> None:
        config.events.push.remote(event)

    val_rows = TokenRows(config.val) if config.val is not None else None
    if rank.rank == 0:
        push({"event": "start", "parameter_info": parameter_info(model), "world_size": rank.world_size})
    collate = PairCollator(pad_token_id) if config.encoder.pairs else Collator(pad_token_id)
    train_collate = Collator(pad_token_id, flat=True) if args.packing or args.padding_free else collate
    settings: dict[str, Any] = {
        "model": model,
        "args": hf_arguments,
        "processing_class": tokenizer,
        "loader": _loader(config, rank, train_collate, start_step, start),
        "step_plan": config.plan,
        "val_rows": val_rows,
        "rank": rank,
        "push": push,
        "commit": store.commit,
        "collate": collate,
    }
    if config.encoder.pairs:
        from rayswift.train.trainers.dpo import PreferenceTrainer

        return PreferenceTrainer(ref_model=_reference_model(config, model_dir), **settings)
    from rayswift.train.trainers.sft import StepTrainer

    return StepTrainer(eval_dataset=val_rows, **settings)


def _reference_model(config: WorkerConfig, model_dir: str) -> Any:
    """The frozen model that full training is compared with; None for adapters, which are switched off instead."""
    from rayswift.hub import resolve_model
    from rayswift.modeling.loading import load_model

    args = config.args
    if args.train_type != "full":
        return None
    if args.ref_model:
        model_dir = resolve_model(
            args.ref_model, revision=args.ref_model_revision, use_hf=args.use_hf, token=args.hub_token
        )
    return load_model(
        model_dir,
        torch_dtype=_load_dtype(config),
        attn_impl=attention(args, config.use_gpu),
        trust_remote_code=args.trust_remote_code,
        model_kwargs=args.model_kwargs,
    )


def _build_model(config: WorkerConfig, model_dir: str) -> Any:
    from rayswift.modeling.adapters import add_lora, freeze_for_full, load_adapter
    from rayswift.modeling.loading import load_model

    args = config.args
    model = load_model(
        model_dir,
        torch_dtype=_load_dtype(config),
        attn_impl=attention(args, config.use_gpu),
        trust_remote_code=args.trust_remote_code,
        model_kwargs=args.model_kwargs,
    )
    model.config.use_cache = False
    if args.train_type == "full":
        freeze_for_full(model, args)
    elif args.adapters:
        model = load_adapter(model, args.adapters[0], is_trainable=True)
    else:
        model = add_lora(model, args)
    if args.gradient_checkpointing:
        # Frozen embeddings give inputs without gradients, and recomputed layers would then have none either.
        model.enable_input_require_grads()
    return model


def attention(args: Any, use_gpu: bool) -> str | None:
    """``--attn_impl``; where rows are joined and nothing is said, what does not work across them."""
    if not (args.packing or args.padding_free) or args.attn_impl not in (None, "sdpa"):
        return args.attn_impl
    from transformers.utils import is_flash_attn_2_available

    if args.attn_impl is None and use_gpu and is_flash_attn_2_available():
        return "flash_attention_2"
    from rayswift.modeling import varlen_attention

    return varlen_attention.NAME


def _load_dtype(config: WorkerConfig) -> str:
    """The dtype weights are kept in.

    Full training keeps float32 master weights: DeepSpeed makes its own from half-precision ones, without it the model
    is loaded in float32 and computes under autocast (bfloat16 weights would lose updates smaller than 1/256).
    """
    if config.args.train_type == "full" and not config.args.deepspeed:
        return "float32"
    return config.dtype


def buckets(args: Any) -> bool:
    """Whether rows of like length are trained together (Transformers' ``--train_sampling_strategy``)."""
    return args.training_args.get("train_sampling_strategy") == "group_by_length"


def _units(config: WorkerConfig, rows: RowIndex) -> TrainItems | LazyItems:
    if not isinstance(rows, LazyRows):
        return TrainItems(rows, config.packs)

    def report(line: str) -> None:
        config.events.push.remote({"event": "drops", "lines": [line]})

    return LazyItems(rows, config.encoder, report)


def _loader(
    config: WorkerConfig, rank: Rank, collate: Collate, start_step: int, start: StreamPlaces
) -> EpochLoader | StreamLoader:
    args = config.args
    if config.train is not None:
        units = _units(config, config.train)
        shuffle, bucket = args.train_dataloader_shuffle, buckets(args)
        return EpochLoader(units, config.plan, rank, collate, start_step, args.data_seed, shuffle, bucket)
    from ray.train.collective import broadcast_from_rank_zero

    from rayswift.data.flow.stream import read_stream, start_stream_readers

    assert config.stream is not None
    readers = None
    if rank.rank == 0:
        readers = start_stream_readers(config.stream, config.encoder, config.events, start, rank.world_size)
    shared = broadcast_from_rank_zero(readers)
    order = config.stream.order(start_step * config.plan.global_batch_size)

    def tables() -> list[Iterator[pa.Table]]:
        return [read_stream(reader, rank.rank) for reader in shared]

    return StreamLoader(tables, start, order, config.plan, rank, collate, start_step)

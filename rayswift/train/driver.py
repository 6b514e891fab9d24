"""The train flow of ``rayswift pt``, ``sft`` and ``rlhf``, from arguments to a run directory. Reads top to bottom:
resolve, check, build, run."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import logging
import os
import time
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from rayswift import cluster as ray_cluster
from rayswift import private
from rayswift.arguments.tasks import TaskSettings
from rayswift.cluster.doctor import quick_look
from rayswift.console import say
from rayswift.data.files import filesystem_of
from rayswift.data.flow.prepare import first_usable_row
from rayswift.data.flow.stage_bars import StageBars
from rayswift.data.names import ResolvedDatasets, resolve_datasets
from rayswift.data.tokens.encoder import Encoder
from rayswift.data.tokens.row_index import LazyRows
from rayswift.data.tokens.table import place_of
from rayswift.errors import RunFailedError, UserError
from rayswift.modeling.resolved import resolve_model
from rayswift.plan.memory import memory_need, shortage
from rayswift.train.checkpoints.manifest import list_checkpoints
from rayswift.train.checkpoints.reshard import check_zero_resume
from rayswift.train.config import PackedPlan, RunData, WorkerConfig
from rayswift.train.deepspeed import deepspeed_config, zero_stage
from rayswift.train.failures import ended_by
from rayswift.train.hf_arguments import best_is_last
from rayswift.train.model import compute_dtype, find_model
from rayswift.train.needs import check_device, check_packages
from rayswift.train.packing import join_rows, largest_pass, packing_plan
from rayswift.train.reporters import open_reporters, reporter_names
from rayswift.train.resume import Resume, find_resume
from rayswift.train.run_directory import RunDirectory, check_writable
from rayswift.train.schedule import StepSchedule, plan_steps
from rayswift.train.start import make_trainer, torch_config
from rayswift.train.start.allocator import worker_environment
from rayswift.train.start.warm_workers import start_spares, start_warm_workers
from rayswift.train.stopping import end_if_asked, saved_on_sigterm
from rayswift.train.summary import Summary, length_line, say_end

if TYPE_CHECKING:
    from rayswift.cluster import Workers
    from rayswift.data.flow.prepare import TrainData

logger = logging.getLogger("rayswift.train")


@dataclass(frozen=True)
class Inputs:
    """What the arguments lead to: where runs go, the checkpoint to go on from, the model, the data files, and what the
    environment says of the losses of ``--task_type``."""

    args: Any
    base: str
    resume: Resume
    model_dir: str
    datasets: ResolvedDatasets
    began: float
    task: TaskSettings


@dataclass(frozen=True)
class Machines:
    """Where a run trains. ``embedded``: on a Ray of this process; ``warm``: workers that import already."""

    embedded: bool
    workers: Workers
    dtype: str
    warm: list[Any]


def train(args: Any) -> dict[str, Any]:
    """Train, and say on the way what happens.

    Returns:
        ``run_directory``, ``global_step``, ``last_model_checkpoint``, ``best_model_checkpoint``, ``best_metric``.

    Raises:
        UserError: bad input; nothing is left half-written.
    """
    began = time.monotonic()
    if not private.in_ray_job():  # whose folder goes with it
        args = args.with_absolute_paths()
    if args.adapters:
        args = resolve_model(args).args
    base = ray_cluster.results_at(args, "output_dir", args.output_dir)
    check_writable(base)
    reporter_names(args)
    check_packages(args)
    resume = find_resume(args.resume_from_checkpoint, base, args.add_version)
    ray_cluster.check_before_start(args)
    model_dir = find_model(args)
    task = TaskSettings.from_environment()
    inputs = Inputs(args, base, resume, model_dir, resolve_datasets(args), began, task)
    resume.check_model(args, model_dir)
    if args.begins_anew:  # a run of its own, on another's weights
        resume = replace(resume, run_directory=None, position=None, step=0)
        inputs = replace(inputs, resume=resume)
    first_row = first_usable_row([*inputs.datasets.train, *inputs.datasets.val], args.strict)
    for dataset in [*inputs.datasets.train, *inputs.datasets.val]:
        say(dataset.describe())

    machines = _connect(inputs)
    packing = packing_plan(args, inputs.model_dir, machines.dtype, machines.workers)
    loaded, data = _load_data(inputs, machines)
    if not args.training_args.get("ignore_data_skip"):
        resume.check_data(data.fingerprint)
    # A run that goes on keeps the batch of its checkpoint.
    saved = resume.position.global_batch_size if resume.position else None
    planned = functools.partial(plan_steps, args, machines.workers.largest, data.num_items, packed=bool(args.packing))
    schedule = planned(global_batch_size=saved)
    if line := resume.kept_line(args, planned().global_batch_size):
        say(line)
    inputs = replace(inputs, args=resume.with_kept(args))
    if packing is None and args.packing is None and args.command != "rlhf" and "train_dataset" in data.token_parts:
        lengths = data.token_parts["train_dataset"].lengths
        packing, schedule = join_rows(
            args, inputs.model_dir, machines.dtype, machines.workers, lengths, schedule, machines.warm
        )
    _say_data(inputs, machines, loaded, data, schedule, first_row)

    run = _open_run(inputs, loaded)
    outcome = _fit(inputs, machines, data, packing, schedule, run, loaded.origins)
    say_end(args, outcome)
    return outcome


# --- before anything expensive starts ---------------------------------------------------------------------------


def _connect(inputs: Inputs) -> Machines:
    """Connect to Ray, say what will train where, and start what can start now."""
    from rayswift.modeling.loading import parameter_counts, supports_bfloat16

    args, model_dir = inputs.args, inputs.model_dir
    cluster = ray_cluster.connect(args)
    workers = ray_cluster.plan_workers(args, cluster)
    quick_look(cluster, inputs.base)
    if inputs.resume.uri and "optimizer" not in args.left_out:
        stage = zero_stage(deepspeed_config(args.deepspeed))
        check_zero_resume(*filesystem_of(inputs.resume.uri), stage, workers.num_workers)
    dtype = compute_dtype(args, model_dir, workers.use_gpu)
    check_device(args, workers.use_gpu)
    if dtype == "bfloat16" and not workers.use_gpu and not supports_bfloat16(use_gpu=False):
        say("this CPU has no bfloat16 instructions: --torch_dtype float32 would be many times faster")
    counts, elastic = parameter_counts(model_dir), isinstance(workers.num_workers, tuple)
    count = " to ".join(map(str, workers.num_workers)) if isinstance(workers.num_workers, tuple) else workers.largest
    say(f"model: {args.model} ({counts.parameters / 1e6:.1f}M parameters, {dtype}), {args.train_type} training")
    device = ", ".join(["GPU" if workers.use_gpu else "CPU", *workers.where])
    say(f"workers: {count} on {device}, DeepSpeed {args.deepspeed or 'off'}; "
        f"{cluster.describe()}")  # fmt: skip
    need = memory_need(args, model_dir, dtype, workers.largest, workers.use_gpu)
    say(need.line())
    if cluster.embedded and (warning := shortage(need, workers.largest, workers.use_gpu)):
        say(f"warning: {warning}")
    # On a cluster or with accelerators Ray Train says who gets what.
    early = workers.largest if cluster.embedded and not workers.use_gpu and not elastic else 0
    return Machines(cluster.embedded, workers, dtype, start_warm_workers(model_dir, early))


# --- data -------------------------------------------------------------------------------------------------------


def _load_data(inputs: Inputs, machines: Machines) -> tuple[TrainData, RunData]:
    """Token rows, or for ``--streaming true`` the plan of a stream; and the validation rows."""
    from rayswift.cluster.board import Meters
    from rayswift.data.flow.cache import TokenCache, encoder_hash
    from rayswift.data.flow.plan import plan_streams
    from rayswift.data.flow.prepare import load_train_data
    from rayswift.data.tokens.arrow_files import default_root
    from rayswift.data.tokens.packing import pack

    args = inputs.args
    encoder = Encoder.for_training(args, inputs.model_dir)
    say(f"template: {encoder.template_name}")
    length = (args.packing_length or encoder.max_length) if args.packing else None
    if args.packing and length is None:
        raise UserError("--packing true: the model's configuration has no maximal length; set --max_length")
    # This machine's token cache; on a cluster one beside the runs, which every node reaches.
    root = default_root() if machines.embedded else f"{inputs.base}/.token_cache"
    with StageBars() as bars:
        cache = TokenCache(root, args.load_from_cache_file)
        loaded = load_train_data(args, inputs.datasets, encoder, bars.update, cache)
    if not machines.embedded:
        Meters().count_up_to(**{f"rayswift_token_cache_{name}": cache.counts[name] for name in ("hits", "misses")})
    if loaded.train is None:
        stream = plan_streams(args, inputs.datasets.train, length)
        return loaded, RunData(None, None, stream, loaded.val, encoder, stream.fingerprint(encoder))
    packs = pack(loaded.train.lengths, length) if length is not None else None
    settings = (
        loaded.train.fingerprint(),
        # Lazy rows are standard rows: what they become is not in their names.
        encoder_hash(encoder) if isinstance(loaded.train, LazyRows) else None,
        length,
        args.data_seed,
        args.train_dataloader_shuffle,
        args.training_args.get("train_sampling_strategy"),
    )
    fingerprint = hashlib.sha256(repr(settings).encode()).hexdigest()[:40]
    return loaded, RunData(loaded.train, packs, None, loaded.val, encoder, fingerprint)


def _say_data(
    inputs: Inputs,
    machines: Machines,
    loaded: TrainData,
    data: RunData,
    schedule: StepSchedule,
    first_row: dict[str, Any] | None,
) -> None:
    """The first training sample as SWIFT prints it (of rows not encoded yet, what the first usable one becomes), and
    what there is of data and steps."""
    from rayswift.data.tokens.encoder import Dropped, Encoded
    from rayswift.data.tokens.table import TokenRows

    first: Encoded | Dropped
    if data.train is not None and not isinstance(data.train, LazyRows):
        read = TokenRows(data.train)[0]
        first = Encoded(read.input_ids, read.labels, 0, None, read.rejected_start, read.text_ends, read.targets)
    else:
        assert first_row is not None
        first = data.encoder.encode_batch([first_row])[0]
    lines = [f"first row dropped: {first.reason}"] if isinstance(first, Dropped) else data.encoder.describe(first)
    for line in [*lines, *loaded.drops.lines()]:
        say(line)
    for rows in data.token_parts.values():
        say(f"Dataset Token Length: {length_line(rows.lengths)}")
    if data.train is not None:
        say(f"train_dataset: {len(data.train)} rows, val_dataset: {len(data.val) if data.val else 0} rows")
    if data.packs is not None and data.train is not None:
        filled = data.train.lengths.sum() / len(data.packs)
        say(f"packing: {len(data.packs)} packs, {filled:.0f} tokens on average")
    say(schedule.describe(machines.workers.largest, data.num_items, "packs" if inputs.args.packing else "rows"))
    if data.val is not None and (line := best_is_last(inputs.args, schedule)):
        say(line)


def _open_run(inputs: Inputs, loaded: TrainData) -> RunDirectory:
    """The run directory, with what the run begins with."""
    going_on, args = inputs.resume.run_directory, inputs.args
    inputs.resume.make_way()
    run = RunDirectory(going_on) if going_on else RunDirectory.create(inputs.base, args.add_version)
    args.save(run.local / "args.json")
    if loaded.val_rows:
        run.write_jsonl("val_dataset.jsonl", loaded.val_rows)
        say(f"The split dataset from the training set will be saved at: {run.uri}/val_dataset.jsonl")
    say(f"The logging file will be saved in: {run.uri}/logging.jsonl")
    run.sync()
    return run


# --- training ---------------------------------------------------------------------------------------------------


def _fit(
    inputs: Inputs,
    machines: Machines,
    data: RunData,
    packing: PackedPlan | None,
    schedule: StepSchedule,
    run: RunDirectory,
    origins: dict[str, tuple[str, str]],
) -> dict[str, Any]:
    """Train with Ray Train, and show it."""
    from rayswift.modeling.loading import model_fingerprint
    from rayswift.train.evaluation import spare_resources
    from rayswift.train.events import run_facts, start_event_queue
    from rayswift.train.progress import Progress

    args = inputs.args
    events = start_event_queue(None if machines.embedded else run_facts(args, machines.workers, schedule, run))
    config = WorkerConfig(
        args=args,
        model=inputs.model_dir if os.path.isdir(args.model) else args.model,
        model_fingerprint=model_fingerprint(inputs.model_dir),
        dtype=machines.dtype,
        use_gpu=machines.workers.use_gpu,
        data=data,
        packing=packing,
        largest_pass=largest_pass(args, data, packing, schedule),
        schedule=schedule,
        run_uri=run.uri,
        resume=inputs.resume.uri,
        resume_step=inputs.resume.step,
        events=events,
        spare=spare_resources(args, machines.workers) if data.val is not None else None,
        task=inputs.task,
    )
    trainer = _torch_trainer(config, machines, run, inputs.model_dir)
    reporters, summary = open_reporters(args, run), Summary.of(run, inputs.began, bool(inputs.resume.run_directory))
    place = functools.partial(place_of, data.train, origins=origins)
    progress = Progress(events, schedule, run, reporters, summary, place, args.step_timeout)
    try:
        waiting = nullcontext() if machines.embedded else ray_cluster.waiting_said(machines.workers)
        with progress, saved_on_sigterm(events) as ending, waiting:
            result = _run_trainer(trainer)
        end_if_asked(ending, (result.return_value or {}).get("global_step") == schedule.max_steps)
        outcome = _outcome(run, result)
        # SWIFT's closing row.
        lengths = {name: length_line(rows.lengths) for name, rows in data.token_parts.items()}
        closing = {**lengths, "model_parameter_info": progress.parameter_info, **outcome, **progress.summary.row()}
        try:
            run.append_jsonl("logging.jsonl", closing)
        except OSError as error:
            say(f"{run.uri}: its log cannot be written ({error.strerror})")
    except (KeyboardInterrupt, RunFailedError, UserError):
        with contextlib.suppress(OSError):
            run.append_jsonl("logging.jsonl", progress.summary.row())
        if whole := list_checkpoints(run.filesystem, run.path):
            say(f"stopped; checkpoint-{whole[-1].step} in {run.uri} is whole. Go on with the same command and "
                "--resume_from_checkpoint true")  # fmt: skip
        elif inputs.resume.checkpoint:
            say("stopped before its first checkpoint (--save_steps); --resume_from_checkpoint "
                f"{inputs.resume.uri} is where it began")  # fmt: skip
        else:
            say("stopped before the first checkpoint (--save_steps)")
        raise
    finally:
        run.close()
        events.close()
    return outcome


def _torch_trainer(config: WorkerConfig, machines: Machines, run: RunDirectory, model_dir: str) -> Any:
    from ray.train import CheckpointConfig, FailureConfig, LoggingConfig, RunConfig, ScalingConfig

    from rayswift.train.worker import train_loop

    folder, _, name = run.path.rpartition("/")
    private.forget_train_snapshot(run.filesystem, run.path)
    workers, failures = machines.workers, config.args.max_failures
    return make_trainer(
        train_loop,
        embedded=machines.embedded,
        alone=config.data.stream is None,
        warm=machines.warm,
        start_spares=functools.partial(start_spares, model_dir, len(machines.warm)),
        train_loop_config={"config": config},
        torch_config=torch_config(
            "nccl" if workers.use_gpu else "gloo",
            config.args.ddp_timeout,
            embedded=machines.embedded,
            # DeepSpeed makes a group where it finds none, and so may Accelerate for accelerators.
            alone=workers.num_workers == 1 and not workers.use_gpu and not config.args.deepspeed,
        ),
        scaling_config=ScalingConfig(
            num_workers=workers.num_workers,
            use_gpu=workers.use_gpu,
            resources_per_worker=workers.resources_per_worker,
            placement_strategy=workers.strategy,
            label_selector=workers.selector or None,
        ),
        run_config=RunConfig(
            name=name,
            storage_path=folder,
            storage_filesystem=run.filesystem if "://" in run.uri else None,
            failure_config=FailureConfig(
                max_failures=failures,
                controller_failure_limit=failures,
                max_preemption_failures=max(failures, 0) * 10 if failures >= 0 else -1,
            ),
            checkpoint_config=CheckpointConfig(num_to_keep=None),
            logging_config=LoggingConfig(log_level="WARNING"),
            worker_runtime_env={"env_vars": worker_environment(workers.use_gpu)},
        ),
    )


def _run_trainer(trainer: Any) -> Any:
    """``fit``; a worker's failure becomes one line that says which worker, and why."""
    from ray.train import TrainingFailedError

    try:
        return trainer.fit()
    except TrainingFailedError as error:
        logger.debug("training failed", exc_info=error)
        raise ended_by(getattr(error, "worker_failures", None) or {}, error) from error


# --- after ------------------------------------------------------------------------------------------------------


def _outcome(run: RunDirectory, result: Any) -> dict[str, Any]:
    returned = result.return_value or {}
    if "user_error" in returned:
        raise UserError(returned["user_error"])
    if "failed" in returned:
        raise RunFailedError(returned["failed"])
    if "error" in returned:
        raise RunFailedError(f"training could not start: {returned['error']}")
    found = list_checkpoints(run.filesystem, run.path)
    paths: dict[int | None, str] = {checkpoint.step: f"{run.uri}/checkpoint-{checkpoint.step}" for checkpoint in found}
    last, best = found[-1].step if found else None, returned.get("best_step")
    return {
        "run_directory": run.uri,
        "global_step": returned.get("global_step"),
        "last_model_checkpoint": paths.get(last),
        "best_model_checkpoint": paths.get(best, paths.get(last)),
        "best_metric": returned.get("best_metric") if best in paths else None,
    }

"""The train flow of ``rayswift pt``, ``sft`` and ``rlhf``, from arguments to a run directory. Reads top to bottom."""

from __future__ import annotations

import hashlib
import logging
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rayswift import cluster as ray_cluster
from rayswift.data.files import filesystem_of
from rayswift.data.flow.prepare import first_usable_row
from rayswift.data.flow.stage_bars import StageBars
from rayswift.data.names import ResolvedDatasets, resolve_datasets
from rayswift.data.tokens.encoder import Encoder
from rayswift.data.tokens.row_index import LazyRows
from rayswift.errors import RunFailedError, UserError
from rayswift.plan.memory import memory_need, shortage
from rayswift.train.checkpoints import manifest as checkpoints
from rayswift.train.deepspeed import check_precision, deepspeed_config
from rayswift.train.run_directory import RunDirectory, check_writable, output_base
from rayswift.train.schedule import StepPlan, plan_steps
from rayswift.train.start.warm_workers import start_warm_workers

if TYPE_CHECKING:
    from rayswift.cluster import Cluster, Workers
    from rayswift.data.flow.cache import TokenCache
    from rayswift.data.flow.plan import StreamMix
    from rayswift.data.flow.prepare import TrainData
    from rayswift.data.tokens.packing import Packs
    from rayswift.data.tokens.row_index import RowIndex

logger = logging.getLogger("rayswift.train")


@dataclass
class _Resume:
    """Where ``--resume_from_checkpoint`` leads: a checkpoint and its position, and the run directory to go on in (None:
    a new one)."""

    checkpoint: str | None = None
    run_directory: str | None = None
    position: checkpoints.Position | None = None

    def check_data(self, args: Any, fingerprint: str) -> None:
        """Refuse to go on in the middle of other data than the checkpoint's."""
        if self.position is None or self.position.data == fingerprint or args.training_args.get("ignore_data_skip"):
            return
        raise UserError(
            "--resume_from_checkpoint: the data is not what the checkpoint was trained on (--dataset, its files, the "
            "template or the seed changed), so its position has no meaning; --ignore_data_skip true goes on anyway"
        )


def train(args: Any) -> dict[str, Any]:
    """Train, and say on the way what happens.

    Returns:
        ``run_directory``, ``global_step``, ``last_model_checkpoint``, ``best_model_checkpoint``, ``best_metric``.

    Raises:
        UserError: bad input; nothing is left half-written.
    """
    base = output_base(args)
    check_writable(base)
    resume = _find_resume(args, base)
    ray_cluster.check_before_start(args)
    model_dir = _resolve_model(args)
    datasets = resolve_datasets(args)
    first_row = first_usable_row([*datasets.train, *datasets.val], args.strict)
    cluster = ray_cluster.connect(args)
    workers = ray_cluster.plan_workers(args, cluster)
    dtype = _resolve_dtype(args, model_dir, workers)
    _announce(args, model_dir, dtype, cluster, workers)
    warm = _warm_workers(model_dir, cluster, workers)

    encoder = Encoder.for_training(args, model_dir)
    data = _load_data(args, datasets, encoder, _token_cache(args, base, cluster))
    resume.check_data(args, data.fingerprint)
    saved = resume.position.global_batch_size if resume.position else None
    plan = plan_steps(args, workers.largest, data.num_units, packed=args.packing, global_batch_size=saved)
    _print_sample(encoder, data, first_row)
    _print_data(args, data, plan, workers)

    run = RunDirectory(resume.run_directory) if resume.run_directory else RunDirectory.create(base, args.add_version)
    _write_inputs(args, run, data)
    outcome = _fit(args, run, plan, workers, dtype, model_dir, data, encoder, resume, warm)
    _print_end(args, outcome)
    return outcome


# --- before anything expensive starts ---------------------------------------------------------------------------


def _find_resume(args: Any, base: str) -> _Resume:
    """``true``: the newest whole checkpoint below ``--output_dir``, and its own run directory goes on. A path: that
    checkpoint, in a new run directory, so that later checkpoints of the old run stay."""
    wanted = args.resume_from_checkpoint
    if not wanted or str(wanted).lower() == "false":
        return _Resume()
    if str(wanted).lower() == "true":
        filesystem, inner = filesystem_of(base)
        found = checkpoints.latest_checkpoint(filesystem, inner)
        if found is None:
            raise UserError(f"--resume_from_checkpoint true: no whole checkpoint below --output_dir {base}")
        _check_bytes(base, filesystem, found.path)
        checkpoints.clean_unfinished(filesystem, found.run_directory, found.step)
        prefix = base[: len(base) - len(inner)] if "://" in base else ""
        position = checkpoints.read_position(filesystem, found.path)
        return _Resume(found.path, prefix + found.run_directory, position)
    path = wanted if "://" in wanted else os.path.abspath(os.path.expanduser(wanted))
    filesystem, inner = filesystem_of(path)
    if not filesystem.get_file_info(inner).type.name == "Directory":
        raise UserError(f"--resume_from_checkpoint {wanted}: no such folder")
    if not checkpoints.read_manifest(filesystem, inner):
        raise UserError(
            f"--resume_from_checkpoint {wanted}: no whole checkpoint (its {checkpoints.MANIFEST} is missing or not "
            "true); give a checkpoint-N folder of a run, or `true` for the newest whole one"
        )
    _check_bytes(path, filesystem, inner)
    return _Resume(inner, position=checkpoints.read_position(filesystem, inner))


def _check_bytes(uri: str, filesystem: Any, checkpoint: str) -> None:
    """Refuse a local checkpoint whose files are not the ones that were saved (a bucket checks its own)."""
    manifest = checkpoints.read_manifest(filesystem, checkpoint)
    damaged = checkpoints.verify(checkpoint, manifest) if manifest and "://" not in uri else None
    if damaged:
        raise UserError(
            f"--resume_from_checkpoint: {checkpoint}/{damaged} is not what was saved (its hash differs from the "
            "manifest); give an earlier checkpoint-N folder"
        )


def _resolve_model(args: Any) -> str:
    from rayswift.hub import resolve_model
    from rayswift.modeling.loading import weight_files

    model_dir = resolve_model(args.model, revision=args.model_revision, use_hf=args.use_hf, token=args.hub_token)
    weight_files(model_dir)
    if reference := getattr(args, "ref_model", None):
        try:
            found = resolve_model(reference, revision=args.ref_model_revision, use_hf=args.use_hf, token=args.hub_token)
            weight_files(found)
        except UserError as error:
            raise UserError(str(error).replace("--model ", "--ref_model ")) from None
    return model_dir


def _resolve_dtype(args: Any, model_dir: str, workers: Workers) -> str:
    from rayswift.modeling.loading import resolve_dtype, supports_bfloat16

    dtype = resolve_dtype(args.torch_dtype, model_dir, workers.use_gpu)
    if dtype == "float16" and not workers.use_gpu:
        raise UserError("--torch_dtype float16 trains on GPUs only; use bfloat16 or float32 on CPU")
    check_precision(deepspeed_config(args.deepspeed), dtype)
    if dtype == "bfloat16" and not workers.use_gpu and not supports_bfloat16(use_gpu=False):
        _say("this CPU has no bfloat16 instructions: --torch_dtype float32 would be many times faster")
    return dtype


def _announce(args: Any, model_dir: str, dtype: str, cluster: Cluster, workers: Workers) -> None:
    from rayswift.modeling.loading import parameter_counts

    counts = parameter_counts(model_dir)
    count = (
        workers.num_workers
        if isinstance(workers.num_workers, int)
        else f"{workers.num_workers[0]} to {workers.largest}"
    )
    device = "GPU" if workers.use_gpu else "CPU"
    _say(f"model: {args.model} ({counts.parameters / 1e6:.1f}M parameters, {dtype}), {args.train_type} training")
    _say(f"workers: {count} on {device}, DeepSpeed {args.deepspeed or 'off'}; {cluster.describe()}")
    need = memory_need(args, model_dir, dtype, workers.largest, workers.use_gpu)
    _say(need.line())
    warning = shortage(need, workers.largest, workers.use_gpu) if cluster.embedded else None
    if warning:
        _say(f"warning: {warning}")


def _warm_workers(model_dir: str, cluster: Cluster, workers: Workers) -> list[Any]:
    """Workers that start now; none on a cluster or with accelerators, where Ray Train says who gets what."""
    if not cluster.embedded or workers.use_gpu or not isinstance(workers.num_workers, int):
        return []
    return start_warm_workers(model_dir, workers.num_workers)


# --- data -------------------------------------------------------------------------------------------------------


@dataclass
class _RunData:
    """What a run trains on: token rows (packed or not) or the plan of a stream, and what it is validated on."""

    loaded: TrainData
    packs: Packs | None
    stream: StreamMix | None
    fingerprint: str

    @property
    def train(self) -> RowIndex | None:
        """Token rows; None for a stream."""
        return self.loaded.train

    @property
    def token_parts(self) -> dict[str, RowIndex]:
        """Training and validation rows whose lengths are known, by SWIFT's names for them."""
        found = {"train_dataset": self.train, "val_dataset": self.loaded.val}
        return {name: rows for name, rows in found.items() if rows is not None and not isinstance(rows, LazyRows)}

    @property
    def num_units(self) -> int | None:
        """Rows or packs of an epoch; None for a stream."""
        if self.train is None:
            return None
        return len(self.train) if self.packs is None else len(self.packs)


def _token_cache(args: Any, base: str, cluster: Cluster) -> TokenCache:
    """This machine's token cache; on a cluster one beside the runs, which every node reaches."""
    from rayswift.data.flow.cache import TokenCache
    from rayswift.data.tokens.arrow_files import default_root

    return TokenCache(default_root() if cluster.embedded else f"{base}/.token_cache", args.load_from_cache_file)


def _load_data(args: Any, datasets: ResolvedDatasets, encoder: Encoder, cache: TokenCache) -> _RunData:
    """Token rows, or for ``--streaming true`` the plan of a stream; and the validation rows."""
    from rayswift.data.flow.cache import encoder_hash
    from rayswift.data.flow.plan import plan_streams
    from rayswift.data.flow.prepare import load_train_data
    from rayswift.data.tokens.packing import pack

    _say(f"template: {encoder.template_name}")
    length = (args.packing_length or encoder.max_length) if args.packing else None
    if args.packing and length is None:
        raise UserError("--packing true: the model's configuration has no maximal length; set --max_length")
    with StageBars() as bars:
        loaded = load_train_data(args, datasets, encoder, bars.update, cache)
    if loaded.train is None:
        stream = plan_streams(args, datasets.train, length)
        return _RunData(loaded, None, stream, stream.fingerprint(encoder))
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
    return _RunData(loaded, packs, None, hashlib.sha256(repr(settings).encode()).hexdigest()[:40])


def _print_sample(encoder: Encoder, data: _RunData, row: dict[str, Any] | None) -> None:
    """The first training sample as SWIFT prints it; of rows not encoded yet, what the first usable one becomes."""
    from rayswift.data.tokens.encoder import Dropped, Encoded
    from rayswift.data.tokens.table import TokenRows

    first: Encoded | Dropped
    if data.train is not None and not isinstance(data.train, LazyRows):
        read = TokenRows(data.train)[0]
        first = Encoded(read.input_ids, read.labels, rejected_start=read.rejected_start)
    else:
        assert row is not None
        first = encoder.encode_batch([row])[0]
    for line in [f"first row dropped: {first.reason}"] if isinstance(first, Dropped) else encoder.describe(first):
        _say(line)


def _print_data(args: Any, data: _RunData, plan: StepPlan, workers: Workers) -> None:
    for line in data.loaded.drops.lines():
        _say(line)
    val = data.loaded.val
    for rows in data.token_parts.values():
        _say(f"Dataset Token Length: {length_line(rows.lengths)}")
    if data.train is not None:
        _say(f"train_dataset: {len(data.train)} rows, val_dataset: {len(val) if val else 0} rows")
    unit = "packs" if args.packing else "rows"
    if data.packs is not None and data.train is not None:
        filled = data.train.lengths.sum() / len(data.packs)
        _say(f"packing: {len(data.packs)} packs, {filled:.0f} tokens on average")
    accumulation = plan.accumulation(workers.largest)
    _say(
        f"{plan.max_steps} steps of {plan.global_batch_size} {unit} ({workers.largest} workers × "
        f"{plan.per_device_batch_size} {unit} × {accumulation} accumulated)"
    )


def length_line(lengths: Any) -> str:
    """SWIFT's ``172.068281±93.875049, min=36.000000, max=866.000000, size=48330``."""
    spread = f"{lengths.mean():.6f}±{lengths.std():.6f}"
    return f"{spread}, min={lengths.min():.6f}, max={lengths.max():.6f}, size={len(lengths)}"


def _write_inputs(args: Any, run: RunDirectory, data: _RunData) -> None:
    args.save(run.local / "args.json")
    if data.loaded.val_rows:
        run.write_jsonl("val_dataset.jsonl", data.loaded.val_rows)
        _say(f"The split dataset from the training set will be saved at: {run.uri}/val_dataset.jsonl")
    _say(f"The logging file will be saved in: {run.uri}/logging.jsonl")
    run.sync()


# --- training ---------------------------------------------------------------------------------------------------


def _fit(
    args: Any,
    run: RunDirectory,
    plan: StepPlan,
    workers: Workers,
    dtype: str,
    model_dir: str,
    data: _RunData,
    encoder: Encoder,
    resume: _Resume,
    warm: list[Any],
) -> dict[str, Any]:
    from rayswift.train.events import start_event_queue
    from rayswift.train.progress import Progress
    from rayswift.train.worker import WorkerConfig

    events = start_event_queue()
    config = WorkerConfig(
        args=args,
        plan=plan,
        model=model_dir if os.path.isdir(args.model) else args.model,
        dtype=dtype,
        use_gpu=workers.use_gpu,
        run_uri=run.uri,
        train=data.train,
        packs=data.packs,
        stream=data.stream,
        encoder=encoder,
        data_fingerprint=data.fingerprint,
        val=data.loaded.val,
        resume=resume.checkpoint,
        events=events,
    )
    trainer = _torch_trainer(args, run, workers, config, warm)
    progress = Progress(events, plan, run, "tensorboard" in args.report_to or "all" in args.report_to)
    try:
        with progress:
            result = _run_trainer(trainer)
        outcome = _outcome(run, result)
        run.append_jsonl("logging.jsonl", _summary(data, progress.parameter_info, outcome))
    except (KeyboardInterrupt, RunFailedError):
        _say_how_to_resume(run, progress.last_step)
        raise
    finally:
        run.close()
    return outcome


def _torch_trainer(args: Any, run: RunDirectory, workers: Workers, config: Any, warm: list[Any]) -> Any:
    from ray.train import CheckpointConfig, FailureConfig, LoggingConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig

    from rayswift.train.start.lean_trainer import LeanTorchTrainer
    from rayswift.train.worker import train_loop

    folder, _, name = run.path.rpartition("/")
    # Ray Train resumes on its own from a snapshot of the same name; the manifests are what counts here.
    _forget_snapshot(run)
    return LeanTorchTrainer(
        train_loop,
        embedded=ray_cluster.address_of(args) is None,
        alone=config.stream is None,
        warm=warm,
        train_loop_config={"config": config},
        torch_config=TorchConfig(backend=None if workers.use_gpu else "gloo"),
        scaling_config=ScalingConfig(
            num_workers=workers.num_workers, use_gpu=workers.use_gpu, resources_per_worker=workers.resources_per_worker
        ),
        run_config=RunConfig(
            name=name,
            storage_path=folder,
            storage_filesystem=run.filesystem if "://" in run.uri else None,
            failure_config=FailureConfig(
                max_failures=args.max_failures,
                controller_failure_limit=args.max_failures,
                max_preemption_failures=max(args.max_failures, 0) * 10 if args.max_failures >= 0 else -1,
            ),
            checkpoint_config=CheckpointConfig(num_to_keep=None),
            logging_config=LoggingConfig(log_level="WARNING"),
        ),
    )


def _forget_snapshot(run: RunDirectory) -> None:
    snapshot = f"{run.path}/checkpoint_manager_snapshot.json"
    if run.filesystem.get_file_info(snapshot).is_file:
        run.filesystem.delete_file(snapshot)


def _run_trainer(trainer: Any) -> Any:
    """``fit``; a worker's failure becomes one line that says which worker, why, and where its log is."""
    from ray.train import TrainingFailedError

    try:
        return trainer.fit()
    except TrainingFailedError as error:
        failures = getattr(error, "worker_failures", None) or {}
        rank, cause = next(iter(failures.items()), (None, error))
        where = f"worker {rank}" if rank is not None else "the training controller"
        logger.debug("training failed", exc_info=error)
        raise RunFailedError(f"training failed in {where}: {_innermost(cause)}") from error


def _innermost(error: BaseException) -> str:
    lines = [line for line in str(error).strip().splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[-1].strip() if lines else 'no message'}"


# --- after ------------------------------------------------------------------------------------------------------


def _outcome(run: RunDirectory, result: Any) -> dict[str, Any]:
    returned = result.return_value or {}
    if "user_error" in returned:
        raise UserError(returned["user_error"])
    if "error" in returned:
        raise RunFailedError(f"training could not start: {returned['error']}")
    found = checkpoints.list_checkpoints(run.filesystem, run.path)
    paths: dict[int | None, str] = {checkpoint.step: f"{run.uri}/checkpoint-{checkpoint.step}" for checkpoint in found}
    last = found[-1].step if found else None
    return {
        "run_directory": run.uri,
        "global_step": returned.get("global_step"),
        "last_model_checkpoint": paths.get(last),
        "best_model_checkpoint": paths.get(returned.get("best_step"), paths.get(last)),
        "best_metric": returned.get("best_metric"),
    }


def _summary(data: _RunData, parameter_info: str | None, outcome: dict[str, Any]) -> dict[str, Any]:
    """SWIFT's closing row of logging.jsonl."""
    row: dict[str, Any] = {name: length_line(rows.lengths) for name, rows in data.token_parts.items()}
    return {**row, "model_parameter_info": parameter_info, **outcome}


def _print_end(args: Any, outcome: dict[str, Any]) -> None:
    last, best = outcome["last_model_checkpoint"], outcome["best_model_checkpoint"]
    _say(f"last_model_checkpoint: {last}")
    _say(f"best_model_checkpoint: {best}")
    result = best if args.load_best_model_at_end else last
    if result is None:
        return
    flag = "--model" if args.train_type == "full" else "--adapters"
    _say("next:")
    _say(f"  rayswift infer {flag} {result} --stream true")
    if flag == "--adapters":
        _say(f"  rayswift infer {flag} {result} --stream true --merge_lora true")


def _say_how_to_resume(run: RunDirectory, last_step: int | None) -> None:
    if last_step:
        _say(f"stopped; checkpoint-{last_step} in {run.uri} is whole. Go on with the same command and "
             "--resume_from_checkpoint true")  # fmt: skip
    else:
        _say("stopped before the first checkpoint (--save_steps)")


def _say(line: str) -> None:
    """A line for the person at the terminal."""
    print(line, flush=True)

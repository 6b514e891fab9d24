"""What ``pt``, ``sft`` and ``rlhf`` make of their arguments: the first batches, the model and what of it is trained,
the Trainer's arguments, what Ray Train is asked for. Nothing is trained."""

from __future__ import annotations

import contextlib
import itertools
import logging
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

from observed_engines import hubs
from reads import training_here

from rayswift.arguments import Arguments

logger = logging.getLogger("rayswift.train")
#: Of the Trainer's arguments, where this run writes.
_PLACES = ("output_dir", "logging_dir", "run_name")


@contextlib.contextmanager
def new_folder(seen: dict[str, Any]) -> Iterator[None]:
    """Work in an empty folder; what is written there is seen, dates left out."""
    before = Path.cwd()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        try:
            yield
            for path in sorted(Path(folder).rglob("*")):
                if path.is_file() and path.name != "goodput.json":  # seconds
                    name = re.sub(r"\d{6,}|\d+-\d+", "N", str(path.relative_to(folder)))
                    text = path.read_bytes().decode("utf-8", "replace").replace(folder, "")
                    seen[f"file {name}"] = re.sub(r'\d{8}-\d{6}|(?<="other": )[\d.]+', "N", text)
        finally:
            os.chdir(before)


def weights(model: Any) -> Any:
    """What is trained of a model, and with what it begins."""
    return {
        name: [str(one.dtype), one.requires_grad, list(one.shape), float(one.detach().float().abs().sum())]
        for name, one in model.named_parameters()
    }


def about(one: Any) -> Any:
    """What a callback is, with its plain values."""
    plain = {name: value for name, value in vars(one).items() if isinstance(value, int | float | str)}
    return [type(one).__name__, plain]


def settings_of(trainer: Any) -> Any:
    """What a trainer trains, on what, how."""
    from rayswift.modeling.adapters import expert_parameters

    model, args = trainer.model, trainer.args
    trainer.create_optimizer()
    groups = [{**group, "params": len(group["params"])} for group in trainer.optimizer.param_groups]
    batches = [str({name: value for name, value in vars(one).items()} if hasattr(one, "__dict__") else one)
               for one in itertools.islice(iter(trainer.loader), 4)]  # fmt: skip
    peft = {name: str(one) for name, one in getattr(model, "peft_config", {}).items()}
    reference = getattr(trainer, "ref_model", None)
    base = model.get_base_model() if peft else model
    how = [type(base).__name__, base.config._attn_implementation]
    how += [base.config._experts_implementation] if expert_parameters(base) else []
    return [
        {name: value for name, value in args.to_dict().items() if name not in _PLACES},
        [module._compiled_call_impl is not None for module in model.modules()],
        weights(model), None if reference is None else weights(reference), peft, str(model.config), groups, batches,
        [str(row) for row in trainer.val_rows or ()], how,
        [type(trainer.optimizer).__name__, trainer.on_nan, trainer.processing_class.chat_template],
        [about(callback) for callback in trainer.callback_handler.callbacks],
    ]  # fmt: skip


def encode_all(seen: dict[str, Any]) -> Callable[..., Any]:
    """As the data path's own; how many chunks were there already, and how many were made, is seen."""
    from rayswift.data.flow import encode_tasks

    def encode(tasks: Any, encoder: Any, cache: Any, *how: Any) -> Any:
        found = encode_tasks.encode_all(tasks, encoder, cache, *how)
        seen["cache"] = dict(cache.counts)
        return found

    return encode


def whole(files: Path) -> Callable[[Arguments], Any]:
    """An observer: all of a run but its steps. ``files``: what hubs have."""
    return lambda args: _whole(args, files)


def _whole(args: Arguments, files: Path) -> Any:
    import ray
    import torch

    from rayswift import cluster, train
    from rayswift.data.flow import prepare
    from rayswift.train import driver, worker
    from rayswift.train.checkpoints.store import CheckpointStore

    seen: dict[str, Any] = {}
    connect, build_trainer = cluster.connect, worker.build_trainer

    def make_trainer(loop: Any, *, train_loop_config: Any, **asked: Any) -> Any:
        config, scaling, runs = train_loop_config["config"], asked["scaling_config"], asked["run_config"]
        seen["asked"] = [str(vars(scaling)), str(runs.failure_config), runs.storage_path]
        seen["config"] = [
            config.schedule, config.largest_pass, config.packing, config.model, config.dtype, config.resume,
            config.spare, config.task,
        ]  # fmt: skip
        seen["stream"] = config.data.stream
        seen["store"] = [config.args.save_total_limit, config.args.create_checkpoint_symlink]
        return SimpleNamespace(fit=lambda: SimpleNamespace(return_value=loop({"config": config})))

    def build(*about: Any) -> Any:
        trainer = build_trainer(*about)
        seen["trainer"] = settings_of(trainer)
        trainer.state.best_global_step = 1
        trainer.train = lambda **how: seen.update(train=how)
        trainer.save_final = lambda: None
        trainer.load_checkpoint = lambda folder: seen.update(loaded=Path(folder).name)
        return trainer

    def watch(clock: Any, rank: Any, seconds: float, tell: Any) -> None:
        seen["watched"] = seconds

    with contextlib.ExitStack() as stack:
        stack.enter_context(new_folder(seen))
        stack.enter_context(contextlib.redirect_stdout(None))
        queue = stack.enter_context(training_here())
        stack.callback(shutil.rmtree, "hub", ignore_errors=True)
        # One thread: a few tiny products each, which others would only wait for.
        stack.callback(torch.set_num_threads, torch.get_num_threads())
        torch.set_num_threads(1)
        stack.enter_context(mock.patch.object(torch, "set_num_threads"))
        for patch in hubs(seen, files):
            stack.enter_context(patch)
        for owner, name, value in (
            (driver, "make_trainer", make_trainer), (driver, "say", lambda _: None),
            (driver, "say_end", lambda *_: None),
            (cluster, "connect", lambda made: seen.update(address=cluster.address_of(made)) or connect(made)),
            (driver, "shortage", lambda *_: ""), (worker, "build_trainer", build), (worker, "watch", watch),
            (worker, "Evaluations", mock.MagicMock()), (worker, "_await_scores", lambda *_: None),
            (CheckpointStore, "fetch", lambda _, uri: uri), (prepare, "encode_all", encode_all(seen)),
            (ray, "cluster_resources", lambda: {"CPU": 64.0}),
        ):  # fmt: skip
            stack.enter_context(mock.patch.object(owner, name, value))
        train.rlhf(args) if args.command == "rlhf" else train.sft(args)
    for line in (line for event in queue.events if event["event"] == "drops" for line in event["lines"]):
        logger.warning(line)  # what the driver says
    return {name: value for name, value in seen.items() if not name.endswith("args.json")}


def hf_arguments(args: Arguments) -> Any:
    """The Trainer's arguments alone: most flags show there."""
    from rayswift.train.hf_arguments import hf_training_arguments
    from rayswift.train.schedule import plan_steps

    schedule = plan_steps(args, 1, None if args.streaming else 12)  # type: ignore[attr-defined]
    made = hf_training_arguments(args, schedule, 1, "out", "float32", use_gpu=False, has_val=True)
    return {name: value for name, value in made.to_dict().items() if name not in _PLACES}

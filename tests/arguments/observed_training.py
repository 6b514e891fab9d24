"""What ``pt``, ``sft`` and ``rlhf`` make of their arguments: the first batches, the model and what of it is trained,
the Trainer's arguments, what Ray Train is asked for. Nothing is trained."""

from __future__ import annotations

import contextlib
import itertools
import os
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

from reads import training_here

from rayswift.arguments import Arguments
from rayswift.cluster import Cluster

CLUSTER = Cluster(embedded=True, cpus=64, gpus=0, nodes=1)
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


def settings_of(trainer: Any) -> Any:
    """What a trainer trains, on what, how."""
    model, args = trainer.model, trainer.args
    trainer.create_optimizer()
    groups = [{**group, "params": len(group["params"])} for group in trainer.optimizer.param_groups]
    batches = [str({name: value for name, value in vars(one).items()} if hasattr(one, "__dict__") else one)
               for one in itertools.islice(iter(trainer.loader), 4)]  # fmt: skip
    peft = {name: str(one) for name, one in getattr(model, "peft_config", {}).items()}
    reference = getattr(trainer, "ref_model", None)
    return [
        {name: value for name, value in args.to_dict().items() if name not in _PLACES},
        [module._compiled_call_impl is not None for module in model.modules()],
        weights(model), None if reference is None else weights(reference), peft, str(model.config), groups, batches,
        [str(row) for row in trainer.val_rows or ()],
        [f"{type(one).__name__} {getattr(one, 'early_stopping_patience', '')}"
         for one in trainer.callback_handler.callbacks],
    ]  # fmt: skip


def whole(args: Arguments) -> Any:
    """All of a run but its steps."""
    from rayswift import cluster, train
    from rayswift.train import driver, worker
    from rayswift.train.clock import Clock
    from rayswift.train.loader import Rank
    from rayswift.train.stopping import Wish

    seen: dict[str, Any] = {"told": []}

    def make_trainer(loop: Any, *, train_loop_config: Any, **asked: Any) -> Any:
        config = train_loop_config["config"]
        runs = asked["run_config"]
        seen["asked"] = [str(asked["scaling_config"]), str(runs.failure_config), runs.storage_path]
        seen["config"] = [
            config.schedule, config.largest_pass, config.packing, config.model, config.dtype, config.resume,
            config.spare, config.task,
        ]  # fmt: skip
        seen["stream"] = config.data.stream
        return SimpleNamespace(fit=lambda: fit(config))

    def fit(config: Any) -> Any:
        worker.prepare_process(config, Rank(0, 1), 1)
        store = mock.MagicMock(local_dir="out")
        store.kept_steps.return_value = ()
        seen["store"] = [config.args.save_total_limit, config.args.create_checkpoint_symlink]
        with mock.patch("ray.train.collective.broadcast_from_rank_zero", return_value=()):
            trainer = worker.build_trainer(
                config, Rank(0, 1), 1, store, config.resume, 0, (), Clock(), lambda: Wish.NOTHING
            )
        seen["trainer"] = settings_of(trainer)
        return SimpleNamespace(return_value={"global_step": 0})

    with contextlib.ExitStack() as stack:
        stack.enter_context(new_folder(seen))
        stack.enter_context(contextlib.redirect_stdout(None))
        stack.enter_context(training_here())
        for owner, name, value in (
            (driver, "make_trainer", make_trainer), (driver, "say", seen["told"].append),
            (driver, "say_end", lambda *_: None),
            (cluster, "connect", lambda made: seen.update(address=cluster.address_of(made)) or CLUSTER),
            (driver, "shortage", lambda *_: ""),
        ):  # fmt: skip
            stack.enter_context(mock.patch.object(owner, name, value))
        train.rlhf(args) if args.command == "rlhf" else train.sft(args)
    seen.pop("told")
    return {name: value for name, value in seen.items() if not name.endswith("args.json")}


def hf_arguments(args: Arguments) -> Any:
    """The Trainer's arguments alone: most flags show there."""
    from rayswift.train.hf_arguments import hf_training_arguments
    from rayswift.train.schedule import plan_steps

    schedule = plan_steps(args, 1, None if args.streaming else 12)  # type: ignore[attr-defined]
    made = hf_training_arguments(args, schedule, 1, "out", "float32", use_gpu=False, has_val=True)
    return {name: value for name, value in made.to_dict().items() if name not in _PLACES}

"""``--resume_from_checkpoint``: which checkpoint, is it whole, and does the data still match."""

from __future__ import annotations

import copy
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rayswift.arguments.tuner import trained_weights
from rayswift.console import say
from rayswift.data.files import filesystem_of
from rayswift.data.flow.cache import code_hash
from rayswift.errors import UserError
from rayswift.files import parse_json
from rayswift.modeling.loading import model_fingerprint
from rayswift.train.checkpoints import manifest as checkpoints
from rayswift.train.checkpoints.reshard import STATE as ZERO_STATE

if TYPE_CHECKING:
    from pyarrow.fs import FileSystem


#: What the state of optimiser, schedule and random numbers brings along.
_KEPT = ("learning_rate", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon", "seed")
#: Flags that leave a part of it behind.
_RESET_BY = {
    "reset_scheduler": ("learning_rate",),
    "reset_optimizer": ("weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon"),
}


@dataclass(frozen=True)
class Resume:
    """A checkpoint (its path on its file system, its URI, its position and its step), and the run directory to go on in
    (None: a new one)."""

    checkpoint: str | None = None
    run_directory: str | None = None
    position: checkpoints.Position | None = None
    uri: str | None = None
    step: int = 0

    def kept_line(self, args: Any, rows_per_step: int) -> str:
        """What the checkpoint decides, whatever is given now, in one line; "" where that is the same."""
        kept = []
        asked = {"per_device_train_batch_size", "gradient_accumulation_steps"} & args.given
        if self.position is not None and asked and self.position.global_batch_size != rows_per_step:
            kept.append(f"{self.position.global_batch_size} rows a step (not {rows_per_step})")
        given = args.to_dict()
        kept += [f"--{name} {value} (not {given[name]})" for name, value in self._kept(args).items()]
        if not kept:
            return ""
        flags = [flag for flag, names in _RESET_BY.items() if set(names) & set(self._kept(args))]
        hint = f" ({' and '.join(f'--{flag} true' for flag in flags)}: what is given now)" if flags else ""
        return f"going on with what the checkpoint has: {', '.join(kept)}{hint}"

    def with_kept(self, args: Any) -> Any:
        """These arguments as the run will have them: what the checkpoint decides in the place of what is given."""
        result = copy.copy(args)
        for name, value in self._kept(args).items():
            setattr(result, name, value)
        return result

    def _kept(self, args: Any) -> dict[str, Any]:
        """Settings that the checkpoint brings along and that are given otherwise now."""
        saved, given = self._saved_arguments(), args.to_dict()
        reset = {name for flag, names in _RESET_BY.items() if getattr(args, flag) for name in names}
        names = () if args.resume_only_model else [name for name in _KEPT if name not in reset]
        return {name: saved[name] for name in names if name in saved and saved[name] != given[name]}

    def check_data(self, fingerprint: str) -> None:
        """Refuse to go on in the middle of other data than the checkpoint's.

        Another version's code names the same data otherwise, so across versions nothing can be told; that is said.
        """
        if self.position is None or self.position.data == fingerprint:
            return
        if self.position.code == code_hash():
            raise UserError(
                "--resume_from_checkpoint: the data is not what the checkpoint was trained on (--dataset, its files, "
                "the template or the seed changed), so its position has no meaning; --ignore_data_skip true goes on "
                "anyway"
            )
        say("the checkpoint is of another version of RaySwift: that its data is the same cannot be checked")

    def check_model(self, args: Any, model_dir: str) -> None:
        """Refuse another model, or another set of trained weights, than the checkpoint's."""
        if self.uri is None:
            return
        known = self.position.model if self.position else ""
        if known and known != model_fingerprint(model_dir):
            raise UserError(
                f"--model {args.model}: not the model that the checkpoint was trained from (its weights differ); give "
                "that one, or --adapters CHECKPOINT to begin a new run on this one"
            )
        saved, given = self._saved_arguments(), args.to_dict()
        if not args.resume_only_model and "deepspeed" in saved and bool(saved["deepspeed"]) != bool(given["deepspeed"]):
            raise UserError(
                f"--deepspeed {given['deepspeed'] or 'left out'}: the checkpoint was trained with "
                f"{saved['deepspeed'] or 'none'}, and its optimiser cannot be taken over; give that, or begin a new "
                "run on what it trained"
            )
        without = not args.resume_only_model and not self._has_optimizer()
        if without and args.deepspeed:
            raise UserError(
                f"--resume_from_checkpoint {self.uri}: holds no optimiser state (--save_only_model true), which "
                "DeepSpeed needs; begin a new run on its weights (--adapters or --model)"
            )
        optimizer = () if args.resume_only_model or args.reset_optimizer else ("optim", "optimizer")
        for name in ("train_type", *optimizer, *trained_weights(args.train_type)):
            if name in saved and saved[name] != given[name]:
                raise UserError(
                    f"--{name} {given[name]}: the checkpoint was trained with {saved[name]}; give that, or "
                    "leave --resume_from_checkpoint out"
                )
        if without:
            say("the checkpoint holds no optimiser state (--save_only_model true): the optimiser begins anew")

    def _has_optimizer(self) -> bool:
        """Whether there is Transformers' file, DeepSpeed's folder, or ours of ZeRO's state."""
        filesystem, inner = filesystem_of(self.uri or "")
        files = (checkpoints.read_manifest(filesystem, inner) or {"files": {}})["files"]
        return any(name in ("optimizer.pt", ZERO_STATE) or name.startswith("global_step") for name in files)

    def _saved_arguments(self) -> dict[str, Any]:
        """The ``args.json`` of the checkpoint; empty without one, or of another program's."""
        if self.uri is None:
            return {}
        filesystem, inner = filesystem_of(self.uri)
        try:
            with filesystem.open_input_stream(f"{inner}/args.json") as stream:
                saved = parse_json(stream.read())
        except FileNotFoundError:
            return {}
        return saved if isinstance(saved, dict) else {}

    def make_way(self) -> None:
        """Set aside what stands in the run's way, and say so."""
        if self.run_directory and self.checkpoint:
            filesystem, inner = filesystem_of(self.run_directory)
            if moved := checkpoints.make_way(filesystem, inner, self.step):
                say(f"set aside, as this run goes on from checkpoint-{self.step}: {', '.join(moved)}")


def find_resume(wanted: Any, base: str, add_version: bool) -> Resume:
    """``true``: the newest whole checkpoint below ``--output_dir``, and its own run directory goes on; ``auto``: that,
    or a fresh start where there is none. A path: that checkpoint, in a new run directory, so that later checkpoints of
    the old run stay.

    Nothing is changed here: :meth:`Resume.make_way` does, when all else is known to be right.

    Raises:
        UserError: no such checkpoint, none that is whole, or a new run would write among the checkpoints of another.
    """
    filesystem, inner = filesystem_of(base)
    if str(wanted).lower() in ("true", "auto"):
        damaged = []
        for found in checkpoints.find_checkpoints(filesystem, inner):
            if broken := _damaged_file(filesystem, found.path):
                damaged.append(broken)
                continue
            for file in damaged:
                say(f"{file} is not what was saved; going on from {os.path.basename(found.path)}, the newest whole one")
            prefix = base[: len(base) - len(inner)] if "://" in base else ""
            position = checkpoints.read_position(filesystem, found.path)
            return Resume(found.path, prefix + found.run_directory, position, prefix + found.path, found.step)
        why = f" ({damaged[0]} is not what was saved)" if damaged else ""
        if str(wanted).lower() == "auto":
            say(f"--resume_from_checkpoint auto: no whole checkpoint below --output_dir {base}{why}: a fresh start")
            return Resume()
        raise UserError(f"--resume_from_checkpoint true: no whole checkpoint below --output_dir {base}{why}")
    used = [] if add_version else checkpoints.checkpoint_names(filesystem, inner)
    if not wanted or str(wanted).lower() == "false":
        if used:
            raise UserError(
                f"--output_dir {base}: holds {used[0]} already; --resume_from_checkpoint true goes on with it, "
                "another folder (or --add_version true) begins anew"
            )
        return Resume()
    path = wanted if "://" in wanted else os.path.realpath(os.path.expanduser(wanted))
    filesystem, inner = filesystem_of(path.rstrip("/"))
    if not filesystem.get_file_info(inner).type.name == "Directory":
        raise UserError(f"--resume_from_checkpoint {wanted}: no such folder")
    manifest = checkpoints.read_manifest(filesystem, inner)
    if manifest is None:
        raise UserError(
            f"--resume_from_checkpoint {wanted}: no whole checkpoint (its {checkpoints.MANIFEST} is missing or not "
            "true); give a checkpoint-N folder of a run, or `true` for the newest whole one"
        )
    if broken := _damaged_file(filesystem, inner):
        raise UserError(
            f"--resume_from_checkpoint: {broken} is not what was saved (its hash differs from the manifest); give an "
            "earlier checkpoint-N folder"
        )
    here = os.path.dirname(path.rstrip("/")) == (base if "://" in base else os.path.realpath(base))
    if used and not here:
        raise UserError(f"--output_dir {base}: holds {used[0]} of another run; choose another folder")
    position = checkpoints.read_position(filesystem, inner)
    return Resume(inner, base if used else None, position, path.rstrip("/"), int(manifest["step"]))


def _damaged_file(filesystem: FileSystem, checkpoint: str) -> str | None:
    manifest = checkpoints.read_manifest(filesystem, checkpoint)
    file = checkpoints.verify(checkpoint, manifest, filesystem) if manifest else checkpoints.MANIFEST
    return f"{checkpoint}/{file}" if file else None

"""What the arguments of every command share: checking, resolving, saving, and reading a checkpoint's settings back."""

from __future__ import annotations

import copy
import dataclasses
import json
import logging
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar, Self

import rayswift
from rayswift.arguments.fields import Spec, convert, is_unset, specs_of
from rayswift.errors import UserError
from rayswift.files import parse_json, write_whole
from rayswift.redaction import REDACTED, redact, remember

logger = logging.getLogger("rayswift.arguments")

ARGS_FILE = "args.json"

# SWIFT's load_args: these come from the checkpoint whatever the command line says ...
_FORCED = ("train_type", "bnb_4bit_quant_type", "bnb_4bit_use_double_quant")
# ... and these if the command line does not name them (task_type: a model trained on text can be served as vectors).
_RESTORED = (
    "model", "task_type", "model_type", "model_revision", "torch_dtype", "attn_impl",
    "experts_impl", "new_special_tokens", "num_labels", "problem_type", "rope_scaling", "max_model_len",
    "quant_method", "quant_bits", "hqq_axis", "template", "system", "truncation_strategy", "agent_template",
    "norm_bbox", "use_chat_template", "response_prefix", "template_date",
)  # fmt: skip
# Flags that came later: where they are not given, a run is still the one that an older version began.
_LATER = ("template_date", "num_labels", "problem_type", "rope_scaling", "max_model_len")
# What may name files and folders: an args.json is read in other folders than it was written in.
_PATHS = (
    "model", "adapters", "ref_model", "ref_adapters", "reward_model", "dataset", "val_dataset", "cached_dataset",
    "cached_val_dataset", "custom_dataset_info",
)  # fmt: skip
# A checkpoint may be a stranger's: what runs code comes from the user's own command line or YAML alone.
_RUN_CODE = ("external_plugins", "trust_remote_code")


@dataclass(init=False, repr=False, eq=False)
class Arguments:
    """The settings of one command as flat attributes with SWIFT's flag names.

    Make them with `rayswift.arguments.parse_arguments` or `make_arguments`, which convert and check; the bare
    constructor does neither. Groups add fields, and may define ``problems`` (contradictions, one line each, which
    become one `UserError`), ``remarks`` (one-line warnings) and ``resolve`` (defaults that depend on other settings).
    """

    command: ClassVar[str] = ""
    topic: ClassVar[str] = ""
    decides: ClassVar[str] = ""  # the default of the group's flags, see `Spec`
    no_effect: ClassVar[dict[str, str]] = {}  # rules for all flags of the group, see `effects`

    given: frozenset[str] = frozenset()  # canonical names of what the user set
    restored: frozenset[str] = frozenset()  # ... and of what a checkpoint's args.json set
    config_file: str | None = None  # the YAML or JSON file the settings were read from
    training_args: dict[str, Any] = field(default_factory=dict)  # further transformers.TrainingArguments fields

    def __init__(self, **values: Any) -> None:
        # One short constructor for every class: generating one per class costs a fifth of start-up time.
        for declared in dataclasses.fields(self):
            if declared.name in values:
                setattr(self, declared.name, values.pop(declared.name))
            elif declared.default_factory is not dataclasses.MISSING:
                setattr(self, declared.name, declared.default_factory())
        if values:
            raise TypeError(f"{type(self).__name__} has no setting {', '.join(values)}")
        remember(self.__dict__)

    def __setstate__(self, state: dict[str, Any]) -> None:
        # A worker that gets its settings by pickle keeps their secrets out of its logs too.
        self.__dict__.update(state)
        remember(state)

    def finish(self) -> Self:
        """Check every group, then work out the defaults that depend on other settings. Raises UserError."""
        if problems := self.problem_lines():
            raise UserError("\n".join(problems))
        for remark in dict.fromkeys(self._each("remarks")):
            logger.warning(remark)
        return self.resolved()

    def problem_lines(self) -> list[str]:
        """What contradicts what, one line each."""
        return list(dict.fromkeys(self._each("problems")))

    def _each(self, hook: str) -> Iterator[str]:
        for cls in reversed(type(self).__mro__):
            if hook in cls.__dict__:
                yield from cls.__dict__[hook](self)

    def resolved(self) -> Self:
        """These arguments, the defaults that depend on other settings worked out."""
        for cls in reversed(type(self).__mro__):
            if "resolve" in cls.__dict__:
                cls.__dict__["resolve"](self)
        return self

    def is_set(self, name: str) -> bool:
        """Whether the user or a checkpoint decided this setting, so that it is not a mere default."""
        return name in self.given or name in self.restored

    def to_dict(self) -> dict[str, Any]:
        """Every setting as JSON-able values, tokens masked."""
        names = [f.name for f in dataclasses.fields(self) if f.name not in ("given", "restored", "config_file")]
        return {name: redact(getattr(self, name), name) for name in names}

    def with_absolute_paths(self) -> Self:
        """A copy in which files and folders of this machine are named so that they are found from any folder."""
        result = copy.copy(self)
        for name in _PATHS:
            if value := getattr(self, name, None):
                setattr(result, name, [*map(_absolute, value)] if isinstance(value, list) else _absolute(value))
        return result

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write `to_dict` to ``path`` (a file, or a folder that gets ``args.json``), whole or not at all."""
        path = os.fspath(path)
        path = os.path.join(path, ARGS_FILE) if os.path.isdir(path) else path
        content = {"command": self.command, "rayswift_version": rayswift.__version__, **self.to_dict()}
        write_whole(path, json.dumps(content, ensure_ascii=False, indent=2) + "\n")

    def with_saved(self, saved: dict[str, Any]) -> Self:
        """These arguments completed from a checkpoint's ``args.json``, by SWIFT's rules for ``load_args``.

        Reads RaySwift's and ms-swift's files; unknown keys and values this version cannot use are passed over.
        Returns new arguments (or these, with ``--load_args false``).
        """
        if not getattr(self, "load_args", True):
            return self
        specs = specs_of(type(self))
        wanted = {name: True for name in _FORCED} | {name: not self.is_set(name) for name in _RESTORED}
        if getattr(self, "load_data_args", False):
            wanted |= {name: name not in self.given for name, spec in specs.items() if spec.topic == "Dataset"}
        result, restored = copy.copy(self), set(self.restored)
        for name, value in _readable(specs, saved).items():
            if name in _RUN_CODE:
                if value and not self.is_set(name):
                    logger.warning(
                        "the checkpoint was made with --%s, which runs code and so is not taken from it; "
                        "give the flag if you trust it",
                        name,
                    )
            elif wanted.get(name):
                setattr(result, name, value)
                restored.add(name)
        result.restored = frozenset(restored)
        return result.resolved()

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{k}={v!r}' for k, v in self.to_dict().items())})"


def _absolute(value: str) -> str:
    """A path, with the ``:SUBSET`` and ``#ROWS`` of a dataset, as an absolute one where there is such a file."""
    name, rest = value, ""
    for mark in ("#", ":", ""):
        if os.path.exists(path := os.path.expanduser(name)):
            return os.path.abspath(path) + rest
        if mark and mark in name:
            name, _, end = name.rpartition(mark)
            rest = f"{mark}{end}{rest}"
    return value


def deciding_settings(args: Arguments, what: str = "answers") -> dict[str, Any]:
    """The settings that decide what a command answers, or its ``scores``: runs that agree in them are the same run."""
    settings = {name: getattr(args, name) for name, spec in specs_of(type(args)).items() if spec.decides == what}
    return {name: value for name, value in settings.items() if value is not None or name not in _LATER}


def _readable(specs: dict[str, Spec], saved: dict[str, Any]) -> dict[str, Any]:
    """What of a saved ``args.json`` these flags can take, under canonical names."""
    names = {alias: spec.name for spec in specs.values() for alias in (*spec.aliases, spec.name)}
    values: dict[str, Any] = {}
    for key, raw in saved.items():
        spec = specs.get(names.get(key, ""))
        if spec is None or is_unset(spec, raw) or raw in (REDACTED, []):
            continue
        try:
            values[spec.name] = convert(spec, raw)
        except ValueError as error:
            logger.warning("%s of the checkpoint is not used: %s", ARGS_FILE, error)
    return values


def read_saved_arguments(checkpoint_dir: str | os.PathLike[str]) -> dict[str, Any] | None:
    """The ``args.json`` of a local checkpoint folder, or of the run directory above a ``checkpoint-N``.

    None if there is none. Raises UserError if the file is not JSON.
    """
    folder = os.path.abspath(os.fspath(checkpoint_dir))
    folders = [folder]
    if os.path.basename(folder).startswith("checkpoint-"):
        folders.append(os.path.dirname(folder))
    for path in (os.path.join(name, ARGS_FILE) for name in folders):
        if os.path.isfile(path):
            try:
                with open(path, encoding="utf-8") as file:
                    saved = parse_json(file.read())
            except (OSError, ValueError) as error:
                raise UserError(
                    f"{path}: cannot read the saved arguments ({error}); --load_args false skips it"
                ) from None
            if not isinstance(saved, dict):
                raise UserError(f"{path}: expected a JSON object; --load_args false skips it")
            return saved
    return None

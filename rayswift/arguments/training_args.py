"""The fields of ``transformers.TrainingArguments``, readable without importing Transformers.

``training_args.json`` beside this file is generated from the installed Transformers by
``python -m rayswift.arguments.training_args``; a test holds the two in step.
"""

from __future__ import annotations

import functools
import json
import os
import re
from typing import Any

from rayswift.arguments.fields import Spec

DATA_FILE = os.path.join(os.path.dirname(__file__), "training_args.json")
TOPIC = "Further fields of transformers.TrainingArguments"
_LOADER, _EVALUATION = (
    "RaySwift's own loader feeds the trainer",
    "RaySwift evaluates by itself: loss and token accuracy",
)
_PUSHED = "training pushes nothing; rayswift export --push_to_hub true does"
_TRACKED = {"report_to!=wandb|swanlab|all": "only with --report_to wandb or swanlab"}
_LOG = "LOG_LEVEL in the environment says what is logged"
#: Where a field that RaySwift does not declare itself changes nothing, see `rayswift.arguments.effects`.
_NO_EFFECT: dict[str, str | dict[str, str]] = {
    **dict.fromkeys(
        ("dataloader_drop_last", "dataloader_in_order", "dataloader_multiprocessing_context",
         "dataloader_persistent_workers", "dataloader_pin_memory", "dataloader_prefetch_factor"), _LOADER,
    ),
    **dict.fromkeys(
        ("prediction_loss_only", "eval_do_concat_batches", "eval_use_gather_object", "eval_accumulation_steps",
         "include_for_metrics", "batch_eval_metrics", "bf16_full_eval", "fp16_full_eval"), _EVALUATION,
    ),
    **dict.fromkeys(("log_level", "log_level_replica", "log_on_each_node"), _LOG),
    "ddp_backend": "Ray Train starts the process group",
    **dict.fromkeys(
        ("hub_private_repo", "hub_model_id", "hub_strategy", "hub_always_push", "hub_revision"), _PUSHED
    ),
    "run_name": _TRACKED,
    "project": _TRACKED,
    **dict.fromkeys(
        ("trackio_space_id", "trackio_bucket_id", "trackio_static_space_id"), "there is no Trackio here"
    ),
    "average_tokens_across_devices": {"command=rlhf": "every pair of a step counts the same"},
    "label_smoothing_factor": {"command=rlhf": "pairs have --label_smoothing"},
    "fsdp_config": {"fsdp=none": "only with --fsdp"},
    "auto_find_batch_size": "the batch is planned before the start",
    "disable_tqdm": "the bar is the command's own",
    "label_names": "the template makes the labels",
    "length_column_name": "lengths are measured",
    "liger_kernel_config": {"use_liger_kernel!=true": "only with --use_liger_kernel true"},
    "ignore_data_skip": {"resume_from_checkpoint=none": "only with --resume_from_checkpoint"},
    "optim_target_modules": {
        "optim=adamw_torch|adamw_torch_fused": "only with the galore and apollo optimisers of --optim",
    },
    "restore_callback_states_from_checkpoint": "no callback here has a state",
    "logging_nan_inf_filter": "--on_nan says what happens to such a step",
    "skip_memory_metrics": "each row of the log has the memory",
}  # fmt: skip
# Ray decides these.
_NOT_FLAGS = frozenset({"local_rank", "do_train", "do_eval", "do_predict", "parallelism_config"})


@functools.cache
def _load() -> dict[str, Any]:
    with open(DATA_FILE, encoding="utf-8") as file:
        fields: dict[str, Any] = json.load(file)["fields"]
    return fields


def choices_of(name: str) -> tuple[str, ...]:
    """The values Transformers lists for a field, empty where any will do."""
    return tuple(_load().get(name, {}).get("choices", ()))


def passthrough_specs(declared: set[str]) -> dict[str, Spec]:
    """A flag for every field that the arguments class does not declare itself; they land in ``training_args``."""
    return {
        name: Spec(
            name=name, kind=field["type"], default=field["default"], help="as in Transformers", topic=TOPIC,
            choices=choices_of(name), no_effect=_NO_EFFECT.get(name, ""),
        )
        for name, field in _load().items()
        if name not in declared and name not in _NOT_FLAGS
    }  # fmt: skip


def generate() -> dict[str, Any]:
    """Describe the installed ``transformers.TrainingArguments``: name, type, default and choices of each field."""
    import dataclasses
    import enum
    import typing

    import transformers

    hints = typing.get_type_hints(transformers.TrainingArguments)
    fields: dict[str, Any] = {}
    for declared in dataclasses.fields(transformers.TrainingArguments):
        default = declared.default
        if default is dataclasses.MISSING:
            default = declared.default_factory() if declared.default_factory is not dataclasses.MISSING else None
        entry: dict[str, Any] = {"type": _kind(hints[declared.name]), "default": default}
        for option in typing.get_args(hints[declared.name]) or (hints[declared.name],):
            if isinstance(option, type) and issubclass(option, enum.Enum) and entry["type"] == "str":
                entry["choices"] = [member.value for member in option]
        fields[declared.name] = entry
    return {"transformers_version": transformers.__version__, "fields": fields}


def _kind(hint: Any) -> str:
    """The kind of `Spec` that can hold a type hint; the widest one where there are several."""
    text = re.sub(r"\btyping\.", "", str(hint))
    for pattern, kind in (
        (r"\bdict\b", "dict[str, Any]"),
        (r"\blist\[str\]", "list[str]"),
        (r"\bstr\b", "str"),
        (r"\blist\[", "list[str]"),
        (r"\bfloat\b", "int | float"),
        (r"\bint\b", "int"),
        (r"\bbool\b", "bool"),
    ):
        if re.search(pattern, text):
            return kind
    return "str"


def main() -> None:
    """Write ``training_args.json`` anew."""
    content = generate()
    lines = [f"  {json.dumps(name)}: {json.dumps(field)}" for name, field in content["fields"].items()]
    with open(DATA_FILE, "w", encoding="utf-8") as file:
        file.write(f'{{\n "transformers_version": "{content["transformers_version"]}",\n "fields": {{\n')
        file.write(",\n".join(lines) + "\n }\n}\n")


if __name__ == "__main__":
    main()

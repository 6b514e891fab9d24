"""A saved adapter as it lies in its folder, perhaps a stranger's: its configuration, the names of its weights."""

from __future__ import annotations

import math
import re
from itertools import pairwise
from pathlib import Path
from typing import Any

from rayswift.errors import UserError
from rayswift.files import parse_json
from rayswift.modeling.adapter_kinds import has_no_base
from rayswift.modeling.loading import read_safetensors_header

ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def check_adapter(adapter_dir: str) -> list[str]:
    """Return the tensor names of the adapter in ``adapter_dir``; UserError when it is none or incomplete."""
    folder = Path(adapter_dir)
    if not folder.is_dir():
        raise UserError(f"--adapters {adapter_dir}: no such folder; give a checkpoint-N folder of a run")
    config = read_adapter_config(adapter_dir)
    if "peft_type" not in config:
        raise UserError(f"{folder / ADAPTER_CONFIG}: not a PEFT configuration (no peft_type)")
    if problem := has_no_base(config):
        raise UserError(f"--adapters {adapter_dir}: {problem}")
    weights = folder / ADAPTER_WEIGHTS
    if not weights.is_file():
        found = (
            "only pickle weights (adapter_model.bin), which can run code when loaded"
            if (folder / "adapter_model.bin").is_file()
            else "no weights"
        )
        raise UserError(f"--adapters {adapter_dir}: {found}; {ADAPTER_WEIGHTS} is needed")
    return list(read_safetensors_header(weights))


def read_adapter_config(adapter_dir: str) -> dict[str, Any]:
    """The ``adapter_config.json`` of a folder. UserError when there is none, or it is no object."""
    path = Path(adapter_dir) / ADAPTER_CONFIG
    try:
        config = parse_json(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        full = path.with_name("config.json").is_file()
        mend = "it is a full model: give it as --model" if full else "give a checkpoint-N folder"
        raise UserError(f"--adapters {adapter_dir}: no {ADAPTER_CONFIG} in it; {mend}") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({error})") from None
    if not isinstance(config, dict):
        raise UserError(f"{path}: not a PEFT configuration (no peft_type)")
    _check_patterns(path, config)
    return config


#: Characters of a module's name, and steps over all patterns for one name: a second for a large model.
_NAME_LENGTH, _MOST_STEPS = 60, 200_000


def _check_patterns(path: Path, config: dict[str, Any]) -> None:
    """Raises UserError for regular expressions that could take for ever: PEFT tries a stranger's on every module."""
    steps = 0.0
    for name in ("rank_pattern", "alpha_pattern", "modules_to_save", "layers_pattern", "target_modules",
                 "exclude_modules"):  # fmt: skip
        given = config.get(name)
        if isinstance(given, list) and name in ("target_modules", "exclude_modules"):
            continue  # names, compared as they are
        for pattern in [given] if isinstance(given, str) else given if isinstance(given, (list, dict)) else []:
            # To the keys PEFT adds "whatever stands before".
            steps += _most_steps(str(pattern), 0 if isinstance(given, str) else 1)
            if steps > _MOST_STEPS:
                raise UserError(f"{path}: {name} has patterns that may take for ever ({str(pattern)[:60]!r}); "
                                "write them as names, or with fewer * + ? and |")  # fmt: skip


def _most_steps(pattern: str, repeats: int) -> float:
    """At most so many steps does a pattern take on a name, for which ``repeats`` more parts of any length are counted;
    endless where a group is repeated, or flags change what the pattern says."""
    if re.search(r"\(\?[aiLmsux-]", pattern):
        return math.inf
    # Of names none of which begins another (q_proj|k_proj) one at most fits: they are as good as one.
    bare = re.sub(r"\((?:\?:)?((?:[\w-]|\\\W)+(?:\|(?:[\w-]|\\\W)+)*)\)", _one_of_names, pattern)
    bare = re.sub(r"\\.|\[\^?\]?[^\]]*\]", "x", bare, flags=re.DOTALL).replace("(?", "(")
    if re.search(r"\)[*+{]", bare):
        return math.inf
    repeats += len(re.findall(r"[*+?}][?+]?", bare))
    groups, choices = bare.count("(") or 1, bare.count("|")
    ways = (choices / groups + 1) ** min(groups, choices)
    return ways * _NAME_LENGTH**repeats / math.factorial(repeats) if repeats < 10 else math.inf


def _one_of_names(found: re.Match[str]) -> str:
    names = sorted(found[1].split("|"))
    return found[0] if any(other.startswith(name) for name, other in pairwise(names)) else "x"


def lora_rank(adapter_dir: str) -> int:
    """The rank of an adapter: the largest of its layers. UserError when its configuration has none."""
    config = read_adapter_config(adapter_dir)
    try:
        return max([int(config.get("r") or 0), *map(int, (config.get("rank_pattern") or {}).values())])
    except (AttributeError, TypeError, ValueError):
        path = Path(adapter_dir) / ADAPTER_CONFIG
        raise UserError(f"{path}: r and the values of rank_pattern are whole numbers") from None


def base_model_of(adapter_dir: str) -> str:
    """The model that PEFT noted in an adapter (``base_model_name_or_path``): a folder or a hub id.

    Raises:
        UserError: it notes none, or cannot be read.
    """
    model = read_adapter_config(adapter_dir).get("base_model_name_or_path")
    if not model:
        raise UserError(f"--adapters {adapter_dir}: does not say which model it belongs to; add --model")
    return str(model)

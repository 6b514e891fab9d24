"""More positions than a model was made with: ``--rope_scaling`` and ``--max_model_len``."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from rayswift.errors import UserError

#: Ways of scaling that Transformers' configuration says the original length of, beside the factor.
_WITH_ORIGINAL = ("yarn", "longrope", "llama3")


def changed_positions(
    config: Mapping[str, Any], rope_scaling: str | Mapping[str, Any] | None, max_model_len: int | None
) -> dict[str, Any]:
    """What changes in a ``config.json``: ``rope_parameters`` and ``max_position_embeddings``, as Transformers 5 has
    them; empty where neither is given.

    The factor is the one given, else what reaches ``max_model_len`` from the model's own length.

    Raises:
        UserError: the model has no such positions, or neither factor nor length says how far they go.
    """
    if rope_scaling is None:
        return {} if max_model_len is None else {"max_position_embeddings": max_model_len}
    own = config.get("rope_parameters") or config.get("rope_scaling") or {}
    length = config.get("max_position_embeddings")
    theta = own.get("rope_theta", config.get("rope_theta"))
    if not length or any(isinstance(value, Mapping) for value in own.values()):
        raise UserError("--rope_scaling: this model's config.json has no positions of one kind to scale")
    wanted: dict[str, Any] = {"rope_type": rope_scaling} if isinstance(rope_scaling, str) else dict(rope_scaling)
    wanted["rope_type"] = kind = str(wanted.pop("type", None) or wanted["rope_type"])
    original = wanted.pop("original_max_position_embeddings", None) or own.get("original_max_position_embeddings")
    original = int(original or length)
    if not wanted.get("factor"):
        if max_model_len is None:
            raise UserError("--rope_scaling: how far? Add --max_model_len, or give JSON with a factor")
        wanted["factor"] = max(float(math.ceil(max_model_len / original)), 1.0)
    if kind in _WITH_ORIGINAL:
        wanted["original_max_position_embeddings"] = original
    kept = {name: own[name] for name in ("partial_rotary_factor",) if name in own}
    kept |= {} if theta is None else {"rope_theta": theta}
    reached = max_model_len or int(original * float(wanted["factor"]))
    # Transformers' dynamic scaling begins beyond `max_position_embeddings`, which so stays what it was.
    return {
        "rope_parameters": kept | wanted,
        "max_position_embeddings": original if kind == "dynamic" else reached,
    }


def with_positions(config: Mapping[str, Any], model_kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Keywords of ``from_pretrained``, ``rope_scaling`` and ``max_model_len`` among them as what they change."""
    rest = dict(model_kwargs)
    return rest | changed_positions(config, rest.pop("rope_scaling", None), rest.pop("max_model_len", None))


def longest(config: Mapping[str, Any], given: Mapping[str, Any]) -> int | None:
    """Tokens that a model has positions for, ``rope_scaling`` and ``max_model_len`` among ``given``."""
    if given.get("max_model_len"):
        return int(given["max_model_len"])
    changed = changed_positions(config, given.get("rope_scaling"), None)
    length = changed.get("max_position_embeddings") or config.get("max_position_embeddings")
    if length and changed.get("rope_parameters", {}).get("rope_type") == "dynamic":
        return int(length * changed["rope_parameters"]["factor"])
    return length or (config.get("text_config") or {}).get("max_position_embeddings")

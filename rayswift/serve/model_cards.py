"""What ``/v1/models`` lists: a card for a model and for each of its adapters, with the fields of vLLM's."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any


def model_cards(
    model: str,
    adapters: Iterable[str],
    *,
    created: int,
    owned_by: str,
    max_model_len: int | None,
    fingerprints: Mapping[str, str] | None = None,
) -> list[dict[str, Any]]:
    """The model's card, then those of its adapters.

    ``root`` is the name of the model that answers, not its folder: clients need not know where files lie.
    ``max_model_len``: the longest prompt and answer in tokens; None when no replica runs that could say.
    ``fingerprints``: what tells the weights behind a name from others; a card has its own, where it is known.
    """

    known = fingerprints or {}

    def card(name: str, parent: str | None) -> dict[str, Any]:
        permission = {
            "id": f"modelperm-{name}", "object": "model_permission", "created": created, "allow_create_engine": False,
            "allow_sampling": True, "allow_logprobs": True, "allow_search_indices": False, "allow_view": True,
            "allow_fine_tuning": False, "organization": "*", "group": None, "is_blocking": False,
        }  # fmt: skip
        return {
            "id": name, "object": "model", "created": created, "owned_by": owned_by, "root": model, "parent": parent,
            "max_model_len": max_model_len, "permission": [permission],
            **({"fingerprint": known[name]} if name in known else {}),
        }  # fmt: skip

    return [card(model, None), *(card(name, model) for name in adapters)]

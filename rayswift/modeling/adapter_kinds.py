"""What an adapter's configuration says about where it can be used: on which base, beside which engine, for training."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

#: PEFT's initialisations that take the adapter's first values off the base's weights. From the base alone PEFT finds
#: those of the first list again; of the others (drawn at random, or found with data) nothing does.
_FOUND_AGAIN, _LOST = ("pissa", "olora", "loftq", "kasa"), ("pissa_niter_", "corda", "lora_ga")
#: Fields of a LoRA's configuration that mean something only PEFT's own layers compute.
_BEYOND_LORA = {
    "use_dora": "DoRA", "modules_to_save": "whole layers (modules_to_save)", "lora_bias": "biases (lora_bias)",
    "target_parameters": "parameters (target_parameters)",
    "trainable_token_indices": "trained tokens (trainable_token_indices)", "layer_replication": "replicated layers",
    "alora_invocation_tokens": "invocation tokens (aLoRA)", "use_qalora": "QALoRA", "use_bdlora": "BD-LoRA",
    "arrow_config": "Arrow", "monteclora_config": "MonteCLoRA", "velora_config": "VeLoRA", "kasa_config": "KaSA",
}  # fmt: skip


def changes_base(config: Mapping[str, Any]) -> str | None:
    """The initialisation of an adapter that belongs to other base weights than the model's; None for all others."""
    way = str(config.get("init_lora_weights")).lower()
    if config.get("kasa_config"):
        return "kasa"
    return way if way in _FOUND_AGAIN or way.startswith(_LOST) else None


def has_no_base(config: Mapping[str, Any]) -> str | None:
    """Why there is no model that an adapter fits, with the mend; None for all others."""
    way = changes_base(config)
    if way is None or way in _FOUND_AGAIN:
        return None
    return (
        f"was saved without the part of the base's weights that it began as (init_lora_weights {way}), so no model "
        "fits it; save it again with PEFT's path_initial_model_for_weight_conversion"
    )


def not_trainable(config: Mapping[str, Any], rlhf: bool = False) -> str | None:
    """Why training cannot begin with an adapter, with the mend; None where it can."""
    if config.get("peft_type") == "ADALORA":
        return "has chosen its ranks already (AdaLoRA); merge it first and train the merged model"
    if way := changes_base(config):
        return (
            f"belongs to other weights than the model's (init_lora_weights {way}); merge it first (rayswift export "
            "--merge_lora true) and train the merged model"
        )
    if rlhf and config.get("bias") not in (None, "none"):
        return "trains biases (bias), which the reference of rlhf would get too; merge it first"
    return None


def only_merged(config: Mapping[str, Any], tensors: Iterable[str] = ()) -> str | None:
    """Why an adapter can be served merged only, with the mend; None where engines apply it beside its base.

    Args:
        config: of ``adapter_config.json``.
        tensors: names of its weights.
    """
    merge = "merge it with rayswift export --merge_lora true"
    if config.get("peft_type") != "LORA":
        return f"is {config.get('peft_type')}, only LoRA is served; {merge}"
    if way := changes_base(config):
        return f"changes the base it is served beside (init_lora_weights {way}); {merge}"
    parts = [part for name, part in _BEYOND_LORA.items() if config.get(name)]
    if config.get("bias") not in (None, "none"):
        parts.append(f"biases (bias {config['bias']})")
    if not parts and any(".lora_A." not in name and ".lora_B." not in name for name in tensors):
        parts.append("embeddings or other whole weights")
    return f"has {', '.join(parts)}; {merge}" if parts else None

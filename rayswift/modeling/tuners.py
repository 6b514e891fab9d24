"""New adapters of every kind that ``--train_type`` names and PEFT has."""

from __future__ import annotations

import re
from typing import Any

from rayswift.errors import UserError, one_line
from rayswift.modeling.adapters import add_lora, find_modules_to_save, find_targets, put_on

#: Where linear layers are the feed-forward part, of which IA3 scales what goes in.
_FEED_FORWARD = r".*\.(mlp|feed_forward|ffn|fc|experts|block_sparse_moe)\..*"


def add_tuner(model: Any, args: Any, max_steps: int) -> Any:
    """Put a new adapter on ``model`` and return the ``PeftModel``; the adapter alone is trainable.

    Args:
        args: the command's arguments.
        max_steps: steps of the run, over which AdaLoRA lowers its ranks.

    Raises:
        UserError: a target that matches no layer, settings that do not fit the model or each other.
    """
    if args.train_type == "lora":
        return add_lora(model, args)
    try:
        config = _config(model, args, max_steps)
    except (ValueError, TypeError) as error:
        raise UserError(f"--train_type {args.train_type}: {one_line(error)}") from error
    try:
        return put_on(model, config, args.lora_dtype)
    except (RuntimeError, AssertionError) as error:  # blocks or ranks that do not divide a layer
        raise UserError(f"--train_type {args.train_type} is not for this model: {one_line(error)}") from error


def _config(model: Any, args: Any, max_steps: int) -> Any:
    import peft

    shared: dict[str, Any] = {
        "target_modules": find_targets(model, args.target_modules, args.target_regex),
        "modules_to_save": find_modules_to_save(model, args.modules_to_save) or None,
        "task_type": "CAUSAL_LM",
    }
    match args.train_type:
        case "adalora":
            if args.adalora_tinit + args.adalora_tfinal >= max_steps:
                raise UserError(
                    f"--adalora_tinit {args.adalora_tinit} and --adalora_tfinal {args.adalora_tfinal} leave none "
                    f"of the run's {max_steps} steps to lower ranks in"
                )
            return peft.AdaLoraConfig(
                init_r=args.adalora_init_r, target_r=args.adalora_target_r, tinit=args.adalora_tinit,
                tfinal=args.adalora_tfinal, deltaT=args.adalora_deltaT, beta1=args.adalora_beta1,
                beta2=args.adalora_beta2, orth_reg_weight=args.adalora_orth_reg_weight, total_step=max_steps,
                lora_alpha=args.lora_alpha, lora_dropout=args.lora_dropout, bias=args.lora_bias,
                init_lora_weights=args.init_weights == "true", **shared,
            )  # fmt: skip
        case "boft":
            return peft.BOFTConfig(
                boft_block_size=args.boft_block_size, boft_block_num=args.boft_block_num,
                boft_n_butterfly_factor=args.boft_n_butterfly_factor, boft_dropout=args.boft_dropout, **shared,
            )  # fmt: skip
        case "bone":  # MiSS is what PEFT's Bone became
            start = {"true": True, "false": False}.get(args.init_weights, args.init_weights)
            return peft.MissConfig(r=args.reft_rank, init_weights=start, **shared)
        case "fourierft":
            return peft.FourierFTConfig(n_frequency=args.fourier_n_frequency, scaling=args.fourier_scaling, **shared)
        case "ia3":
            return peft.IA3Config(feedforward_modules=_feed_forward(model, shared["target_modules"]), **shared)
        case "vera":
            return peft.VeraConfig(
                r=args.vera_rank, projection_prng_key=args.vera_projection_prng_key, vera_dropout=args.vera_dropout,
                d_initial=args.vera_d_initial, **shared,
            )  # fmt: skip
    raise AssertionError(args.train_type)


def _feed_forward(model: Any, targets: list[str] | str) -> list[str] | str:
    """Which of IA3's targets are feed-forward layers, as PEFT takes it: names of a list, else an expression."""
    if isinstance(targets, str):
        return _FEED_FORWARD
    names = [name for name, _ in model.named_modules() if re.fullmatch(_FEED_FORWARD, name)]
    return [target for target in targets if any(name.endswith("." + target) for name in names)]

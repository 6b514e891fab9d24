"""RaySwift's arguments to ``transformers.TrainingArguments``."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from rayswift.arguments.training import DEEPSPEED_PRESETS
from rayswift.train.deepspeed import deepspeed_config

if TYPE_CHECKING:
    from transformers import TrainingArguments

    from rayswift.train.schedule import StepSchedule

#: Fields with the same name and meaning on both sides.
_SAME = (
    "per_device_eval_batch_size", "lr_scheduler_type", "weight_decay", "adam_beta1",
    "adam_beta2", "adam_epsilon", "max_grad_norm", "optim", "seed", "save_only_model", "logging_first_step",
    "metric_for_best_model", "greater_is_better", "eval_on_start", "num_train_epochs",
)  # fmt: skip
#: Further fields that are not passed on: these things are not the Trainer's here.
_OURS = ("use_cpu", "dataloader_", "hub_", "push_to_hub", "fsdp", "logging_nan_inf_filter")


def hf_training_arguments(
    args: Any,
    schedule: StepSchedule,
    world_size: int,
    output_dir: str,
    dtype: str,
    use_gpu: bool,
    has_val: bool,
    gradient_checkpointing: bool = False,
) -> TrainingArguments:
    """The Trainer's arguments for one worker.

    Args:
        args: the command's arguments.
        schedule: the run's steps; ``epoch`` strategies become steps here, because the Trainer sees one long pass.
        world_size: workers of this attempt.
        output_dir: where the Trainer writes checkpoint folders (on this machine).
        dtype: ``bfloat16``, ``float16`` or ``float32``: float32 means float32, with no mixed precision.
        use_gpu: whether workers have accelerators.
        has_val: whether there are validation rows.
        gradient_checkpointing: whether activations are computed twice.
    """
    save_strategy, save_steps = strategy_steps(args.save_strategy, args.save_steps, schedule)
    wanted = eval_strategy(args) if has_val else "no"
    evaluate, eval_steps = strategy_steps(wanted, args.eval_steps or args.save_steps, schedule)
    deepspeed = deepspeed_config(args.deepspeed)
    if use_gpu and deepspeed and isinstance(args.deepspeed, str) and args.deepspeed in DEEPSPEED_PRESETS:
        deepspeed["zero_optimization"]["overlap_comm"] = True  # SWIFT's presets leave GPUs waiting for each other
    if deepspeed and args.zero_hpz_partition_size:
        deepspeed["zero_optimization"]["zero_hpz_partition_size"] = args.zero_hpz_partition_size
    values: dict[str, Any] = {name: getattr(args, name) for name in _SAME}
    values |= {
        "output_dir": output_dir,
        "learning_rate": args.learning_rate,
        "lr_scheduler_kwargs": args.lr_scheduler_kwargs or None,
        # Transformers 5 reads a fraction in warmup_steps as a ratio, but 1.0 as one step.
        "warmup_steps": args.warmup_steps or math.ceil(args.warmup_ratio * schedule.max_steps),
        "max_steps": schedule.max_steps,
        "per_device_train_batch_size": schedule.per_device_batch_size,
        "gradient_accumulation_steps": schedule.accumulation(world_size),
        "gradient_checkpointing": gradient_checkpointing,
        # What PyTorch calls reentrant is a little faster and as exact, and goes wrong with wrapped models and with
        # losses of what lies between layers.
        "gradient_checkpointing_kwargs": args.gradient_checkpointing_kwargs
        or {"use_reentrant": world_size == 1 and not deepspeed and not args.router_aux_loss_coef},
        "bf16": dtype == "bfloat16",
        "fp16": dtype == "float16",
        "use_cpu": not use_gpu,
        "save_strategy": save_strategy,
        "save_steps": save_steps,
        "eval_strategy": evaluate,
        "eval_steps": eval_steps,
        "logging_steps": args.logging_steps,
        "deepspeed": deepspeed,
        "ddp_find_unused_parameters": bool(args.lisa_activated_layers and args.train_type == "full"),
        # It would wait for the device at every forward pass; --on_nan looks once a step.
        "logging_nan_inf_filter": False,
        # The loader starts at the step to resume at: there is nothing to skip.
        "ignore_data_skip": True,
        "report_to": "none",
        "disable_tqdm": True,
        "log_level": "error",
    }
    values |= {name: value for name, value in args.training_args.items() if not name.startswith(_OURS)}
    if not deepspeed and not args.is_set("optim") and args.optim == "adamw_torch":
        values["optim"] = "adamw_torch_fused"  # the same to 1e-8 in one pass over the weights: a fifth of the time
    if args.use_galore:
        settings = {"rank": args.galore_rank, "update_proj_gap": args.galore_update_proj_gap,
                    "scale": args.galore_scale, "proj_type": args.galore_proj_type}  # fmt: skip
        values["optim_args"] = ",".join(f"{name}={value}" for name, value in settings.items())
        values["optim_target_modules"] = args.galore_target_modules or "all-linear"
    if args.training_args.get("logging_strategy") == "epoch":
        values |= {"logging_strategy": "steps", "logging_steps": schedule.steps_per_epoch or schedule.max_steps}
    if wanted == "epoch" and "eval_delay" in values:
        values["eval_delay"] *= schedule.steps_per_epoch or schedule.max_steps
    if "include_num_input_tokens_seen" in values:
        tokens = str(values["include_num_input_tokens_seen"]).lower()
        values["include_num_input_tokens_seen"] = {"true": "all", "false": "no"}.get(tokens, tokens)
    if args.command == "rlhf":
        from trl import DPOConfig

        return DPOConfig(**values, **_preference_values(args))
    from transformers import TrainingArguments

    return TrainingArguments(**values)


def _preference_values(args: Any) -> dict[str, Any]:
    """What ``trl.DPOConfig`` has beyond the Trainer's arguments. TRL 1.x has no ``rpo_alpha``: it is a second loss."""
    losses, weights = list(args.loss_type or ["sigmoid"]), args.loss_weights
    if args.rpo_alpha is not None:
        losses, weights = [*losses, "sft"], [*(weights or [1.0] * len(losses)), args.rpo_alpha]
    return {
        "loss_type": losses,
        "loss_weights": weights,
        "beta": args.beta,
        "label_smoothing": args.label_smoothing,
        "ld_alpha": args.ld_alpha,
        "discopop_tau": args.discopop_tau,
        # Rows come encoded and within --max_length.
        "max_length": None,
    }


def best_is_last(args: Any, schedule: StepSchedule) -> str:
    """One line where no step before the last is both evaluated and saved, so that nothing but it can be the best."""
    save, save_steps = strategy_steps(args.save_strategy, args.save_steps, schedule)
    evaluate, eval_steps = strategy_steps(eval_strategy(args), args.eval_steps or args.save_steps, schedule)
    if save != "steps" or evaluate != "steps":
        return ""
    # Shares of the run, as in Transformers.
    every = [math.ceil(n * schedule.max_steps) if n < 1 else int(n) for n in (save_steps, eval_steps)]
    if every[0] >= schedule.max_steps or math.lcm(*every) < schedule.max_steps:
        return ""
    return (
        f"no step before the last is both evaluated (every {every[1]}) and saved (every {every[0]}), so the last "
        "checkpoint will be the best; --save_steps should be a multiple of --eval_steps"
    )


def eval_strategy(args: Any) -> str:
    """When a run with validation rows evaluates, ``no``, ``steps`` or ``epoch``."""
    strategy = args.eval_strategy or args.save_strategy
    return "steps" if strategy == "best" else str(strategy)


def strategy_steps(strategy: str, steps: float, schedule: StepSchedule) -> tuple[str, float]:
    """``epoch`` as a number of steps; ``steps`` below 1 stay a share of the run, as in Transformers."""
    if strategy == "epoch":
        return "steps", schedule.steps_per_epoch or schedule.max_steps
    return str(strategy), min(steps, schedule.max_steps) if steps >= 1 else steps

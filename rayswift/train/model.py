"""The models of a run: found by the driver before anything is started, built by the workers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rayswift.errors import UserError, one_line
from rayswift.train.deepspeed import check_precision, deepspeed_config, zero_stage

if TYPE_CHECKING:
    from rayswift.train.config import PackedPlan

_ZERO_PRODUCT = ("true", "gaussian", "false")


def find_model(args: Any) -> str:
    """The local folder of ``--model``, downloaded if need be. A model that was made to read plain texts is trained on
    such (``args.use_chat_template``).

    Raises:
        UserError: it or ``--ref_model`` is not there, or has no weights; it has no such positions as ``--rope_scaling``
            asks for; or training cannot begin with ``--adapters``.
    """
    from rayswift.hub import resolve_model
    from rayswift.modeling.adapter_folder import check_adapter, read_adapter_config
    from rayswift.modeling.adapter_kinds import not_trainable
    from rayswift.modeling.loading import read_config, weight_files
    from rayswift.modeling.positions import with_positions
    from rayswift.modeling.task_models import settle_layout

    model_dir = resolve_model(args.model, revision=args.model_revision, use_hf=args.use_hf, token=args.hub_token)
    weight_files(model_dir)
    with_positions(read_config(model_dir), args.positions)
    for adapter in args.adapters[:1]:
        check_adapter(adapter)
        if problem := not_trainable(read_adapter_config(adapter), rlhf=args.command == "rlhf"):
            raise UserError(f"--adapters {adapter}: {problem}")
    if getattr(args, "ref_model", None):
        try:
            weight_files(_reference_dir(args))
        except UserError as error:
            raise UserError(str(error).replace("--model ", "--ref_model ")) from None
    settle_layout(args, model_dir)
    return model_dir


def compute_dtype(args: Any, model_dir: str, use_gpu: bool) -> str:
    """``bfloat16``, ``float16`` or ``float32``: what workers compute in.

    Raises:
        UserError: ``--torch_dtype`` is not for this device, or ``--deepspeed`` means another one.
    """
    from rayswift.modeling.loading import resolve_dtype

    dtype = resolve_dtype(args.torch_dtype, model_dir, use_gpu)
    if dtype == "float16" and not use_gpu:
        raise UserError("--torch_dtype float16 trains on GPUs only; use bfloat16 or float32 on CPU")
    check_precision(deepspeed_config(args.deepspeed), dtype)
    return dtype


def build_model(
    args: Any,
    model_dir: str,
    dtype: str,
    packing: PackedPlan | None,
    resume: str | None = None,
    checkpointing: bool = False,
    max_steps: int = 1,
) -> Any:
    """The model to train, with its adapter if it gets one.

    Args:
        resume: the checkpoint that the run goes on from.
        checkpointing: whether its activations are computed twice.
        max_steps: steps of the run.
    """
    from rayswift.modeling.adapters import freeze_for_full, load_adapter
    from rayswift.train.compiled import check_float8, to_float8

    if args.fp8:
        check_float8()
    if packing is None:
        model = _load(args, model_dir, dtype, args.attn_impl)
    else:
        from rayswift.modeling.packed_rows import keep_rows_apart  # with it our attention gets known

        model = _load(args, model_dir, dtype, packing.attention)
        keep_rows_apart(model, packing.by_row)
    model.config.use_cache = False
    if args.train_type == "full":
        freeze_for_full(model, args)
        if args.task_type == "embedding":
            _freeze_unused_head(model)
        if args.fp8:
            to_float8(model)
    elif args.adapters:
        model = load_adapter(model, args.adapters[0], is_trainable=True)
    else:
        model = _with_new_adapter(model, args, resume, max_steps)
    if args.train_type != "full" and zero_stage(deepspeed_config(args.deepspeed)) != 3:
        from rayswift.train.fused_lora import fuse_lora

        fuse_lora(model)
    if _computes_here(args):
        from rayswift.train.fused_layers import fuse_layers

        fuse_layers(model)
    if checkpointing:
        # Frozen embeddings give inputs without gradients, and recomputed layers would then have none either.
        model.enable_input_require_grads()
    return model


def _computes_here(args: Any) -> bool:
    """Whether PyTorch's own operations for CPUs train the model, with all of its weights in this process."""
    import torch

    is_whole = zero_stage(deepspeed_config(args.deepspeed)) != 3
    return is_whole and not (torch.accelerator.is_available() or args.torch_compile)


def _freeze_unused_head(model: Any) -> None:
    """No vector depends on an output layer of its own: distributed training waits for every gradient."""
    head = model.get_output_embeddings()
    if head is not None and head.weight is not model.get_input_embeddings().weight:
        head.requires_grad_(False)


def _with_new_adapter(model: Any, args: Any, resume: str | None, max_steps: int) -> Any:
    """``model`` with a fresh adapter, of which is checked that it changes nothing.

    One that begins as a part of the base's weights has its first values as ``first_values`` and is saved as plain LoRA;
    going on, they are those of the checkpoint.
    """
    from rayswift.modeling.adapter_kinds import changes_base
    from rayswift.modeling.first_policy import check_first_policy, probe_layers
    from rayswift.modeling.part_of_base import first_values, read_plain, take_off
    from rayswift.modeling.tuners import add_tuner

    if args.train_type != "lora":
        return add_tuner(model, args, max_steps)
    way = changes_base({"init_lora_weights": args.init_weights})
    # `true` and `gaussian` leave B at zero; `false` is another model, as the user was told.
    before = probe_layers(model) if args.use_dora or args.init_weights.lower() not in _ZERO_PRODUCT else None
    model = add_tuner(model, args, max_steps)
    if way:
        model.first_values = read_plain(resume, args.lora_rank)[1] if resume else first_values(model, way)
        take_off(model, model.first_values)
    if before is not None:
        check_first_policy(model, before, args.init_weights)
    return model


def remarks(model: Any, args: Any) -> list[str]:
    """What is to be said about a model and the flags beside it, which only the built model shows."""
    from rayswift.modeling.adapters import expert_parameters

    lines = []
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    experts = expert_parameters(base)
    if experts and args.train_type != "full" and not args.adapters and not args.target_parameters:
        more = f"; --target_parameters {' '.join(experts)} trains them" if args.train_type == "lora" else ""
        lines.append(f"experts stay as they are: {', '.join(experts)} are no linear layers{more}")
    if args.experts_impl and not experts:
        lines.append("--experts_impl has no effect here: the model is no mixture of experts")
    if args.router_aux_loss_coef and not hasattr(base, "router_aux_loss_coef"):
        lines.append("--router_aux_loss_coef has no effect here: the model has no router that Transformers balances")
    return lines


def reference_model(args: Any, model_dir: str, dtype: str) -> Any:
    """The frozen model that full training is compared with: ``--ref_model``, else the one in ``model_dir``. None for
    adapters, which are switched off instead."""
    if args.train_type != "full":
        return None
    return _load(args, _reference_dir(args) if args.ref_model else model_dir, dtype, args.attn_impl)


def _reference_dir(args: Any) -> str:
    from rayswift.hub import resolve_model

    return resolve_model(args.ref_model, revision=args.ref_model_revision, use_hf=args.use_hf, token=args.hub_token)


def _load(args: Any, model_dir: str, dtype: str, attn_impl: str | None) -> Any:
    """A model as it is trained.

    Full training keeps float32 master weights: DeepSpeed makes its own from half-precision ones, without it the model
    is loaded in float32 and computes under autocast (bfloat16 weights, ``--pure_bf16``, lose updates smaller than 1/256
    of a weight).
    """
    from rayswift.modeling.loading import add_special_tokens, load_tokenizer
    from rayswift.modeling.task_models import load_task_model

    tokenizer = load_tokenizer(model_dir, trust_remote_code=args.trust_remote_code)
    model = load_task_model(
        model_dir,
        args.task_type,
        args.num_labels,
        args.problem_type,
        tokenizer,
        torch_dtype="float32" if args.train_type == "full" and not args.deepspeed and not args.pure_bf16 else dtype,
        attn_impl=attn_impl,
        trust_remote_code=args.trust_remote_code,
        model_kwargs={**args.model_kwargs, **_quantization(args, dtype)},
    )
    if args.new_special_tokens:
        add_special_tokens(model, tokenizer, args.new_special_tokens)
    return model


def _quantization(args: Any, dtype: str) -> dict[str, Any]:
    """How Transformers quantises a model while it loads it; empty where it does not."""
    settings = args.quantization(dtype)
    if settings is None:
        return {}
    from transformers import BitsAndBytesConfig, HqqConfig

    kinds = {"bnb": BitsAndBytesConfig, "hqq": HqqConfig}
    return {"quantization_config": kinds[settings.pop("quant_method")](**settings)}


def check_savable(model: Any, model_dir: str) -> None:
    """Refuse, before anything is trained, a model whose generation settings Transformers would not save with it."""
    from peft import PeftModel

    config = getattr(model, "generation_config", None)
    if config is None or isinstance(model, PeftModel):  # adapters are saved without
        return
    try:
        config.validate(strict=True)
    except ValueError as error:
        raise UserError(
            f"{model_dir}/generation_config.json: Transformers would refuse to save it with the model "
            f"({one_line(error, 600)}); mend it there before training (or delete the file)"
        ) from None

"""Make a model trainable: put LoRA on it, or freeze parts of it; put saved adapters on it; say how much trains."""

from __future__ import annotations

import contextlib
import logging
import re
from bisect import bisect
from collections.abc import Iterator
from itertools import accumulate
from typing import TYPE_CHECKING, Any

from rayswift.errors import UserError, one_line
from rayswift.modeling.adapter_folder import check_adapter, read_adapter_config
from rayswift.modeling.adapter_kinds import not_trainable, only_merged
from rayswift.modeling.task_models import is_classifier

if TYPE_CHECKING:
    import torch

logger = logging.getLogger("rayswift.modeling.adapters")

ALL_LINEAR, ALL_EMBEDDING, ALL_NORM = "all-linear", "all-embedding", "all-norm"  # SWIFT's shorthands


def add_lora(model: Any, args: Any) -> Any:
    """Put a LoRA on ``model`` as the tuner arguments say and return the ``PeftModel``.

    Reads ``lora_rank, lora_alpha, lora_dropout, lora_bias, lora_dtype, target_modules, target_regex,
    target_parameters, modules_to_save, use_rslora, use_dora, init_weights``. Only the adapter (and ``modules_to_save``,
    and the rows of new tokens) stays trainable. Adapter weights are float32 beside half-precision base weights unless
    ``--lora_dtype`` says otherwise.

    Raises:
        UserError: a target that matches no layer, a rank that no target layer can use, an unknown initialisation.
    """
    from peft import LoraConfig

    targets = find_targets(model, args.target_modules, args.target_regex)
    check_rank(model, targets, args.lora_rank)
    task = getattr(args, "task_type", "causal_lm")
    config = LoraConfig(
        # Of a model with a head of its own PEFT trains and saves that whole.
        task_type="SEQ_CLS" if is_classifier(task) else None if task == "embedding" else "CAUSAL_LM",
        r=args.lora_rank,
        lora_alpha=args.lora_alpha,
        lora_dropout=args.lora_dropout,
        bias=args.lora_bias,
        target_modules=targets,
        target_parameters=find_parameters(model, args.target_parameters) or None,
        modules_to_save=find_modules_to_save(model, args.modules_to_save) or None,
        trainable_token_indices=_new_rows(model, targets, args.modules_to_save),
        use_rslora=args.use_rslora,
        use_dora=args.use_dora,
        init_lora_weights=init_lora_weights(args.init_weights),
    )
    return put_on(model, config, args.lora_dtype)


def put_on(model: Any, config: Any, dtype: str | None) -> Any:
    """``model`` with a new adapter, as a ``PeftModel``; ``dtype``: that of the adapter, if not PEFT's.

    Raises:
        UserError: the adapter is not for this model.
    """
    import torch
    from peft import get_peft_model

    try:
        peft_model = get_peft_model(model, config)
    except (ValueError, TypeError, ImportError, NotImplementedError) as error:
        kind = config.peft_type.value
        raise UserError(
            f"{kind} cannot be put on {type(model).__name__} ({one_line(error)}); see --target_modules"
        ) from error
    if dtype is not None:
        for parameter in peft_model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.to(getattr(torch, dtype))
    logger.info("%s: %s", type(config).__name__, config)
    return peft_model


def _new_rows(model: Any, targets: list[str] | str, modules_to_save: list[str]) -> dict[str, list[int]] | None:
    """What PEFT trains of ``--new_special_tokens``: their rows in the embeddings, and in an output head of its own;
    not of layers that the adapter, or the user, trains whole."""
    ids = getattr(model, "new_token_ids", None)
    inputs, head = model.get_input_embeddings(), model.get_output_embeddings()
    layers = [inputs] if head is None or head.weight is inputs.weight else [inputs, head]
    names = {name.rpartition(".")[2] for name, module in model.named_modules() if any(module is one for one in layers)}
    whole = {*find_modules_to_save(model, modules_to_save), *(targets if isinstance(targets, list) else ())}
    return {name: list(ids) for name in sorted(names - whole)} or None if ids else None


def find_targets(model: Any, target_modules: list[str], target_regex: str | None) -> list[str] | str:
    """Resolve ``--target_modules`` (names, ``all-linear``, ``all-embedding``) or ``--target_regex`` against the model.

    Returns a sorted list of module names as PEFT matches them (the end of the dotted path), or the regular expression,
    which wins (as in SWIFT). UserError for a name or expression that matches nothing.
    """
    import torch

    names = [name for name, _ in model.named_modules() if name]
    if target_regex is not None:
        try:
            matched = any(re.fullmatch(target_regex, name) for name in names)
        except re.error as error:
            raise UserError(f"--target_regex {target_regex}: not a regular expression ({error})") from None
        if not matched:
            raise UserError(f"--target_regex {target_regex}: matches no layer; layers are {example_layers(model)}")
        return target_regex
    found: set[str] = set()
    for target in target_modules:
        if target == ALL_LINEAR:
            found |= linear_suffixes(model)
        elif target == ALL_EMBEDDING:
            found |= {name.rpartition(".")[2] for name, m in model.named_modules() if isinstance(m, torch.nn.Embedding)}
        elif any(name == target or name.endswith("." + target) for name in names):
            found.add(target)
        else:
            raise UserError(f"--target_modules {target}: the model has no such layer; it has {example_layers(model)}")
    if not found:
        raise UserError(f"--target_modules: names no layer; give {ALL_LINEAR} or some of {example_layers(model)}")
    return sorted(found)


def find_parameters(model: Any, target_parameters: list[str]) -> list[str]:
    """``--target_parameters``, each the end of a parameter's name; UserError for one that matches nothing."""
    names = [name for name, _ in model.named_parameters()]
    for wanted in target_parameters:
        if not any(name == wanted or name.endswith("." + wanted) for name in names):
            experts = ", ".join(expert_parameters(model)) or "none of experts"
            raise UserError(f"--target_parameters {wanted}: the model has no such parameter; it has {experts}")
    return list(target_parameters)


def expert_parameters(model: Any) -> list[str]:
    """Ends of the names of the parameters that hold the weights of several experts each, which are no linear layers:
    ``["mlp.experts.down_proj", "mlp.experts.gate_up_proj"]``."""
    ends = (name.split(".")[-3:] for name, parameter in model.named_parameters() if parameter.ndim == 3)
    return sorted({".".join(end) for end in ends if "experts" in end})


def linear_suffixes(model: Any) -> set[str]:
    """Last name parts of all linear layers but the output head (``{"q_proj", "k_proj", …}``)."""
    import torch
    from transformers.pytorch_utils import Conv1D

    head = model.get_output_embeddings()
    heads = {name for name, module in model.named_modules() if module is head} | {"score", "classifier"}
    return {
        name.rpartition(".")[2]
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear | Conv1D) and name not in heads and name.partition(".")[0] not in heads
    }


def example_layers(model: Any) -> str:
    """The names a user can give as targets, for error messages."""
    return ", ".join(sorted(linear_suffixes(model)))


def check_rank(model: Any, targets: list[str] | str, rank: int) -> None:
    """UserError when ``rank`` is below 1 or no target layer has that many rows and columns."""
    if rank < 1:
        raise UserError(f"--lora_rank {rank}: must be at least 1")
    limits = []
    for name, module in model.named_modules():
        rows, columns = getattr(module, "out_features", None), getattr(module, "in_features", None)
        if matches(name, targets) and isinstance(rows, int) and isinstance(columns, int):
            limits.append(min(rows, columns))
    if limits and rank > max(limits):
        raise UserError(f"--lora_rank {rank}: larger than any target layer; the largest allows {max(limits)}")


def matches(name: str, targets: list[str] | str) -> bool:
    """PEFT's rule for which modules are targets: the whole path for an expression, the end of it for names."""
    if isinstance(targets, str):
        return re.fullmatch(targets, name) is not None
    return any(name == target or name.endswith("." + target) for target in targets)


def find_modules_to_save(model: Any, modules_to_save: list[str]) -> list[str]:
    """Resolve ``--modules_to_save`` (names, ``all-embedding``, ``all-norm``); UserError for a name without a match."""
    import torch

    names = {name for name, _ in model.named_modules() if name}
    found: set[str] = set()
    for wanted in modules_to_save:
        if wanted == ALL_EMBEDDING:
            found |= {name for name, m in model.named_modules() if isinstance(m, torch.nn.Embedding)}
        elif wanted == ALL_NORM:
            found |= {name for name, m in model.named_modules() if type(m).__name__.lower().endswith("norm")}
        elif any(name == wanted or name.endswith("." + wanted) for name in names):
            found.add(wanted)
        else:
            raise UserError(f"--modules_to_save {wanted}: the model has no such module (try embed_tokens or lm_head)")
    return sorted(found)


def init_lora_weights(init_weights: str) -> Any:
    """``--init_weights`` as PEFT takes it; plain for those that :mod:`rayswift.modeling.part_of_base` begins. UserError
    for what needs more than the model to start from."""
    if init_weights.lower() in ("true", "false"):
        return init_weights.lower() == "true"
    if init_weights in ("pissa", "olora") or re.fullmatch(r"pissa_niter_\d+", init_weights):
        return True
    if init_weights in ("gaussian", "orthogonal"):
        return init_weights
    raise UserError(
        f"--init_weights {init_weights}: not built; choose true, false, gaussian, orthogonal, olora or pissa(_niter_N)"
    )


def freeze_for_full(model: Any, args: Any) -> None:
    """Choose what a full-parameter run trains, in SWIFT's order: ratio, then prefixes, then what stays trainable.

    ``--freeze_parameters_ratio`` freezes that share of all parameters from the input side; ``--freeze_parameters``
    freezes by name prefix; ``--trainable_parameters`` wins over both. UserError for a prefix that matches nothing and
    when nothing is left to train.
    """
    named = list(model.named_parameters())
    ratio = args.freeze_parameters_ratio
    if not 0 <= ratio <= 1:
        raise UserError(f"--freeze_parameters_ratio {ratio}: must be between 0 and 1")
    if ratio > 0:
        ends = list(accumulate(parameter_size(parameter) for _, parameter in named))
        for _, parameter in named[: bisect(ends, int(ends[-1] * ratio))]:
            parameter.requires_grad_(False)
    set_requires_grad(named, args.freeze_parameters, False, "--freeze_parameters")
    set_requires_grad(named, args.trainable_parameters, True, "--trainable_parameters")
    if not any(parameter.requires_grad for _, parameter in named):
        raise UserError("--freeze_parameters leaves nothing to train; name something in --trainable_parameters")


def set_requires_grad(named: list[tuple[str, Any]], prefixes: list[str], value: bool, flag: str) -> None:
    """Set ``requires_grad`` of every parameter whose name starts with one of ``prefixes``."""
    for prefix in prefixes:
        chosen = [parameter for name, parameter in named if name.startswith(prefix)]
        if not chosen:
            raise UserError(f"{flag} {prefix}: no parameter starts with it; they start like {named[0][0]}")
        for parameter in chosen:
            parameter.requires_grad_(value)


def load_adapter(model: Any, adapter_dir: str, *, is_trainable: bool = False) -> Any:
    """Put the adapter saved in ``adapter_dir`` on ``model`` and return the ``PeftModel``; safetensors only.

    Raises:
        UserError: no adapter there, pickle weights, a broken file, or an adapter of another base model.
    """
    from peft import PeftModel

    saved_keys = check_adapter(adapter_dir)
    if is_trainable and (problem := not_trainable(read_adapter_config(adapter_dir))):
        raise UserError(f"--adapters {adapter_dir}: {problem}")
    with _adapter_errors(adapter_dir):
        peft_model = PeftModel.from_pretrained(model, adapter_dir, is_trainable=is_trainable)
    _refuse_absent_weights(peft_model, "default", adapter_dir, saved_keys)
    return peft_model


def add_adapter(model: Any, adapter_dir: str, name: str) -> Any:
    """Load an adapter for inference beside those that ``model`` may have, as ``name``; returns the ``PeftModel``.

    The adapter is not made the active one. After an error the model is as it was.

    Raises:
        UserError: as :func:`load_adapter`, or it cannot be applied beside others (:func:`only_merged`).
    """
    from peft import PeftConfig, PeftModel, get_peft_model

    saved_keys = check_adapter(adapter_dir)
    if reason := only_merged(read_adapter_config(adapter_dir), saved_keys):
        raise UserError(f"--adapters {adapter_dir}: {reason}")
    is_first = not isinstance(model, PeftModel)
    with _adapter_errors(adapter_dir):
        config = PeftConfig.from_pretrained(adapter_dir)
        config.inference_mode = True
        peft_model = get_peft_model(model, config, adapter_name=name) if is_first else model
        try:
            peft_model.load_adapter(adapter_dir, adapter_name=name)
            _refuse_absent_weights(peft_model, name, adapter_dir, saved_keys)
        except Exception:
            if is_first:
                peft_model.unload()
            elif name in peft_model.peft_config:
                peft_model.delete_adapter(name)
            raise
    return peft_model.eval()


def remove_adapter(model: Any, name: str) -> Any:
    """Take an adapter off that :func:`add_adapter` put on; returns the model. Without the last one it is the base model
    again: a ``PeftModel`` that has none cannot compute."""
    if list(model.peft_config) == [name]:
        return model.unload()
    model.delete_adapter(name)
    return model


@contextlib.contextmanager
def _adapter_errors(adapter_dir: str) -> Iterator[None]:
    """What PEFT says about an adapter that does not fit, as the user's error."""
    try:
        yield
    except (ValueError, KeyError, TypeError, ImportError) as error:
        raise UserError(f"--adapters {adapter_dir}: cannot be loaded ({one_line(error)})") from error
    except RuntimeError as error:
        if "size mismatch" not in str(error):
            raise
        raise UserError(
            f"--adapters {adapter_dir}: was trained on another base model: {one_line(error, 200)}"
        ) from error


def _refuse_absent_weights(peft_model: Any, name: str, adapter_dir: str, saved_keys: list[str]) -> None:
    """PEFT would only warn, and go on with the untrained start values."""
    from peft import get_peft_model_state_dict

    absent = sorted(set(get_peft_model_state_dict(peft_model, adapter_name=name)) - set(saved_keys))
    if absent:
        raise UserError(f"--adapters {adapter_dir}: lacks {len(absent)} weights of this model, such as {absent[0]}")


def parameter_size(parameter: torch.Tensor) -> int:
    """Number of elements; of the whole parameter when ZeRO-3 has partitioned it (``ds_numel``)."""
    return int(getattr(parameter, "ds_numel", 0) or parameter.numel())


def parameter_info(model: Any) -> str:
    """SWIFT's line, e.g. ``PeftModelForCausalLM: 498.4319M Params (4.3991M Trainable [0.8826%]), 0.0000M Buffers.``"""
    total = sum(parameter_size(parameter) for parameter in model.parameters())
    trainable = sum(parameter_size(parameter) for parameter in model.parameters() if parameter.requires_grad)
    buffers = sum(buffer.numel() for buffer in model.buffers())
    return (
        f"{type(model).__name__}: {total / 1e6:.4f}M Params ({trainable / 1e6:.4f}M Trainable "
        f"[{100 * trainable / max(total, 1):.4f}%]), {buffers / 1e6:.4f}M Buffers."
    )

"""Whether a model keeps joined rows apart: tried on a small copy of it with random weights, before a run.

No list says which models do. The copy has the model's own layers, enough of them that each kind is there twice, fewer
heads and a smaller vocabulary; two rows are joined as in training and compared with each alone.
"""

from __future__ import annotations

import copy
import functools
import logging
import math
import re
import sys
from collections.abc import Iterable, Sequence
from typing import Any

import torch

from rayswift.data.tokens.table import TokenizedRow
from rayswift.errors import UserError, one_line
from rayswift.modeling.packed_rows import keep_rows_apart
from rayswift.train.collate import flatten, pad
from rayswift.train.config import PackedPlan

logger = logging.getLogger("rayswift.train")

LENGTHS = (13, 10)  # longer than the windows of the copy
_VOCABULARY = 128
_WINDOW = 4
_SHORTEST = 64  # a smaller number of a like name is something else
_EXPERTS = 32  # DeepSeek chooses 8 of 8 groups
_MOST_PARAMETERS = 250_000_000
#: Largest difference from a row alone under the model's own attention, of the largest logit. In float32 two ways of
#: attention differ by 2e-4 after thirty random layers; wrong positions or windows by 1e-2 and more. That no row has any
#: part in another is seen from gradients, which are exactly 0.
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 5e-2, torch.float16: 5e-2}

_WIDTHS = re.compile(r"heads$|n_head$|hidden_size|hidden_dim|intermediate|n_embd|n_inner|d_model|d_inner|d_ssm|ffn|"
                     r"lru_width|n_groups|embedding_size|hidden_channels")  # fmt: skip
_WINDOWS = re.compile(r"window|chunk|block_size|index_topk")
_EXPERT_COUNTS = re.compile(r"^(moe_)?(num|n)_(local_|routed_)?experts$|^ffn_num_experts$")


def check_packing(
    config: Any, choices: list[str], dtype: torch.dtype, device: str, longest: int | None, **build: Any
) -> PackedPlan:
    """The first of the ``choices`` of attention with which a model of this configuration trains joined rows as it
    does rows alone.

    Args:
        config: the model's, as Transformers loads it.
        choices: names of attention, the fastest first.
        dtype: what is computed in; device: where.
        longest: tokens of a joined sequence: windows that are longer play no part. None: any.
        build: further keywords of ``from_config``.

    Raises:
        UserError: there is none; says which layers mix rows.
    """
    model, alone = _small_copy(config, dtype, device, longest or sys.maxsize, build)
    reasons: list[str] = []
    errors: list[str] = []
    for attention in choices:
        by_row: tuple[str, ...] = ()
        for _ in range(4):  # a layer can hide another
            try:
                trial = _with(model, attention, by_row)
                mixing = _difference(trial, alone)
            except Exception as error:  # whatever a model's code does with arguments that it does not know
                logger.debug("%s, %s by row", attention, by_row, exc_info=error)
                errors.append(f"--attn_impl {attention}: {one_line(error)[:160]}")
                break
            if mixing is None:
                return PackedPlan(attention, by_row)
            found = tuple(sorted({type(module).__name__ for module in _mixing_modules(trial)} - {*by_row}))
            logger.debug("%s, %s by row: %s (%s)", attention, by_row, mixing, found)
            reasons.append(mixing.format(layers=" and ".join(found) or _first_unequal(model, trial)))
            if not found:
                break
            by_row += found
    raise UserError(
        f"--packing/--padding_free: {config.model_type} does not keep joined rows apart ({(reasons + errors)[0]}); "
        "drop the flag: --train_sampling_strategy group_by_length pads little"
    )


# --- the copy ---------------------------------------------------------------------------------------------------


def _small_copy(
    config: Any, dtype: torch.dtype, device: str, longest: int, build: dict[str, Any]
) -> tuple[torch.nn.Module, list[torch.Tensor]]:
    """A copy as small as its code allows, and its logits (tokens, vocabulary) of each row alone, with the model's own
    attention."""
    error: Exception | None = None
    for widths, windows in ((True, longest), (True, 0), (False, longest), (False, 0)):
        try:
            model = _build(_shrunk(config, widths, windows, build), dtype, device, build)
            with torch.no_grad():
                alone = [model(input_ids=row[None], use_cache=False).logits[0].float() for row in _rows(device)]
            if all(logits.isfinite().all() for logits in alone):
                return model, alone
        except Exception as failure:  # what a configuration allows is known to its model only
            error = error or failure
    why = one_line(error) if error else "its logits are not finite"
    raise UserError(
        f"--packing/--padding_free: no small copy of {config.model_type} can be tried ({why[:200]}), so nobody knows "
        "whether it keeps joined rows apart; drop the flag"
    )


def _rows(device: str) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(3, 30, (length,), generator=generator).to(device) for length in LENGTHS]


def _build(config: Any, dtype: torch.dtype, device: str, build: dict[str, Any]) -> torch.nn.Module:
    from transformers import AutoModelForCausalLM

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, attn_implementation="eager", **build)
        for parameter in model.parameters():
            if parameter.ndim > 1:  # strong enough that each logit depends on all that it sees
                torch.nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
    model.tie_weights()
    return model.to(device, dtype).eval()


def _shrunk(config: Any, widths: bool, windows: int, build: dict[str, Any]) -> Any:
    """The configuration of the copy."""
    small = _with_depth(_reduced(config, widths, windows), None)
    return _with_depth(small, _depth(small, build))


def _reduced(config: Any, widths: bool, windows: int) -> Any:
    values = _reduced_values(config.to_dict(), _factor(config.get_text_config(decoder=True)) if widths else 1, windows)
    return type(config).from_dict(values)


def _reduced_values(values: dict[str, Any], factor: int, windows: int) -> dict[str, Any]:
    values = {k: v for k, v in values.items() if k not in ("quantization_config", "transformers_version", "dtype")}
    vocabulary = min(_VOCABULARY, values.get("vocab_size") or _VOCABULARY)
    for name, value in values.items():
        if isinstance(value, dict) and name.endswith("_config"):
            values[name] = _reduced_values(value, factor if name == "text_config" else 1, windows)
        elif name.endswith("token_id"):
            many = value if isinstance(value, list) else [value]
            kept = [vocabulary - 1 if isinstance(one, int) and one >= vocabulary else one for one in many]
            values[name] = kept if isinstance(value, list) else kept[0]
        elif isinstance(value, float) and re.search("drop|jitter", name):
            values[name] = 0.0
        elif isinstance(value, list) and "intermediate" in name:  # one for each layer
            values[name] = [_narrow(name, one, factor) if type(one) is int else one for one in value]
        elif type(value) is not int:
            continue
        elif name.startswith("vocab_size"):
            values[name] = min(value, _VOCABULARY)
        elif _EXPERT_COUNTS.search(name):
            values[name] = min(value, _EXPERTS)
        elif _SHORTEST < value < windows and _WINDOWS.search(name):
            values[name] = _WINDOW
        elif _WIDTHS.search(name) and factor > 1:
            values[name] = _narrow(name, value, factor)
    return values


def _narrow(name: str, width: int, factor: int) -> int:
    small = max(1, width // factor) if width else width
    return -(-small // 16) * 16 if "size" in name else small  # what experts multiply is aligned


def _factor(config: Any) -> int:
    """What heads and widths can be divided by so that two heads are left, else one; sizes of heads stay."""
    heads = getattr(config, "num_attention_heads", None) or getattr(config, "num_heads", None) or 1
    is_free = config.to_dict().get("head_dim") not in (None, config.hidden_size // heads)
    common = heads if is_free else math.gcd(config.hidden_size, heads)
    fits = [f for f in range(1, common + 1) if common % f == 0 and (is_free or config.hidden_size // f % 16 == 0)]
    return max((factor for factor in fits[1:] if heads // factor >= 2), default=max(fits, default=1))


def _with_depth(config: Any, depth: int | None) -> Any:
    """The configuration with its first ``depth`` layers; None: with all of them."""
    if depth is None:
        return config
    whole = config.get_text_config(decoder=True)
    full, name = whole.num_hidden_layers, whole.attribute_map.get("num_hidden_layers", "num_hidden_layers")

    def cut(values: dict[str, Any]) -> dict[str, Any]:
        lists = {k: v for k, v in values.items() if isinstance(v, list) and len(v) == full}
        patterns = {k: v for k, v in values.items() if isinstance(v, str) and "pattern" in k}
        return values | {k: v[:depth] for k, v in (lists | patterns).items()} | {name: depth}

    values = config.to_dict()
    if config is whole:
        return type(config).from_dict(cut(values))
    return type(config).from_dict(values | {"text_config": cut(values["text_config"])})


def _depth(config: Any, build: dict[str, Any]) -> int:
    """The layers that hold two of each kind."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, **build)
    layers = max((m for m in model.modules() if isinstance(m, torch.nn.ModuleList)), key=len)
    kinds = [_kind(layer) for layer in layers]
    seconds = [[i for i, kind in enumerate(kinds) if kind == one][:2][-1] for one in dict.fromkeys(kinds)]
    depth = max(seconds) + 1
    sizes = [sum(p.numel() for p in layer.parameters()) for layer in layers]
    rest = sum(p.numel() for p in model.parameters()) - sum(sizes)
    if rest + sum(sizes[:depth]) > _MOST_PARAMETERS:
        raise ValueError(f"{depth} layers of it have {(rest + sum(sizes[:depth])) / 1e6:.0f}M parameters")
    return depth


def _kind(layer: torch.nn.Module) -> tuple[Any, ...]:
    """What tells one kind of layer from another: the classes in it and how they are set."""
    return tuple(
        (type(module).__name__, *sorted((k, v if isinstance(v, (bool, str)) else type(v).__name__)
                                        for k, v in vars(module).items()
                                        if not k.startswith("_") and isinstance(v, (bool, str, int, type(None)))))
        for module in layer.modules()
    )  # fmt: skip


# --- the trial --------------------------------------------------------------------------------------------------


def _with(model: torch.nn.Module, attention: str, by_row: tuple[str, ...]) -> Any:
    """The copy as it trains joined rows."""
    trial: Any = copy.deepcopy(model)
    trial.set_attn_implementation(attention)
    keep_rows_apart(trial, by_row)
    return trial.train()


def _difference(trial: Any, alone: list[torch.Tensor]) -> str | None:
    """What is wrong with joined rows, ``{layers}`` in it; None: nothing."""
    device, dtype = alone[0].device, next(trial.parameters()).dtype
    embedded: list[torch.Tensor] = []

    def watch(_module: torch.nn.Module, _args: Any, output: torch.Tensor) -> torch.Tensor:
        embedded.append(output.detach().requires_grad_())
        return embedded[-1]

    hook = trial.get_input_embeddings().register_forward_hook(watch)
    logits = trial(**_joined_batch(device), use_cache=False).logits
    hook.remove()
    direction = torch.randn(logits.shape, generator=torch.Generator().manual_seed(2)).to(logits)
    first = LENGTHS[0]
    if _depends(logits[:, first:] * direction[:, first:], embedded[0], slice(0, first)):
        return "a row sees the one before it, in {layers}"
    if _depends(logits[:, :-1] * direction[:, :-1], embedded[0], slice(-1, None)):
        return "a token sees what comes after it, in {layers}"
    if _unequal(logits[0].split(LENGTHS), alone, dtype):
        return "rows are not what they are alone, in {layers}"
    padded = pad(_tokenized(), 0)
    with torch.no_grad():
        logits = trial(**{k: v.to(device) for k, v in padded.items() if k != "labels"}, use_cache=False).logits
    if _unequal([row[:length] for row, length in zip(logits, LENGTHS, strict=True)], alone, dtype):
        return "padded rows of the validation are not what they are alone, in {layers}"
    return None


def _unequal(found: Sequence[torch.Tensor], alone: list[torch.Tensor], dtype: torch.dtype) -> bool:
    """Whether logits differ. In half precision a router of experts may choose another one for some tokens: what counts
    there is the token in the middle."""
    errors = torch.cat([(a.float() - b).abs().amax(-1) for a, b in zip(found, alone, strict=True)])
    error = errors.max() if dtype == torch.float32 else errors.median()
    return not error <= TOLERANCE[dtype] * max(logits.abs().max() for logits in alone)


def _depends(outputs: torch.Tensor, inputs: torch.Tensor, tokens: slice) -> bool:
    """Whether outputs change with inputs (1, tokens, width) at some tokens: exactly, in every precision."""
    (gradient,) = torch.autograd.grad(outputs.float().sum(), inputs, retain_graph=True, allow_unused=True)
    return gradient is not None and not bool((gradient[:, tokens] == 0).all())


def _mixing_modules(trial: torch.nn.Module) -> list[torch.nn.Module]:
    """The innermost layers whose output in one row depends on their input in the row before it."""
    seen: list[tuple[torch.nn.Module, torch.Tensor, torch.Tensor]] = []
    tokens, first = sum(LENGTHS), LENGTHS[0]

    def of_rows(values: Iterable[Any]) -> torch.Tensor | None:
        return next((v for v in values if isinstance(v, torch.Tensor) and v.ndim == 3 and v.shape[:2] == (1, tokens)
                     and v.requires_grad), None)  # fmt: skip

    def note(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        given = of_rows([*args, *kwargs.values()])
        made = of_rows(output if isinstance(output, (tuple, list)) else [output])
        if given is not None and made is not None:
            seen.append((module, given, made))

    hooks = [module.register_forward_hook(note, with_kwargs=True) for module in trial.modules() if module is not trial]
    try:
        trial(**_joined_batch(next(trial.parameters()).device), use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    mixing = []
    for module, given, made in seen:
        later = made[:, first:]
        if _depends(later * torch.randn_like(later), given, slice(0, first)):
            mixing.append(module)
    return [m for m in mixing if not any(inner in mixing for inner in m.modules() if inner is not m)]


def _first_unequal(model: torch.nn.Module, trial: torch.nn.Module) -> str:
    """The class of the first layer that gives joined rows something else than it gives each of them alone."""
    device, dtype = next(model.parameters()).device, next(model.parameters()).dtype

    def outputs(copied: torch.nn.Module, batch: dict[str, Any]) -> dict[str, torch.Tensor]:
        seen: dict[str, torch.Tensor] = {}

        def note(name: str, _module: Any, _args: Any, output: Any) -> None:
            first = output[0] if isinstance(output, (tuple, list)) else output
            if isinstance(first, torch.Tensor) and first.ndim == 3 and first.is_floating_point():
                seen.setdefault(name, first[0])

        hooks = [module.register_forward_hook(functools.partial(note, name)) for name, module in
                 copied.named_modules() if name]  # fmt: skip
        with torch.no_grad():
            copied(**batch, use_cache=False)
        for hook in hooks:
            hook.remove()
        return seen

    joined = outputs(trial, _joined_batch(device))
    alone = [outputs(model, {"input_ids": row[None]}) for row in _rows(str(device))]
    for name, found in joined.items():
        parts = [one[name].float() for one in alone if name in one]
        lengths = [len(part) for part in parts]
        if lengths == list(LENGTHS) and len(found) == sum(LENGTHS) and _unequal(found.split(LENGTHS), parts, dtype):
            layer = trial.get_submodule(name)
            if type(layer).__module__.startswith("torch."):  # of what the model's own layer computed before it
                layer = trial.get_submodule(name.rpartition(".")[0])
            return type(layer).__name__
    return type(model).__name__


def _tokenized() -> list[TokenizedRow]:
    import numpy as np

    return [TokenizedRow(ids, ids) for ids in (row.numpy().astype(np.int32) for row in _rows("cpu"))]


def _joined_batch(device: torch.device) -> dict[str, Any]:
    batch = flatten(_tokenized())
    return {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in batch.items() if k != "labels"}

"""Floating-point operations of training, and what a device can do of them.

Counted is what the mathematics needs, whatever the implementation computes: a matrix product of a token is 2 for each
weight forward, 2 backward for what comes before it, 2 for the weight if it is trained (a frozen one of LoRA has none,
nor what lies before the first trained weight anything backward). The output layer counts trained positions, attention
the positions that a token may see. Activations that are computed twice count once.
"""

from __future__ import annotations

import logging
import math
import re
from dataclasses import dataclass
from typing import Any

logger = logging.getLogger("rayswift.train")

#: Dense bfloat16 TFLOP/s of a device, by its name: the first that matches. From the makers' data sheets.
PEAKS = (
    (r"\bGB200\b", 2500.0), (r"\bB[23]00\b", 2250.0), (r"\bH100 NVL\b", 835.0), (r"\bH100 PCIe\b", 756.0),
    (r"\b(H100|H200|H800|GH200)\b", 989.0), (r"\bH20\b", 148.0), (r"\bA[18]00\b", 312.0), (r"\bA40\b", 149.7),
    (r"\bA30\b", 165.0), (r"\bA10\b", 125.0), (r"\bL40S\b", 362.0), (r"\bL40\b", 181.0), (r"\bL20\b", 119.5),
    (r"\bL4\b", 121.0), (r"\bRTX 5090\b", 209.5), (r"\bRTX 4090\b", 165.2), (r"\bRTX 3090\b", 71.0),
    (r"\bRTX 6000 Ada\b", 364.2), (r"\bRTX A6000\b", 154.8), (r"\bMI3(00|25)X\b", 1307.4), (r"\bMI250X\b", 191.5),
)  # fmt: skip


def peak_tflops(device: str | None) -> float | None:
    """What a device of this name can do at most; None where that is not known."""
    return next((peak for pattern, peak in PEAKS if device and re.search(pattern, device)), None)


@dataclass(frozen=True)
class FlopCount:
    """What a model costs.

    Args:
        token: each token, but for attention and the output layer.
        scored: each trained token, in the output layer.
        attention: for layers of one kind, what each pair of positions costs, and the most that one position sees.
    """

    token: float
    scored: float
    attention: tuple[tuple[float, int | None], ...]

    @classmethod
    def of(cls, model: Any, extra_passes: int = 0) -> FlopCount:
        """The cost of training a model; ``extra_passes``: forward passes beside (a reference)."""
        token = scored = 0.0
        config, head = model.config.get_text_config(), model.get_output_embeddings()
        embeddings, experts = model.get_input_embeddings(), _expert_share(config)
        trained_before = any(weight.requires_grad for weight in embeddings.parameters())
        first_layer = 0 if trained_before else math.inf
        for name, module in model.named_modules():
            for weight, size in _products(module):
                share = experts if re.search(r"\bexperts\b", name) else 1.0
                passes = 1 + extra_passes + trained_before + weight.requires_grad
                if weight.requires_grad and not trained_before:
                    trained_before = True
                    first_layer = int(next(iter(re.findall(r"\.(\d+)\.", name)), 0))
                if module is head:
                    scored += 2 * size * passes
                else:
                    token += 2 * size * passes * share
        return cls(token, scored, _attention(config, first_layer, extra_passes))

    def of_batch(self, batch: dict[str, Any]) -> tuple[int, int, float]:
        """Tokens, trained tokens and operations of a micro-batch as it comes from a collator. Of a text that is told as
        a whole (``--task_type``) one token is trained."""
        bounds, labels = batch.get("cu_seq_lens_q"), batch.get("labels")
        lengths = (batch["attention_mask"].sum(1) if bounds is None else bounds.diff()).tolist()
        if labels is not None:
            trained = int((labels[:, 1:] != -100).sum())
        else:  # of pairs; of texts that numbers are told of, one token each
            trained = int(batch["completion_mask"].sum()) if "completion_mask" in batch else len(lengths)
        pairs = sum(cost * sum(_pairs(length, window) for length in lengths) for cost, window in self.attention)
        return sum(lengths), trained, self.token * sum(lengths) + self.scored * trained + pairs


def flop_count(model: Any, extra_passes: int = 0) -> FlopCount:
    """The cost of training a model; nothing for one that is built in another way than all others."""
    try:
        return FlopCount.of(model, extra_passes)
    except (AttributeError, NotImplementedError, TypeError, ValueError) as error:
        logger.debug("operations are not counted: %s", error)
        return FlopCount(0.0, 0.0, ())


def _products(module: Any) -> list[tuple[Any, int]]:
    """The weights of a module that are matrices of a product, and their sizes: whole ones, also where a worker holds a
    part, or packed bits."""
    if next(module.children(), None) is None and hasattr(module, "in_features") and hasattr(module, "weight"):
        return [(module.weight, module.in_features * module.out_features)]
    if type(module).__name__ == "Conv1D":  # GPT-2's
        return [(module.weight, module.nx * module.nf)]
    parameters = module.parameters(recurse=False)
    shapes = ((one, getattr(one, "ds_shape", one.shape)) for one in parameters)
    # Experts of a layer are one parameter.
    return [(one, math.prod(shape)) for one, shape in shapes if len(shape) == 3 and "Conv" not in type(module).__name__]


def _expert_share(config: Any) -> float:
    """The share of its experts that a token goes through."""
    active = getattr(config, "num_experts_per_tok", None) or getattr(config, "top_k", None)
    names = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
    every = next((found for name in names if (found := getattr(config, name, None))), None)
    return active / every if active and every else 1.0


def _attention(config: Any, first_layer: float, extra_passes: int) -> tuple[tuple[float, int | None], ...]:
    """What layers of each kind cost; those before the first trained one have no backward pass, which is two others."""
    heads = getattr(config, "num_attention_heads", 0) or 0
    if not heads:
        return ()
    size = getattr(config, "head_dim", None) or config.hidden_size // heads
    rotated = getattr(config, "qk_rope_head_dim", None)  # DeepSeek's latent attention
    keys = size if rotated is None else rotated + config.qk_nope_head_dim
    values = size if rotated is None else config.v_head_dim
    window = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
    plain = "full_attention" if window is None else "sliding_attention"
    kinds = getattr(config, "layer_types", None) or getattr(config, "layers_block_type", None)
    windows = {"sliding_attention": window, "chunked_attention": getattr(config, "attention_chunk_size", None)}
    costs: dict[str, float] = {}
    for layer, kind in enumerate(kinds or [plain] * config.num_hidden_layers):
        if "attention" in kind and "linear" not in kind:
            passes = extra_passes + (3 if layer >= first_layer else 1)
            costs[kind] = costs.get(kind, 0.0) + passes * 2.0 * heads * (keys + values)
    return tuple((cost, windows.get(kind)) for kind, cost in costs.items())


def _pairs(length: int, window: int | None) -> float:
    """Pairs of positions of which one may see the other."""
    seen = min(length, window or length)
    return seen * (seen + 1) / 2 + (length - seen) * seen

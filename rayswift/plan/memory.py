"""How much memory a run will need at least, before it starts: weights, gradients and optimiser of each worker.

Activations are left out: they depend on the rows. The bytes per parameter are those of PyTorch's AdamW and of
DeepSpeed's own estimators (``estimate_zero2_model_states_mem_needs``, ``estimate_zero3_…``).
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Any

from rayswift.modeling.loading import read_safetensors_header, weight_files
from rayswift.train.deepspeed import deepspeed_config, zero_stage

GIB = 2**30
#: float32: a master copy of the weights, a gradient, and Adam's two moments.
_OPTIMISER_BYTES = 16


@dataclass(frozen=True)
class MemoryNeed:
    """Bytes that one worker needs at least: on its device (without a GPU: all of it), and beside a GPU on its host."""

    device: int
    host: int = 0

    def line(self) -> str:
        """For the person at the terminal."""
        beside = f" and {self.host / GIB:.1f} GiB of the machine's own" if self.host else ""
        return f"memory: at least {self.device / GIB:.1f} GiB per worker{beside}, activations not counted"


def memory_need(args: Any, model_dir: str, dtype: str, num_workers: int, use_gpu: bool) -> MemoryNeed:
    """What one of ``num_workers`` workers needs."""
    config = deepspeed_config(args.deepspeed)
    stage, item = zero_stage(config), 4 if dtype == "float32" else 2
    quantized = getattr(args, "quant_bits", None)
    headers = (read_safetensors_header(path) for path in weight_files(model_dir))
    shapes = {name: tensor["shape"] for header in headers for name, tensor in header.items()}
    total = sum(prod(shape) for shape in shapes.values())
    # LoRA on every linear layer of the blocks, the most that --target_modules usually names.
    blocks = [shape for name, shape in shapes.items() if len(shape) == 2 and ".layers." in name]
    trained = total if args.train_type == "full" else sum(args.lora_rank * sum(shape) for shape in blocks)
    # Full training on preferences keeps the model it is compared with; adapters are switched off instead.
    reference = item * total if args.command == "rlhf" and trained == total else 0
    if config is None:
        # Full training keeps float32 weights; adapters are float32 beside the frozen weights.
        weights = 0 if trained == total else total * quantized // 8 if quantized else item * total
        pure = args.pure_bf16 and trained == total
        return MemoryNeed(weights + _OPTIMISER_BYTES // (2 if pure else 1) * trained + reference)
    states = _OPTIMISER_BYTES * trained // (num_workers if stage >= 1 else 1)
    weights = (item * total + reference) // (num_workers if stage >= 3 else 1)
    # ZeRO-3 has no gradients beside those of the optimiser's shard.
    gradients = 0 if stage >= 3 else item * trained // (num_workers if stage >= 2 else 1)
    zero = config.get("zero_optimization", {})
    parts = (("offload_optimizer", states), ("offload_param", weights))
    host = sum(size for name, size in parts if (zero.get(name) or {}).get("device", "none") != "none")
    device = weights + gradients + states - host
    return MemoryNeed(device, host) if use_gpu else MemoryNeed(device + host)


def activation_bytes(config: dict[str, Any], tokens: int, dtype: str, all_logits: bool = False) -> int:
    """What a forward pass of so many tokens keeps for its backward pass, without gradient checkpointing.

    Per token and layer about 24 numbers for each of the hidden size and 6 for each of the feed-forward size: measured
    on Llama's layers with adapters (SmolLM2-135M: 46 KB in bfloat16). ``all_logits``: the loss is taken from the logits
    of all positions, 10 bytes each with their gradients.
    """
    text = config.get("text_config") or config
    hidden = text.get("hidden_size") or text.get("n_embd") or text.get("d_model") or 0
    experts = text.get("num_experts_per_tok") or 1
    inner = (text.get("moe_intermediate_size") if experts > 1 else None) or text.get("intermediate_size") or 4 * hidden
    layers = text.get("num_hidden_layers") or text.get("n_layer") or text.get("num_layers") or 0
    logits = 10 * text.get("vocab_size", 0) if all_logits else 0
    return tokens * (layers * (24 * hidden + 6 * inner * experts) * (4 if dtype == "float32" else 2) + logits)


def shortage(need: MemoryNeed, num_workers: int, use_gpu: bool) -> str | None:
    """A warning when this machine has too little memory for its workers; None when it is enough, or not known."""
    each = need.host if use_gpu else need.device
    free = free_bytes()
    if free is None or each * num_workers <= free:
        return None
    return (
        f"this machine has {free / GIB:.1f} GiB free and {num_workers} workers need at least "
        f"{each * num_workers / GIB:.1f} GiB: try --train_type lora, --deepspeed zero3 or fewer --num_workers"
    )


def free_bytes() -> int | None:
    """Memory this process may still take: the machine's, or the cgroup's where that is less."""
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            fields = dict(line.split(":", 1) for line in file)
        free = int(fields["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        return None
    try:
        with open("/sys/fs/cgroup/memory.max") as most, open("/sys/fs/cgroup/memory.current") as now:
            return min(free, int(most.read()) - int(now.read()))
    except (OSError, ValueError):  # no limit: "max"
        return free

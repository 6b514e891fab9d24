"""Writes docs/scale.md: what RaySwift needs and gives on many nodes, computed; a test holds the two in step.

python tools/scale_doc.py

Sizes, rates and formulas are below with their sources; memory comes from the functions that a run's own first lines
come from. Nothing here was measured on A100s. What was measured on two cores says with which script.
"""

from __future__ import annotations

import functools
import json
import struct
import tempfile
from dataclasses import dataclass
from math import prod
from pathlib import Path

from rayswift.arguments import make_arguments
from rayswift.data.flow.stream import STREAM_BLOCK_BYTES, WORKERS_TO_BLOCK
from rayswift.plan.memory import GIB, activation_bytes, memory_need
from rayswift.train.deepspeed import deepspeed_config
from rayswift.train.flops import peak_tflops

PAGE = Path(__file__).resolve().parent.parent / "docs" / "scale.md"

# --- the run ------------------------------------------------------------------------------------------------------

#: Tokens of a pack, packs of a forward pass, packs of a step: 2.1 million tokens, usual for a model of this size.
LENGTH, MICRO, GLOBAL = 4096, 4, 512
STEPS, GPUS = 10_000, 8

# --- the machines -------------------------------------------------------------------------------------------------

#: Share of the peak that forward, recomputed forward and backward pass reach together: between what is published for
#: 7-billion models on A100s, `FASTEST` and `SLOWEST` below.
USE = 0.5
#: Tokens/s of a card: mosaicml/llm-foundry, scripts/train/benchmarking (8 A100-80G, FSDP, 4,096 tokens, recomputation:
#: 73 % of the peak), and QwenLM/Qwen, README (Qwen-7B, all trained, 2 A100-80G, ZeRO, 1,024 tokens: 8 rows in 4.5 s).
FASTEST, SLOWEST = 3684, 8 * 1024 / 4.5
#: What a process takes beside its tensors, GiB: CUDA, NCCL, fragments. Fitted on ten rows of QwenLM/Qwen's README.
CONTEXT = 3.2
#: GiB of an A100-80G that nvidia-smi shows.
CARD = 79.3
#: GB of a card for Qwen-7B, all trained, 2 A100-80G, ZeRO, one row of so many tokens: QwenLM/Qwen, README.
PUBLISHED = {256: 139.2 / 2, 512: 148.0 / 2, 1024: 162.0 / 2}
#: Bytes/s between nodes: AWS p4de.24xlarge, 4 × 100 Gbit/s of EFA, and the share of it that collectives get (assumed).
NETWORK, REACHED = 50e9, 0.7
#: Bytes/s between the cards of a node: of NVLink 3's 300e9 in each direction what NCCL's all-reduce test shows.
NVLINK = 230e9
#: Cores of a data node, `cpu-data` of cluster/autoscaler.yaml (m5.8xlarge: 32 CPUs on 16 cores).
DATA_CORES = 16
#: Unexpected interruptions per GPU and hour: Llama 3 (arXiv:2407.21783, 3.3.4), 419 in 54 days on 16,384 H100s.
INTERRUPTIONS = 419 / (54 * 24 * 16_384)

# --- measured on two cores of a machine without GPU, one run each (benchmarks/scale_data.py) ------

#: Tokens that one core reads, encodes with Qwen2.5's tokenizer and packs in a second; bytes of each in a block.
TOKENS_PER_CORE, TOKEN_BYTES = 1_800_000, 8.2
#: Seconds of a core that the reader's process takes to hand one block to one worker, and that worker to take it (1,000
#: data nodes, 512 workers, 64,993 calls).
HANDING, TAKING = 0.54e-3, 1.5e-3
#: Requests that a gateway answers in a second of its core (benchmarks/scale_serve.py, one run): by the number of
#: replicas, with leases that are kept and with one through Serve for each; milliseconds to ask one replica.
REQUESTS, ASKING = {1: (479, 419), 50: (424, 401), 500: (506, 418)}, 0.7


@dataclass(frozen=True)
class Model:
    """A decoder with gated feed-forward layers, an output layer of its own, and biases where Qwen has them."""

    hidden: int
    inner: int
    layers: int
    heads: int
    kv_heads: int
    vocab: int

    def shapes(self) -> dict[str, list[int]]:
        """The weights."""
        kv = self.hidden // self.heads * self.kv_heads
        layer = {
            "q.weight": [self.hidden, self.hidden], "k.weight": [kv, self.hidden], "v.weight": [kv, self.hidden],
            "o.weight": [self.hidden, self.hidden], "gate.weight": [self.inner, self.hidden],
            "up.weight": [self.inner, self.hidden], "down.weight": [self.hidden, self.inner],
            "biases": [self.hidden + 2 * kv], "norms": [2 * self.hidden],
        }  # fmt: skip
        blocks = {f"model.layers.{n}.{name}": shape for n in range(self.layers) for name, shape in layer.items()}
        ends = {"embed.weight": [self.vocab, self.hidden], "head.weight": [self.vocab, self.hidden]}
        return {**ends, "norm.weight": [self.hidden], **blocks}

    @functools.cached_property
    def parameters(self) -> int:
        """Their numbers."""
        return sum(map(prod, self.shapes().values()))

    @property
    def embedding(self) -> int:
        """Those of the first or the last matrix, the largest."""
        return self.vocab * self.hidden

    def states_gib(self, preset: str, cards: int) -> float:
        """Weights, gradients and optimiser on one card: what a run's own first lines say."""
        with tempfile.TemporaryDirectory() as folder:
            tensors = {
                name: {"dtype": "BF16", "shape": shape, "data_offsets": [0, 0]} for name, shape in self.shapes().items()
            }
            header = json.dumps(tensors).encode()
            (Path(folder) / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header)
            args = make_arguments("pt", model=folder, dataset=["d"], train_type="full", deepspeed=preset)
            return memory_need(args, folder, "bfloat16", cards, use_gpu=True).device / GIB

    def buffers_gib(self, preset: str) -> float:
        """DeepSpeed's buckets (ZeRO-2: one for gradients, one for weights), or the weights that ZeRO-3 has gathered and
        the gradient of the largest, in bfloat16."""
        zero = (deepspeed_config(preset) or {})["zero_optimization"]
        if zero["stage"] == 3:
            return 2 * (zero["stage3_max_live_parameters"] + self.embedding) / GIB
        return 2 * (zero["reduce_bucket_size"] + zero["allgather_bucket_size"]) / GIB

    def activations_gib(self, tokens: int) -> float:
        """With gradient checkpointing: what each layer begins with, and all of the layer that is computed again."""
        layer = {"hidden_size": self.hidden, "intermediate_size": self.inner, "num_hidden_layers": 1}
        return (2 * tokens * self.hidden * self.layers + activation_bytes(layer, tokens, "bfloat16")) / GIB

    def card_gib(self, stage: int, cards: int, tokens: int) -> float:
        """All of a card's memory."""
        preset = f"zero{stage}"
        fixed = self.states_gib(preset, cards) + self.buffers_gib(preset) + CONTEXT
        return fixed + self.activations_gib(tokens)

    def operations_per_token(self) -> float:
        """As rayswift/train/flops.py counts: 2 for each weight of a product forward, 4 backward, and attention's two
        products over the positions that a token sees; and the forward pass once more, as checkpointing does."""
        attention = 2 * 2 * self.hidden * (LENGTH + 1) / 2 * self.layers
        return 4 * (2 * (self.parameters - self.embedding) + attention)

    def sent_per_node(self, stage: int, cards: int, passes: int) -> float:
        """Bytes that a node sends in one step. A ring's all-reduce of S bytes sends 2 S (n-1)/n over each link, its
        halves one S (n-1)/n each; one link of each ring leaves a node.

        ZeRO-2 all-reduces the bfloat16 gradients of every pass (DeepSpeed's use_multi_rank_bucket_allreduce) and
        gathers the new weights once. ZeRO-3 gathers the weights for the forward and for the backward pass, and scatters
        the gradients, in every pass (Rajbhandari et al., arXiv:1910.02054, 7.2).
        """
        whole = 2 * self.parameters * (cards - 1) / cards
        return whole * (3 * passes if stage == 3 else 2 * passes + 1)


#: config.json of Qwen/Qwen2.5-7B, and of Qwen/Qwen-7B.
QWEN25 = Model(3584, 18944, 28, 28, 4, 152064)
QWEN1 = Model(4096, 11008, 32, 32, 32, 151936)


@dataclass(frozen=True)
class Run:
    """Training on so many nodes, and what follows from it."""

    nodes: int
    stage: int
    micro: int = MICRO
    packs: int = GLOBAL

    @property
    def cards(self) -> int:
        return self.nodes * GPUS

    @property
    def passes(self) -> int:
        return self.packs // (self.micro * self.cards)

    @property
    def sent(self) -> float:
        return QWEN25.sent_per_node(self.stage, self.cards, self.passes)

    @property
    def computing(self) -> float:
        peak = (peak_tflops("NVIDIA A100-SXM4-80GB") or 0) * 1e12
        return self.packs * LENGTH / self.cards * QWEN25.operations_per_token() / (peak * USE)

    @property
    def sending(self) -> float:
        """Seconds of a step, not beside the computing: ``overlap_comm`` is off in SWIFT's presets."""
        return self.sent / (NVLINK if self.nodes == 1 else NETWORK * REACHED)

    @property
    def seconds(self) -> float:
        return self.computing + self.sending

    @property
    def rate(self) -> float:
        return self.packs * LENGTH / self.seconds

    def line(self) -> str:
        """The row of the table."""
        share, hours, memory = self.sending / self.seconds, self.seconds * STEPS / 3600, QWEN25.card_gib
        network = self.sent if self.nodes > 1 else 0.0
        return (
            f"| {self.nodes} × 8 | {self.stage} | {self.passes} "
            f"| {memory(self.stage, self.cards, self.micro * LENGTH):.0f} GiB | {self.rate:,.0f} "
            f"| {self.rate / self.cards:,.0f} | {self.seconds:.1f} s | {share:.0%} | {hours:,.0f} "
            f"| {network / 1e9:,.0f} GB | {network * self.nodes / 1e12:.1f} TB |"
        )


def page() -> str:
    """The page's text."""
    runs = [Run(nodes, stage) for nodes in (1, 4, 16) for stage in (2, 3)]
    most = Run(128, 2, 2, 128 * GPUS * 2)
    parts = run_lines(runs), data_lines([*runs[::2], most]), serve_lines(), limit_lines(most, Run(16, 2, 2))
    return "\n".join(line for part in parts for line in part) + "\n"


def run_lines(runs: list[Run]) -> list[str]:
    """The table of the run."""
    small, large = ([QWEN25.states_gib(preset, cards) for preset in ("zero2", "zero3")] for cards in (8, 128))
    buffers = [QWEN25.buffers_gib(preset) for preset in ("zero2", "zero3")]
    checks = [
        f"{tokens:,} tokens {QWEN1.card_gib(3, 2, tokens) * GIB / 1e9:.0f} GB against {published:.0f}"
        for tokens, published in PUBLISHED.items()
    ]
    return [
        "# How far it goes",
        "",
        "Made by `python tools/scale_doc.py`, where the formulas and the source of every figure stand. **Computed, not "
        "measured on A100s.** What one core does for data and in a gateway was measured, on two cores of a machine "
        "without GPU (`benchmarks/scale_data.py`, `benchmarks/scale_serve.py`).",
        "",
        "## Pre-training Qwen2.5-7B",
        "",
        f"`jobs/pt_qwen7b.py --packing true --max_length {LENGTH} --per_device_train_batch_size {MICRO}`, with as many "
        f"passes accumulated as make {GLOBAL} packs a step ({GLOBAL * LENGTH / 1e6:.1f} million tokens): "
        f"{QWEN25.parameters / 1e9:.2f} billion parameters, all trained, bfloat16, gradient checkpointing. Nodes of "
        f"8 × A100-80G with NVLink, {NETWORK * 8 / 1e9:.0f} Gbit/s between nodes of which {REACHED:.0%} is reached. "
        f"The cards reach {USE:.0%} of their peak while they compute, and send nothing meanwhile (`overlap_comm` is "
        "off in SWIFT's presets).",
        "",
        "| nodes | ZeRO | passes a step | memory of a card | tokens/s | of a card | a step | of it sending "
        f"| hours for {STEPS:,} steps | a node sends, a step | all nodes |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
        *(run.line() for run in runs),
        "",
        f"- Of a card's memory weights, gradients and optimiser take {small[0]:.0f} GiB on one node and {large[0]:.0f} "
        f"on 16 with ZeRO-2, {small[1]:.0f} and {large[1]:.0f} with ZeRO-3 (a run says it before it starts); "
        f"activations {QWEN25.activations_gib(MICRO * LENGTH):.0f}, buffers {buffers[0]:.1f} ({buffers[1]:.1f}), CUDA, "
        f"NCCL and fragments {CONTEXT}. A card has {CARD}. The same formulas for Qwen-7B, all trained with ZeRO-3 on "
        f"two cards, and what its README has: {', '.join(checks)}.",
        f"- A card's tokens/s lie between what is published for 7 billion parameters on A100s, {SLOWEST:,.0f} and "
        f"{FASTEST:,}. Cards that reach 40 % or 60 % compute 1.25 or 0.83 times as long; the sending stays.",
        "- ZeRO-2 reduces the gradients in every pass: on a network few large passes are cheaper than many small ones. "
        "ZeRO-3 sends 1.5 times as much in each of several; it is for models whose weights do not fit, and these do.",
        "",
    ]


def data_lines(runs: list[Run]) -> list[str]:
    """Cores and data nodes that tokens need."""
    lines = [
        "## Data",
        "",
        f"One core reads, encodes with Qwen2.5's tokenizer and packs {TOKENS_PER_CORE / 1e6:.2f} million tokens/s "
        f"(English text from a gzip file). A data node (`cpu-data` of `cluster/autoscaler.yaml`) has {DATA_CORES} "
        "cores. Every training node gets every block of the stream, and each worker takes its share of each step.",
        "",
        "| training nodes | tokens/s | into each node | cores for data | data nodes for each training node |",
        "|---|---|---|---|---|",
    ]
    for run in runs:
        cores = run.rate / TOKENS_PER_CORE
        each = f"{run.rate * TOKEN_BYTES / 1e6:.1f} MB/s | {cores:.2f} | {cores / DATA_CORES / run.nodes:.4f}"
        lines.append(f"| {run.nodes} | {run.rate:,.0f} | {each} |")
    return [
        *lines,
        "",
        "One data node is enough for all of these, and a second for when the first is lost. Chats with long templates, "
        "many small files or a slow bucket cost more: whether data is short is the share of a run's time that waits "
        "for it (`rayswift status`).",
        "",
    ]


def serve_lines() -> list[str]:
    """What a gateway does before many replicas."""
    most = max(REQUESTS)
    return [
        "## Serving",
        "",
        "Whole answers of replicas without engines: addresses in at most 8 processes, among which Serve chooses (of "
        "500 the choice takes 6 microseconds). Streams are reckoned by events (`benchmarks/gateway_limit.py`).",
        "",
        "| replicas | requests/s for each core of gateways, leases kept | through Serve |",
        "|---|---|---|",
        *(f"| {replicas} | {kept} | {leased} |" for replicas, (kept, leased) in REQUESTS.items()),
        "",
        "The gateway's core is the limit, not the number of replicas: `--num_gateways` adds more. `/metrics` asks "
        f"every replica, {ASKING} ms each, {ASKING * most / 1000:.2f} s of a core for {most}; `/health` does so at "
        "most once a second, and `/livez` asks none.",
        "",
    ]


def limit_lines(most: Run, few: Run) -> list[str]:
    """What breaks first at 128 nodes; ``few``: the same on 16."""
    cards, size = most.cards, most.cards // WORKERS_TO_BLOCK * STREAM_BLOCK_BYTES
    blocks = most.rate * TOKEN_BYTES / size
    hours = 1 / (INTERRUPTIONS * cards)
    checkpoint = 14 * QWEN25.parameters / 1e9  # bfloat16 weights; float32 weights and both moments
    return [
        "## What breaks first at 128 nodes",
        "",
        "From the nearest:",
        "",
        f"1. **The step.** {GLOBAL} packs are half a pack for each of {cards:,} cards. With {most.micro} packs a card "
        f"a step has {most.packs:,} packs, {most.packs * LENGTH / 1e6:.1f} million tokens, {most.packs // GLOBAL} "
        "times as many: the learning rate has to be found anew, and as many tokens are fewer steps.",
        f"2. **The network.** Such a step computes for {most.computing:.1f} s and sends for {most.sending:.1f} s, "
        f"{most.sending / most.seconds:.0%} of the time (16 nodes: {few.sending / few.seconds:.0%}): {most.rate:,.0f} "
        f"tokens/s instead of {most.packs * LENGTH / most.computing:,.0f}. More packs a pass, for which there is "
        "memory, and `overlap_comm` in a DeepSpeed file of your own come before more nodes. All-reduces over so many "
        f"cards also want larger buckets: 400 MB are pieces of {400 / cards:.1f} MB.",
        f"3. **Failures.** At the rate of Llama 3's training something fails every {hours:.0f} hours. A checkpoint has "
        f"{checkpoint:.0f} GB, {checkpoint / 128:.1f} for each node to write; with `--save_steps 100` a failure costs "
        f"{50 * most.seconds / 60:.0f} minutes of training on average, and the start of {cards:,} workers.",
        f"4. **The stream's reader.** One process hands every block to every worker: blocks of {size >> 20} MiB here "
        f"(they grow with the workers), {blocks:.1f} a second, {HANDING * 1000:.2f} ms for each worker: "
        f"{blocks * cards * HANDING:.0%} of a core. A worker takes {blocks * TAKING:.2%} of a core for them. Datasets "
        "that do not stream have no such process.",
        f"5. **Data nodes and Ray.** {most.rate / TOKENS_PER_CORE:.1f} cores encode all of it. 129 nodes and {cards:,} "
        "workers are within what Ray is tested with (2,000 nodes, 40,000 actors: `release/benchmarks` of its source).",
    ]


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")

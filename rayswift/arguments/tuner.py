"""Which weights are trained: all of them, or an adapter of one of PEFT's kinds, perhaps on a quantised model."""

# ruff: noqa: RUF009 (arg() makes a dataclass field: it is meant to be called in the class body)
from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

from rayswift.arguments.base import Arguments
from rayswift.arguments.fields import arg
from rayswift.arguments.groups import DTYPE_NAMES, DTYPES

#: Targets that are embeddings, or may share weights with them.
_EMBEDDINGS = {"all-embedding", "embed_tokens", "wte", "word_embeddings", "embed_in", "lm_head", "embed_out"}
_FULL = {"train_type!=full": "only with --train_type full"}
_KEPT = {"adapters!=none": "only for a new adapter: that of --adapters keeps its own"}
_NEW_ADAPTER = {"train_type=full": "all weights are trained", **_KEPT}


def _only(*kinds: str) -> dict[str, str]:
    return {f"train_type!={'|'.join(kinds)}": f"only with --train_type {' or '.join(kinds)}", **_KEPT}


_LORA, _LOW_RANK = _only("lora"), _only("lora", "adalora")


@dataclass(init=False, repr=False, eq=False)
class TunerArguments(Arguments):
    """Which weights are trained."""

    topic: ClassVar[str] = "Tuner"

    train_type: str = arg(
        "lora", "train a low-rank adapter, another kind of adapter, or all weights",
        choices=("lora", "full", "adalora", "boft", "bone", "fourierft", "ia3", "vera", "lora_llm", "dummy"),
        aliases=("tuner_type", "sft_type"),
        swift_only={
            "longlora": "--train_type lora --modules_to_save all-embedding all-norm trains what LongLoRA does, with "
            "whole attention",
            "adapter": "PEFT has no bottleneck adapters; --train_type lora is nearest",
            "reft": "PEFT has no interventions; --train_type ia3 trains as few weights",
            "llamapro": "PEFT adds no blocks; --train_type full --freeze_parameters_ratio 0.9 trains the last ones",
        },
    )  # fmt: skip
    tuner_backend: str = arg(
        "peft", "library that makes the adapter", choices=("peft", "unsloth"),
        no_effect="adapters are made by PEFT and trained by RaySwift",
    )  # fmt: skip
    lora_rank: int = arg(8, "rank of the adapter", ge=1, no_effect=_LORA)
    lora_alpha: float = arg(32.0, "scale of the adapter", gt=0, no_effect=_LOW_RANK)
    lora_dropout: float = arg(
        0.05, "dropout before the adapter", ge=0, lt=1, no_effect=_LOW_RANK, shown="0.05; 0 with --target_parameters"
    )
    lora_bias: str = arg("none", "which biases are trained", choices=("none", "all"), no_effect=_LOW_RANK)
    lora_dtype: str | None = arg(
        None, "precision of the adapter", choices=DTYPES, value_aliases=DTYPE_NAMES, shown="float32",
        no_effect=_NEW_ADAPTER,
    )  # fmt: skip
    target_modules: list[str] = arg(
        ["all-linear"], "modules that get an adapter",
        no_effect={**_NEW_ADAPTER, "target_regex!=none": "--target_regex says which"},
    )  # fmt: skip
    target_regex: str | None = arg(
        None, "pattern of the modules that get an adapter; wins over --target_modules", no_effect=_NEW_ADAPTER
    )
    target_parameters: list[str] = arg(
        [], "ends of the names of parameters that get an adapter too, such as the experts of a mixture",
        example="mlp.experts.gate_up_proj mlp.experts.down_proj", no_effect=_LORA,
    )  # fmt: skip
    modules_to_save: list[str] = arg([], "modules trained whole and saved with the adapter", no_effect=_NEW_ADAPTER)
    use_rslora: bool = arg(False, "rank-stabilised LoRA", no_effect=_LORA)
    use_dora: bool = arg(False, "weight-decomposed LoRA", no_effect=_LORA)
    init_weights: str = arg(
        "true", "how the adapter starts: true, false; lora: gaussian, orthogonal, pissa(_niter_N), olora; bone: bat",
        parse=lambda raw: str(raw).lower(), no_effect=_only("lora", "adalora", "bone"),
    )  # fmt: skip
    freeze_parameters: list[str] = arg([], "full: name prefixes of weights to freeze", no_effect=_FULL)
    freeze_parameters_ratio: float = arg(
        0.0, "full: share of weights to freeze, from the bottom", ge=0, le=1, no_effect=_FULL
    )
    trainable_parameters: list[str] = arg([], "full: name prefixes to train; wins over freezing", no_effect=_FULL)

    adalora_target_r: int = arg(8, "mean rank that the layers end with", ge=1, no_effect=_only("adalora"))
    adalora_init_r: int = arg(12, "rank that each layer begins with", ge=1, no_effect=_only("adalora"))
    adalora_tinit: int = arg(0, "steps before ranks become smaller", ge=0, no_effect=_only("adalora"))
    adalora_tfinal: int = arg(0, "last steps in which ranks stay", ge=0, no_effect=_only("adalora"))
    adalora_deltaT: int = arg(1, "steps between two choices of ranks", ge=1, no_effect=_only("adalora"))  # noqa: N815
    adalora_beta1: float = arg(0.85, "decay of the mean of a rank's worth", gt=0, lt=1, no_effect=_only("adalora"))
    adalora_beta2: float = arg(0.85, "decay of its uncertainty", gt=0, lt=1, no_effect=_only("adalora"))
    adalora_orth_reg_weight: float = arg(
        0.5, "weight of the loss that keeps ranks apart", ge=0, no_effect=_only("adalora")
    )
    boft_block_size: int = arg(4, "size of the blocks", ge=0, no_effect=_only("boft"))
    boft_block_num: int = arg(0, "number of the blocks, instead of their size", ge=0, no_effect=_only("boft"))
    boft_n_butterfly_factor: int = arg(1, "butterfly factors", ge=1, no_effect=_only("boft"))
    boft_dropout: float = arg(0.0, "share of blocks left out", ge=0, lt=1, no_effect=_only("boft"))
    fourier_n_frequency: int = arg(2000, "frequencies that are trained", ge=1, no_effect=_only("fourierft"))
    fourier_scaling: float = arg(300.0, "their scale", gt=0, no_effect=_only("fourierft"))
    reft_rank: int = arg(4, "rank of --train_type bone (SWIFT's name for it)", ge=1, no_effect=_only("bone"))
    vera_rank: int = arg(256, "rank of the shared projections", ge=1, no_effect=_only("vera"))
    vera_projection_prng_key: int = arg(0, "seed of the shared projections", ge=0, no_effect=_only("vera"))
    vera_dropout: float = arg(0.0, "dropout before the projections", ge=0, lt=1, no_effect=_only("vera"))
    vera_d_initial: float = arg(0.1, "first value of the trained scales", no_effect=_only("vera"))

    def problems(self) -> Iterator[str]:
        adapters, kind = getattr(self, "adapters", None) or [], _ALIASES.get(self.train_type, self.train_type)
        if kind == "full" and adapters:
            yield "--adapters contradicts --train_type full: give --train_type lora, or merge the adapter first"
        if len(adapters) > 1:
            yield "--adapters: training goes on with one adapter; merge the others into --model first"
        if kind not in ("lora", "full") and getattr(self, "new_special_tokens", None):
            yield f"--new_special_tokens contradicts --train_type {kind}: lora and full train the new rows"
        if kind == "adalora" and getattr(self, "deepspeed", None) not in (None, "zero0"):
            yield "--train_type adalora contradicts --deepspeed: it reads gradients that DeepSpeed keeps; drop one"
        if kind == "adalora" and self.adalora_init_r <= self.adalora_target_r:
            yield f"--adalora_init_r {self.adalora_init_r}: ranks become smaller; give more than --adalora_target_r"
        if kind == "boft" and bool(self.boft_block_size) == bool(self.boft_block_num):
            yield "--boft_block_size and --boft_block_num: one of the two is 0, the other says the blocks"
        if kind not in ("lora", "full") and getattr(self, "zero_stage", None) == 3:
            yield f"--train_type {kind} contradicts --deepspeed zero3: PEFT needs whole weights for it; give zero2"
        if kind in _STARTS and self.init_weights not in _STARTS[kind]:
            yield f"--init_weights {self.init_weights}: --train_type {kind} has {', '.join(_STARTS[kind])}"
        if kind == "lora" and self.target_parameters:
            also = {"--lora_dropout above 0": "lora_dropout" in self.given and self.lora_dropout > 0,
                    "--use_dora": self.use_dora, "--lora_bias all": self.lora_bias == "all",
                    "--deepspeed zero3": getattr(self, "zero_stage", None) == 3}  # fmt: skip
            for flag in [flag for flag, used in also.items() if used]:
                yield f"--target_parameters contradicts {flag}: PEFT has no such adapter for parameters; drop one"

    def remarks(self) -> Iterator[str]:
        if self.train_type == "lora_llm":
            yield "--train_type lora_llm: what reads pictures is not trained, so this is --train_type lora"
        if self.train_type == "dummy":
            yield "--train_type dummy: trains the model as it is, as --train_type full"
        kind = _ALIASES.get(self.train_type, self.train_type)
        if kind != "full" and not getattr(self, "adapters", None):
            parts = {
                f"--train_type {kind}": kind != "lora",
                "--target_parameters": kind == "lora" and bool(self.target_parameters),
                "--lora_bias all": kind in ("lora", "adalora") and self.lora_bias == "all",
                "--use_dora true": kind == "lora" and self.use_dora,
                "--modules_to_save": bool(self.modules_to_save),
                "the head of --task_type": getattr(self, "task_type", "") in ("seq_cls", "reranker"),
                "--new_special_tokens": bool(getattr(self, "new_special_tokens", None)),
                "--target_modules with embeddings": not _EMBEDDINGS.isdisjoint(self.target_modules),
            }  # fmt: skip
            if beyond := [flag for flag, used in parts.items() if used]:
                yield (f"{', '.join(beyond)}: no engine applies such an adapter beside its base; it is served merged "
                       "(rayswift deploy --merge_lora true, or rayswift export --merge_lora true)")  # fmt: skip
            if self.init_weights == "false" and kind in ("lora", "adalora", "bone"):
                yield "--init_weights false: the adapter starts at random values, so training starts from another model"
            if kind == "fourierft":
                yield "--train_type fourierft: starts at random values, so training starts from another model"

    def resolve(self) -> None:
        self.train_type = _ALIASES.get(self.train_type, self.train_type)
        if self.target_parameters and not self.is_set("lora_dropout"):
            self.lora_dropout = 0.0


#: Kinds that are others for a model of text.
_ALIASES = {"lora_llm": "lora", "dummy": "full"}
#: Values of --init_weights of kinds beside LoRA.
_STARTS = {"adalora": ("true", "false"), "bone": ("true", "false", "bat")}
#: Settings that some kinds share; those whose names begin with the kind's own are its own.
_SHARED = ("lora_alpha", "lora_bias", "target_modules", "target_regex", "modules_to_save")
_WEIGHTS = {
    "lora": ("lora_rank", *_SHARED, "target_parameters", "use_rslora", "use_dora", "init_weights"),
    "adalora": (*_SHARED, "adalora_init_r", "adalora_target_r", "init_weights"),
    "boft": (*_SHARED[2:], "boft_block_size", "boft_block_num", "boft_n_butterfly_factor"),
    "bone": (*_SHARED[2:], "reft_rank", "init_weights"),
    "fourierft": (*_SHARED[2:], "fourier_n_frequency", "fourier_scaling"),
    "ia3": _SHARED[2:],
    "vera": (*_SHARED[2:], "vera_rank", "vera_projection_prng_key"),
    "full": ("freeze_parameters", "freeze_parameters_ratio", "trainable_parameters"),
}


def trained_weights(train_type: str) -> tuple[str, ...]:
    """The settings that say which weights training of this type has, and what they mean."""
    return _WEIGHTS[train_type]


#: Kinds of adapters that PEFT has for quantised layers.
_ON_QUANTIZED = {"bnb": ("lora", "adalora", "ia3", "vera"), "hqq": ("lora",)}
_QUANTIZED = {"quant_method=none": "only with --quant_method"}
_BNB_4BIT = {"quant_method!=bnb": "only with --quant_method bnb", "quant_bits!=4": "only with --quant_bits 4"}


@dataclass(init=False, repr=False, eq=False)
class QuantizedBaseArguments(Arguments):
    """Adapters on a model whose own weights are quantised when it is loaded (QLoRA)."""

    topic: ClassVar[str] = "Quantised base"

    quant_method: str | None = arg(
        None, "quantise the frozen weights under the adapter", choices=("bnb", "hqq"), example="bnb",
        swift_only=dict.fromkeys(("eetq", "quanto", "fp8"), "choose from bnb, hqq"),
    )  # fmt: skip
    quant_bits: int | None = arg(
        None, "bits per weight: 4 or 8 with bnb, 1, 2, 3, 4 or 8 with hqq", ge=1, le=8, example="4",
        no_effect=_QUANTIZED,
    )  # fmt: skip
    hqq_axis: int | None = arg(
        None, "axis along which hqq groups weights", ge=0, le=1, shown="hqq's choice", example="1",
        no_effect={"quant_method!=hqq": "only with --quant_method hqq"},
    )  # fmt: skip
    bnb_4bit_compute_dtype: str | None = arg(
        None, "precision that 4-bit layers compute in", choices=DTYPES, value_aliases=DTYPE_NAMES, no_effect=_BNB_4BIT,
        shown="that of the run",
    )  # fmt: skip
    bnb_4bit_quant_type: str = arg("nf4", "type of 4-bit weights", choices=("nf4", "fp4"), no_effect=_BNB_4BIT)
    bnb_4bit_use_double_quant: bool = arg(True, "quantise the scales too", no_effect=_BNB_4BIT)
    bnb_4bit_quant_storage: str | None = arg(
        None, "type in which packed weights are held", choices=("uint8", *DTYPES), value_aliases=DTYPE_NAMES,
        shown="uint8", no_effect=_BNB_4BIT,
    )  # fmt: skip

    _BITS: ClassVar[dict[str, tuple[int, ...]]] = {"bnb": (4, 8), "hqq": (1, 2, 3, 4, 8)}

    def problems(self) -> Iterator[str]:
        if not self.quant_method:
            return
        bits = self._BITS[self.quant_method]
        if self.quant_bits is None:
            yield f"--quant_method {self.quant_method} needs --quant_bits, for example --quant_bits 4"
        elif self.quant_bits not in bits:
            known = ", ".join(map(str, bits))
            yield f"--quant_bits {self.quant_bits}: --quant_method {self.quant_method} does {known}"
        if getattr(self, "train_type", "lora") in ("full", "dummy"):
            yield f"--quant_method {self.quant_method} contradicts --train_type full: such weights stay as they are"
        kind = _ALIASES.get(getattr(self, "train_type", "lora"), getattr(self, "train_type", "lora"))
        if kind != "full" and kind not in _ON_QUANTIZED[self.quant_method]:
            able = ", ".join(_ON_QUANTIZED[self.quant_method])
            yield f"--train_type {kind} contradicts --quant_method {self.quant_method}: PEFT has {able} on such weights"
        if getattr(self, "zero_stage", None) == 3:
            yield f"--quant_method {self.quant_method} contradicts --deepspeed zero3, which shards whole weights"

    def quantization(self, dtype: str) -> dict[str, Any] | None:
        """The keywords of Transformers' configuration of the quantisation, with its name in ``quant_method``."""
        if self.quant_method is None:
            return None
        if self.quant_method == "hqq":
            return {
                "quant_method": "hqq",
                "nbits": self.quant_bits,
                "axis": 1 if self.hqq_axis is None else self.hqq_axis,
            }
        return {
            "quant_method": "bnb",
            "load_in_4bit": self.quant_bits == 4,
            "load_in_8bit": self.quant_bits == 8,
            "bnb_4bit_compute_dtype": self.bnb_4bit_compute_dtype or dtype,
            "bnb_4bit_quant_type": self.bnb_4bit_quant_type,
            "bnb_4bit_use_double_quant": self.bnb_4bit_use_double_quant,
            "bnb_4bit_quant_storage": self.bnb_4bit_quant_storage or "uint8",
        }

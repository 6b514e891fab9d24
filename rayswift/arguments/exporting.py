"""The settings of exporting: merge, quantise, convert, push."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from rayswift.arguments.base import Arguments
from rayswift.arguments.fields import arg
from rayswift.arguments.groups import NOTHING_MADE

#: Rules of the parts of `rayswift export`.
_PUSHED = {"push_to_hub=false": "only with --push_to_hub true"}
_CALIBRATED = {"quant_method!=gptq|awq": "only with --quant_method gptq or awq"}
_MADE = {NOTHING_MADE: "only for a folder that is made, not to push one that is there"}


@dataclass(init=False, repr=False, eq=False)
class QuantizeArguments(Arguments):
    """Merging, quantising, converting and pushing."""

    topic: ClassVar[str] = "Export"

    output_dir: str | None = arg(None, "folder of the result", shown="beside the model, named after what was done",
                                 no_effect=_MADE)  # fmt: skip
    exist_ok: bool = arg(False, "write into a folder that is already there", no_effect=_MADE)
    merge_lora: bool = arg(False, "merge the adapter into the weights")
    quant_method: str | None = arg(
        None, "quantise the weights", choices=("awq", "gptq", "bnb", "fp8", "int8"), swift_only=("gptq_v2",)
    )
    quant_bits: int | None = arg(None, "bits per weight", ge=1, le=8, example="4", shown="4; 8 for fp8 and int8")
    quant_n_samples: int = arg(256, "rows of --dataset to calibrate with", ge=1, no_effect=_CALIBRATED)
    quant_batch_size: int = arg(1, "calibration rows computed together", ge=1, no_effect=_CALIBRATED)
    group_size: int = arg(
        128, "weights that share a scale (-1: a whole row)", ge=-1, shown="128, or the largest that divides the rows",
        no_effect=_CALIBRATED,
    )  # fmt: skip
    quant_sym: bool = arg(
        True, "gptq: levels lie evenly around zero, as vLLM needs them; false follows the weights closer",
        no_effect={"quant_method=none": "only with --quant_method gptq"},
    )  # fmt: skip
    to_cached_dataset: bool = arg(False, "encode --dataset once, for later training")
    template_mode: str = arg(
        "train", "what the encoded dataset is for", choices=("train", "rlhf"), swift_only=("kto",),
        no_effect={"to_cached_dataset=false": "only with --to_cached_dataset true"},
    )  # fmt: skip
    to_gguf: str | None = arg(
        None, "write one GGUF file (llama.cpp, Ollama) with weights of this type", value_aliases={"true": "q8_0"},
        choices=("q8_0", "f32", "f16", "bf16", "q5_1", "q5_0", "q4_1", "q4_0"),
    )  # fmt: skip
    to_ollama: bool = arg(False, "write an Ollama Modelfile (with --to_gguf, for that file)")
    ollama_num_ctx: int | None = arg(
        None, "context that the Modelfile asks for, in tokens", ge=1, shown="--max_length or the model's, 8192 at most"
    )
    to_peft_format: bool = arg(False, "convert a SWIFT adapter, or with --base_model a merged model, to a PEFT adapter")
    base_model: str | None = arg(None, "model or folder that the merged --model was fine-tuned from")
    lora_rank: int | None = arg(None, "rank of the adapter made from them", ge=1, shown="that of the model's run")
    push_to_hub: bool = arg(False, "push the result to the hub")
    hub_model_id: str | None = arg(None, "name on the hub", example="organisation/name", no_effect=_PUSHED)
    hub_private_repo: bool = arg(False, "make it private", no_effect=_PUSHED)
    commit_message: str = arg("update files", "message of the push", no_effect=_PUSHED)
    max_shard_size: str = arg("5GB", "largest weight file", no_effect={"quant_method=none": "only with --quant_method"})

    _ACTIONS: ClassVar[tuple[str, ...]] = (
        "merge_lora", "quant_method", "to_cached_dataset", "to_gguf", "to_ollama", "to_peft_format", "push_to_hub",
    )  # fmt: skip
    #: Bits that each method can do; the first is the default.
    _BITS: ClassVar[dict[str, tuple[int, ...]]] = {
        "gptq": (4, 2, 3, 8), "awq": (4,), "bnb": (4, 8), "fp8": (8,), "int8": (8,),
    }  # fmt: skip

    def problems(self) -> Iterator[str]:
        if not any(getattr(self, action) for action in self._ACTIONS):
            yield "nothing to do: give " + ", ".join(f"--{name}" for name in self._ACTIONS)
        yield from self._quantize_problems()
        yield from self._adapter_problems()
        if self.push_to_hub and not self.hub_model_id:
            yield "--push_to_hub true needs --hub_model_id, for example --hub_model_id organisation/name"
        if not re.fullmatch(r"\d+(\.\d+)?([KMGT]i?B)?", self.max_shard_size, re.IGNORECASE):
            yield f"--max_shard_size {self.max_shard_size}: expected a size such as 5GB or 500MB"

    def _quantize_problems(self) -> Iterator[str]:
        method, dataset = self.quant_method, getattr(self, "dataset", None) or getattr(self, "cached_dataset", None)
        if not method:
            if self.quant_bits:
                yield "--quant_bits needs --quant_method, for example --quant_method awq"
            return
        if method in ("awq", "gptq") and not dataset:
            yield f"--quant_method {method} needs --dataset to calibrate with"
        if self.quant_bits and self.quant_bits not in self._BITS[method]:
            bits = ", ".join(map(str, sorted(self._BITS[method])))
            yield f"--quant_bits {self.quant_bits}: --quant_method {method} does {bits}"
        if not self.quant_sym and method != "gptq":
            yield f"--quant_sym false: is for --quant_method gptq; {method} has its own levels"
        if self.to_gguf or self.to_ollama:
            yield "--quant_method does not go with --to_gguf and --to_ollama: GGUF has types of its own, see --to_gguf"
        if self.group_size == 0:
            yield "--group_size 0: expected -1 (a whole row) or at least 1, for example --group_size 64"

    def _adapter_problems(self) -> Iterator[str]:
        adapters = getattr(self, "adapters", None) or []
        if self.merge_lora and not adapters:
            yield "--merge_lora true needs --adapters"
        if self.to_peft_format and bool(adapters) == bool(self.base_model):
            yield "--to_peft_format true needs --adapters, or a merged --model and its --base_model"
        if self.ollama_num_ctx and not self.to_ollama:
            yield "--ollama_num_ctx is for --to_ollama true"
        if self.base_model and not self.to_peft_format:
            yield "--base_model is for --to_peft_format true"
        if self.lora_rank and not self.base_model:
            yield "--lora_rank is for --base_model: an adapter that exists keeps its rank"
        if len(adapters) > 1:
            yield "--adapters: export takes one adapter; merge several one after the other"
        made = [f"--{name}" for name in ("quant_method", "to_gguf", "to_ollama") if getattr(self, name)]
        if adapters and made and not self.merge_lora:
            yield f"--adapters: {', '.join(made)} needs --merge_lora true: the merged model is what is converted"
        if self.to_peft_format and (self.merge_lora or made):
            yield "--to_peft_format true: an adapter stays one; leave out " + ", ".join(made or ["--merge_lora"])
        others = [f"--{name}" for name in self._ACTIONS if name != "to_cached_dataset" and getattr(self, name)]
        if self.to_cached_dataset and others:
            yield f"--to_cached_dataset true: one at a time; leave out {', '.join(others)}"
        if self.to_cached_dataset and not getattr(self, "dataset", None):
            yield "--to_cached_dataset true needs --dataset"

    def resolve(self) -> None:
        if self.to_cached_dataset:
            self.streaming = False
        if self.quant_method and self.quant_bits is None:
            self.quant_bits = self._BITS[self.quant_method][0]

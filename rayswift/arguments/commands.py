"""One class per command, put together from the groups."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from rayswift.arguments.base import Arguments
from rayswift.arguments.engines import EngineArguments, GenerationArguments
from rayswift.arguments.exporting import QuantizeArguments
from rayswift.arguments.fields import Spec, arg, arg_like, specs_of
from rayswift.arguments.groups import DatasetArguments, ModelArguments, TemplateArguments
from rayswift.arguments.optimizers import LargeModelOptimizers
from rayswift.arguments.rlhf import DPO_LOSSES, PREFERENCE_METRICS, RlhfRules
from rayswift.arguments.serving import (
    BenchmarkArguments,
    EndpointArguments,
    ResultArguments,
    SamplingArguments,
    ServerArguments,
    WebPageArguments,
)
from rayswift.arguments.tasks import TaskRules
from rayswift.arguments.training import (
    OptimizerArguments,
)
from rayswift.arguments.training_args import choices_of, passthrough_specs
from rayswift.arguments.tuner import QuantizedBaseArguments, TunerArguments
from rayswift.arguments.watching import EvaluationArguments, StepArguments
from rayswift.arguments.workers import RayArguments, WorkerArguments

_GOING_ON = {"adapters=none": "only with --adapters"}
#: Values of --loss_scale that weigh every token 0 or 1.
_UNWEIGHTED = (
    "default", "last_round", "all", "ignore_empty_think", "ignore_think_prefix", "last_round_with_ignore_empty_think",
)  # fmt: skip
#: Of the commands whose models write text.
_TEXT_ALONE: dict[str, Any] = {
    "choices": ("causal_lm",), "swift_only": ("seq_cls", "embedding", "reranker", "generative_reranker", "decision"),
}  # fmt: skip
_MODEL_EXAMPLE = "for example --model Qwen/Qwen2.5-7B-Instruct"


@dataclass(init=False, repr=False, eq=False)
class SftArguments(
    TaskRules,
    TunerArguments,
    QuantizedBaseArguments,
    LargeModelOptimizers,
    EvaluationArguments,
    WorkerArguments,
    StepArguments,
):
    """Fine-tune a model on conversations, with an adapter or whole; or to tell classes, vectors or ranks of texts."""

    command: ClassVar[str] = "sft"

    load_args: bool = arg_like(ModelArguments, "load_args", False, no_effect=_GOING_ON)
    load_data_args: bool = arg_like(ModelArguments, "load_data_args", False, no_effect=_GOING_ON)

    def resolve(self) -> None:
        if self.training_args.get("use_cpu"):
            self.use_gpu = False


@dataclass(init=False, repr=False, eq=False)
class PretrainArguments(SftArguments):
    """Continue pre-training on plain text: every token is trained."""

    command: ClassVar[str] = "pt"

    task_type: str = arg_like(ModelArguments, "task_type", "causal_lm", **_TEXT_ALONE)
    use_chat_template: bool = arg_like(TemplateArguments, "use_chat_template", False)
    loss_scale: str = arg_like(TemplateArguments, "loss_scale", "all")


@dataclass(init=False, repr=False, eq=False)
class RlhfArguments(RlhfRules, SftArguments):
    """Align a model: DPO, KTO, reward models, PPO, GRPO, ..."""

    command: ClassVar[str] = "rlhf"

    task_type: str = arg_like(ModelArguments, "task_type", "causal_lm", **_TEXT_ALONE)
    loss_scale: str = arg_like(TemplateArguments, "loss_scale", "last_round")

    def metric_names(self) -> tuple[str, ...]:
        """What an evaluation measures."""
        return ("loss", *PREFERENCE_METRICS)

    def problems(self) -> Iterator[str]:
        if self.truncation_strategy == "split":
            yield "--truncation_strategy split: a pair cannot be split; use delete, left or right"
        if self.rlhf_type != "dpo":
            return
        for name in [name for name in self.loss_type if name not in DPO_LOSSES]:
            yield f"--loss_type {name}: DPO has no such loss; choose from {', '.join(DPO_LOSSES)}"
        if "exo_pair" in self.loss_type and not self.label_smoothing:
            yield "--loss_type exo_pair needs --label_smoothing above 0, for example 0.001"
        if "robust" in self.loss_type and self.label_smoothing >= 0.5:
            yield "--loss_type robust needs --label_smoothing below 0.5"
        if self.packing:
            yield "--packing true: pairs are padded; drop --packing"
        if self.ref_model and self.train_type != "full":
            yield "--ref_model needs --train_type full: adapters are compared with the model without them"
        if self.train_type == "adalora":
            yield "--train_type adalora: the reference is a second adapter, and PEFT has one AdaLoRA a model; give lora"
        if self.train_type == "fourierft":
            yield "--train_type fourierft: the reference would be the model without its random start; give lora"
        if self.train_type == "lora":
            yield from self._adapters_without_reference()
        if self.ref_adapters and self.ref_adapters != self.adapters:
            yield "--ref_adapters: training starts from its reference; give the same as --adapters, or drop it"

    def _adapters_without_reference(self) -> Iterator[str]:
        """What cannot be switched off, or is not read, where the model is compared with itself before training."""
        if self.adapters:
            return
        if self.lora_bias == "all":
            yield "--lora_bias all: with rlhf the reference would get the trained biases too; drop it"
        for name in {"lm_head", "embed_out"} & set(self.target_modules):
            yield f"--target_modules {name}: rlhf reads the output head's own weights; use --modules_to_save {name}"
        if self.init_weights.lower() == "false":
            yield "--init_weights false: the reference would be the model with random changes; drop it"

    def resolve(self) -> None:
        self.padding_free = False  # pairs are padded

    def remarks(self) -> Iterator[str]:
        if set(self.loss_scale.split("+")) - set(_UNWEIGHTED):
            yield f"--loss_scale {self.loss_scale}: answers are compared whole; its weights only say what is trained"


@dataclass(init=False, repr=False, eq=False)
class ModelRequired(ModelArguments):
    """A model must be named, by itself or by its adapter."""

    def problems(self) -> Iterator[str]:
        elsewhere = getattr(self, "eval_url", None) or getattr(self, "base_url", None) or getattr(self, "models", None)
        if not self.model and not self.adapters and not elsewhere:
            yield f"--model or --adapters is required, {_MODEL_EXAMPLE}"


@dataclass(init=False, repr=False, eq=False)
class InferArguments(
    EndpointArguments,
    ResultArguments,
    EngineArguments,
    GenerationArguments,
    WorkerArguments,
    DatasetArguments,
    TemplateArguments,
    ModelRequired,
):
    """Talk to a model in the terminal, or answer the rows of --val_dataset."""

    command: ClassVar[str] = "infer"

    def problems(self) -> Iterator[str]:
        if self.task_type != "causal_lm" and self.infer_backend != "transformers":
            yield f"--task_type {self.task_type}: infer answers with --infer_backend transformers; deploy serves vLLM"
        for flag in ("metric", "val_dataset_sample"):
            if flag in self.given and not (self.val_dataset or self.dataset or self.load_data_args):
                yield f"--{flag} needs --val_dataset"


@dataclass(init=False, repr=False, eq=False)
class DeployArguments(
    ServerArguments, EngineArguments, GenerationArguments, RayArguments, TemplateArguments, ModelRequired
):
    """Serve a model over HTTP with OpenAI's interface."""

    command: ClassVar[str] = "deploy"

    def problems(self) -> Iterator[str]:
        if (
            self.task_type != "causal_lm"
            and self.infer_backend == "transformers"
            and (self.adapters or self.adapter_root)
        ):
            yield f"--task_type {self.task_type} takes adapters with vLLM only: --infer_backend vllm"


@dataclass(init=False, repr=False, eq=False)
class AppArguments(WebPageArguments, DeployArguments):
    """Chat with a model in the browser."""

    command: ClassVar[str] = "app"

    ssl_keyfile: str | None = arg_like(
        ServerArguments,
        "ssl_keyfile",
        None,
        help="key of the page's TLS certificate",
        topic=WebPageArguments.topic,
        no_effect={"base_url!=none": ""},
    )
    ssl_certfile: str | None = arg_like(
        ServerArguments,
        "ssl_certfile",
        None,
        help="TLS certificate of the page",
        topic=WebPageArguments.topic,
        no_effect={"base_url!=none": ""},
    )

    task_type: str = arg_like(ModelArguments, "task_type", "causal_lm", **_TEXT_ALONE)

    stream: bool | None = arg_like(GenerationArguments, "stream", True)

    def problems(self) -> Iterator[str]:
        if self.num_beams > 1:
            yield "--num_beams: OpenAI's interface, which the page talks, has no beam search; leave it out"

    def remarks(self) -> Iterator[str]:
        if self.ssl_certfile and "host" in self.given:
            yield "--host: no effect with --ssl_certfile: the page has TLS, and what answers it stays on 127.0.0.1"


@dataclass(init=False, repr=False, eq=False)
class SampleArguments(
    SamplingArguments,
    EndpointArguments,
    EngineArguments,
    GenerationArguments,
    WorkerArguments,
    DatasetArguments,
    TemplateArguments,
    ModelArguments,
):
    """Sample many answers per prompt and keep the best."""

    command: ClassVar[str] = "sample"

    task_type: str = arg_like(ModelArguments, "task_type", "causal_lm", **_TEXT_ALONE)

    dataset_shuffle: bool = arg_like(DatasetArguments, "dataset_shuffle", True, help="shuffle the rows", shown="false")
    temperature: float | None = arg_like(GenerationArguments, "temperature", 1.0)

    def problems(self) -> Iterator[str]:
        is_client = self.sampler_engine == "client"
        if not is_client and self.sampler_engine != "no" and not self.model and not self.adapters:
            yield f"--model or --adapters is required, {_MODEL_EXAMPLE}"
        if not self.dataset and not self.cache_files:
            yield "--dataset is required, for example --dataset prompts.jsonl"
        if is_client and not self.base_url and not self.engine_kwargs.get("base_url"):
            yield "--sampler_engine client needs --base_url, for example --base_url http://127.0.0.1:8000/v1"
        if self.base_url and not is_client:
            yield f"--base_url needs --sampler_engine client, not {self.sampler_engine}"
        if self.num_beams > 1:
            yield "--num_beams: answers are sampled, not searched for; leave it out"
        if self.num_workers and (self.min_replicas or self.max_replicas):
            yield "--num_workers says the same as --min_replicas and --max_replicas: leave one out"

    def remarks(self) -> Iterator[str]:
        if "data_seed" in self.given and not ("dataset_shuffle" in self.given and self.dataset_shuffle):
            yield "--data_seed has no effect here: only with --dataset_shuffle true"
        if self.temperature == 0 and self.num_return_sequences > 1:
            yield "--temperature 0: all answers to a prompt will be the same; leave it out, or set it above 0"

    def resolve(self) -> None:
        if self.sampler_engine in ("vllm", "transformers"):
            self.infer_backend = self.sampler_engine
            self.given |= {"infer_backend"}  # the plan of the engines takes over what was given
        if self.min_replicas or self.max_replicas:
            fewest = self.min_replicas or 1
            self.num_workers = (fewest, self.max_replicas or fewest)
        if self.sampler_engine == "client":  # SWIFT has both among the engine's settings
            rest = dict(self.engine_kwargs)
            self.base_url = self.base_url or rest.pop("base_url", None)
            self.api_key = self.api_key or rest.pop("api_key", None)
            self.engine_kwargs = rest
        elif self.engine_kwargs:
            target = "vllm_engine_kwargs" if self.sampler_engine == "vllm" else "model_kwargs"
            setattr(self, target, {**getattr(self, target), **self.engine_kwargs})
            self.given |= {target}
        if "max_batch_size" not in self.given:
            self.max_batch_size = self.num_sampling_batch_size


@dataclass(init=False, repr=False, eq=False)
class EvalArguments(BenchmarkArguments, DeployArguments):
    """Run benchmarks on a model or an endpoint."""

    command: ClassVar[str] = "eval"

    task_type: str = arg_like(ModelArguments, "task_type", "causal_lm", **_TEXT_ALONE)

    temperature: float | None = arg_like(GenerationArguments, "temperature", 0.0)


@dataclass(init=False, repr=False, eq=False)
class ExportArguments(QuantizeArguments, RayArguments, DatasetArguments, TemplateArguments, ModelRequired):
    """Merge, quantise, convert or push a model."""

    command: ClassVar[str] = "export"


def read_row_count(raw: Any) -> int | None:
    """``1000``, or ``all`` (None)."""
    text = str(raw).strip().lower()
    if text == "all":
        return None
    if not text.isdigit() or int(text) < 1:
        raise ValueError("expected a whole number of at least 1, or all")
    return int(text)


@dataclass(init=False, repr=False, eq=False)
class PreviewArguments(DatasetArguments, TemplateArguments, ModelArguments):
    """Look at a dataset: rows before and after each stage, token lengths, and what is dropped and why."""

    command: ClassVar[str] = "data preview"
    topic: ClassVar[str] = "Preview"

    load_args: bool = arg_like(ModelArguments, "load_args", False)  # as sft: a preview shows what training would see
    preview_rows: int | None = arg(1000, "rows read of each dataset, from its start, or all", parse=read_row_count)
    num_shown: int = arg(3, "how many of them are shown", ge=0)
    output: str | None = arg(None, "HTML page to write as well", shown="the terminal alone", example="preview.html")

    def problems(self) -> Iterator[str]:
        if not self.dataset and not self.val_dataset:
            yield "--dataset is required, for example --dataset train.jsonl"
        if self.adapters:
            yield "--adapters: a preview needs the tokenizer only; name the base model with --model"
        if self.output and not self.output.lower().endswith((".html", ".htm")):
            yield f"--output {self.output}: the page is HTML, for example --output preview.html"


COMMANDS = {
    cls.command: cls
    for cls in (
        PretrainArguments, SftArguments, RlhfArguments, InferArguments, DeployArguments, AppArguments, SampleArguments,
        EvalArguments, ExportArguments,
    )
}  # fmt: skip
# Commands of two words that are not SWIFT's.
TOOLS = {PreviewArguments.command: PreviewArguments}


def arguments_class(command: str) -> type[Arguments]:
    """The arguments of a command, SWIFT's or our own."""
    return COMMANDS.get(command) or TOOLS[command]


@functools.cache
def flags_of(command: str) -> dict[str, Spec]:
    """Every flag of a command by canonical name, further TrainingArguments fields included."""
    cls = arguments_class(command)
    declared = specs_of(cls)
    if not issubclass(cls, OptimizerArguments):
        return declared
    declared = {
        name: replace(spec, choices=spec.choices or choices_of(name)) if choices_of(name) else spec
        for name, spec in declared.items()
    }
    return {**declared, **passthrough_specs(set(declared) | {alias for s in declared.values() for alias in s.aliases})}

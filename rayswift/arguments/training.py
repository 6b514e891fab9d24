"""The settings of training: optimiser, evaluation, checkpoints, DeepSpeed."""

# ruff: noqa: RUF009 (arg() makes a dataclass field: it is meant to be called in the class body)
from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

from rayswift.arguments.base import Arguments
from rayswift.arguments.fields import arg, read_auto, read_json
from rayswift.arguments.groups import DatasetArguments, ModelArguments, TemplateArguments
from rayswift.arguments.resuming import ResumeArguments

DEEPSPEED_PRESETS = ("zero0", "zero1", "zero2", "zero3", "zero2_offload", "zero3_offload")
_EVALUATED = {
    "val_dataset=none cached_val_dataset=none split_dataset_ratio=0": "only with --val_dataset or "
    "--split_dataset_ratio",
    "val_dataset=none cached_val_dataset=none streaming=true": "a stream holds nothing out: only with --val_dataset",
}


def read_deepspeed(raw: Any) -> str | dict[str, Any]:
    """The name of a preset, or a DeepSpeed configuration (JSON text, or the path of a .json file) as a dict."""
    if isinstance(raw, str) and raw in DEEPSPEED_PRESETS:
        return raw
    if isinstance(raw, str) and not raw.lstrip().startswith("{") and not raw.endswith(".json") and os.sep not in raw:
        raise ValueError(f"choose from {', '.join(DEEPSPEED_PRESETS)}, or give JSON or the path of a .json file")
    return read_json(raw)


#: Fields of TrainingArguments that would do harm here, and what does it instead.
_NOT_BUILT = {
    "fsdp": "not built; --deepspeed zero3 shards the model over the workers",
    "auto_find_batch_size": "not built; set --per_device_train_batch_size (and --gradient_accumulation_steps)",
    "push_to_hub": "training pushes nothing; afterwards rayswift export --adapters CHECKPOINT (or --model CHECKPOINT) "
    "--push_to_hub true --hub_model_id OWNER/NAME does",
}


@dataclass(init=False, repr=False, eq=False)
class OptimizerArguments(Arguments):
    """How long, how fast and how precisely is trained."""

    topic: ClassVar[str] = "Training"

    num_train_epochs: float = arg(
        3.0, "passes over the dataset", gt=0, no_effect={"max_steps!=-1": "--max_steps says how long"}
    )
    max_steps: int = arg(-1, "optimiser steps; above 0 it wins over --num_train_epochs", ge=-1, example="1000")
    per_device_train_batch_size: int = arg(1, "rows per worker and forward pass", ge=1)
    gradient_accumulation_steps: int | None = arg(
        None, "forward passes per optimiser step", ge=1, shown="what makes the global batch at least 16"
    )
    max_epochs: float | None = arg(
        None, "most passes over the dataset, also with --max_steps", gt=0, shown="no limit", example="5",
        no_effect={"streaming=true": "the epochs of a stream are not known: --max_steps says how long"},
    )  # fmt: skip
    learning_rate: float | None = arg(
        None, "peak learning rate", ge=0, shown="1e-4; 1e-5 with --train_type full", example="1e-4"
    )
    lr_scheduler_type: str = arg("cosine", "shape of the learning rate over time")
    lr_scheduler_kwargs: dict[str, Any] = arg({}, "settings of that shape, as JSON")
    warmup_ratio: float = arg(0.0, "share of the steps in which the learning rate rises", ge=0, le=1)
    warmup_steps: int | float = arg(0, "steps in which the learning rate rises", ge=0)
    optim: str = arg("adamw_torch", "optimiser", shown="adamw_torch; without DeepSpeed adamw_torch_fused")
    weight_decay: float = arg(0.1, "weight decay", ge=0)
    adam_beta1: float = arg(0.9, "Adam's decay of the mean", ge=0, lt=1)
    adam_beta2: float = arg(0.95, "Adam's decay of the variance", ge=0, lt=1)
    adam_epsilon: float = arg(1e-8, "Adam's term against division by zero", gt=0)
    max_grad_norm: float = arg(1.0, "gradients are clipped to this norm; 0 for never", ge=0)
    router_aux_loss_coef: float = arg(
        0.0, "mixtures of experts: weight of the loss that keeps the experts equally busy", ge=0, example="0.001",
        no_effect={"command=rlhf": "pairs are compared as they are"},
    )  # fmt: skip
    gradient_checkpointing: bool | None = arg(
        None, "compute activations twice to save memory", parse=read_auto, shown="auto: where they would not fit"
    )
    gradient_checkpointing_kwargs: dict[str, Any] = arg(
        {}, "settings of gradient checkpointing, as JSON",
        no_effect={"gradient_checkpointing=false": "only with --gradient_checkpointing true"},
    )  # fmt: skip
    torch_compile: bool = arg(False, "compile each layer: seconds before the first step, faster ones after it")
    torch_compile_backend: str | None = arg(
        None, "what compiles; with it --torch_compile is on", shown="inductor", example="aot_eager"
    )
    torch_compile_mode: str | None = arg(
        None, "how long inductor tries; with it --torch_compile is on", shown="default",
        choices=("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"),
    )  # fmt: skip
    fp8: bool = arg(
        False, "full training on GPUs from Ada and Hopper on: the products inside the layers in float8, with torchao; "
        "compiled, as --torch_compile does",
    )  # fmt: skip
    pure_bf16: bool = arg(
        False, "full training: weights, gradients and optimiser in bfloat16 alone, as SWIFT has them: half of "
        "their memory, a higher loss", no_effect={"train_type!=full": "only with --train_type full"},
    )  # fmt: skip
    seed: int = arg(42, "seed of training", ge=0)
    deepspeed: str | dict[str, Any] | None = arg(
        None, f"{', '.join(DEEPSPEED_PRESETS)}, JSON, or a .json file", parse=read_deepspeed, example="zero2"
    )
    zero_hpz_partition_size: int | None = arg(
        None,
        "ZeRO-3: workers that share one secondary copy of the weights",
        ge=1,
        no_effect={"deepspeed=none": "only with --deepspeed zero3"},
    )

    def problems(self) -> Iterator[str]:
        if self.max_steps == 0:
            yield "--max_steps 0: expected -1 (as many as --num_train_epochs takes) or at least 1"
        if self.warmup_ratio and self.warmup_steps:
            ratio, steps = self.warmup_ratio, self.warmup_steps
            yield f"--warmup_ratio {ratio:g} contradicts --warmup_steps {steps:g}: give one of the two"
        if self.deepspeed and self.training_args.get("fsdp"):
            yield "--deepspeed contradicts --fsdp: both shard the model, give one of the two"
        if self.zero_hpz_partition_size and self.zero_stage != 3:
            yield "--zero_hpz_partition_size needs --deepspeed zero3"
        if self.zero_stage == 3 and (self.torch_compile or self.torch_compile_backend or self.torch_compile_mode):
            yield "--torch_compile contradicts --deepspeed zero3, which gathers weights inside each layer: use zero2"
        if self.torch_compile_mode and self.torch_compile_backend not in (None, "inductor"):
            yield f"--torch_compile_mode contradicts --torch_compile_backend {self.torch_compile_backend}: drop one"
        if self.fp8 and (getattr(self, "train_type", "full") != "full" or self.deepspeed):
            yield "--fp8 true is for --train_type full without --deepspeed: frozen weights gain little, ZeRO is untried"
        if self.pure_bf16 and getattr(self, "train_type", "full") == "full":
            if self.deepspeed:
                yield "--pure_bf16 true contradicts --deepspeed, which trains float32 weights; drop one of the two"
            if self.training_args.get("fp16"):
                yield "--pure_bf16 true contradicts --fp16 true: drop one of the two"
            if (dtype := getattr(self, "torch_dtype", None)) not in (None, "bfloat16"):
                yield f"--pure_bf16 true contradicts --torch_dtype {dtype}: drop one of the two"
        for flag, mend in _NOT_BUILT.items():
            if self.training_args.get(flag) and not (flag == "fsdp" and self.deepspeed):
                yield f"--{flag}: {mend}"
        if self.zero_stage == 3 and isinstance(self.deepspeed, dict):
            init = str(getattr(self, "init_weights", "true"))
            gathers = self.deepspeed["zero_optimization"].get("stage3_gather_16bit_weights_on_model_save")
            if init.startswith(("pissa", "olora")) and not gathers:
                yield (f"--init_weights {init} needs stage3_gather_16bit_weights_on_model_save in --deepspeed: what it "
                       "took off the model is saved with the adapter")  # fmt: skip
        fp16, bf16 = self.training_args.get("fp16"), self.training_args.get("bf16")
        dtype = getattr(self, "torch_dtype", None)
        if fp16 and bf16:
            yield "--fp16 true contradicts --bf16 true: give one of the two"
        for flag, on, other in (("--fp16", fp16, "bfloat16"), ("--bf16", bf16, "float16")):
            if on and dtype == other:
                yield f"{flag} true contradicts --torch_dtype {other}: drop one of the two"

    @property
    def zero_stage(self) -> int | None:
        """The ZeRO stage that ``deepspeed`` asks for, None without DeepSpeed."""
        if isinstance(self.deepspeed, dict):
            stage = self.deepspeed.get("zero_optimization", {}).get("stage", 0)
            return stage if isinstance(stage, int) else None
        return int(self.deepspeed[4]) if self.deepspeed else None

    def remarks(self) -> Iterator[str]:
        if self.deepspeed == "zero0":
            yield "--deepspeed zero0: shards nothing, so this is plain data parallel training, without DeepSpeed"

    def resolve(self) -> None:
        # In bfloat16 DeepSpeed's ZeRO-0 optimiser begins with a step of zero gradients: its first updates are too small
        # by a quarter (DeepSpeed#7839).
        if self.deepspeed == "zero0":
            self.deepspeed = None
        self.torch_compile |= bool(self.torch_compile_backend or self.torch_compile_mode or self.fp8)
        if not self.is_set("learning_rate"):
            self.learning_rate = 1e-5 if getattr(self, "train_type", "lora") == "full" else 1e-4


_PADDED = "the texts of this --task_type are padded"
SAMPLING_STRATEGIES = ("random", "sequential", "group_by_length")


@dataclass(init=False, repr=False, eq=False)
class BatchingArguments(Arguments):
    """How rows become batches."""

    topic: ClassVar[str] = "Batches"

    train_dataloader_shuffle: bool = arg(True, "shuffle the batches of each epoch")
    group_by_length: bool = arg(
        False, "rows of like length in one batch, as --train_sampling_strategy group_by_length",
        no_effect={
            "streaming=true": "the lengths of a stream are not known",
            "packing=true": "packs are of one length",
        },
    )  # fmt: skip
    dataloader_num_workers: int | None = arg(
        None,
        "processes that feed each worker",
        ge=0,
        shown="Ray Data's",
        no_effect="rows are encoded by Ray on all cores",
    )
    lazy_tokenize: bool | None = arg(None, "encode rows when they are needed instead of before", shown="false")
    packing: bool | None = arg(
        None,
        "fill each sequence with several rows; false: never join rows; auto: join the rows of a step to fewer forward "
        "passes where they are short and the model trains each as if alone",
        parse=read_auto,
        shown="auto",
        no_effect={"task_type!=causal_lm": _PADDED},
    )
    packing_length: int | None = arg(
        None, "length of a packed sequence", ge=1, shown="--max_length",
        no_effect={"packing!=true": "only with --packing true"},
    )  # fmt: skip
    padding_free: bool = arg(
        False, "join the rows of a batch instead of padding them",
        no_effect={
            "packing=true": "--packing joins rows already", "command=rlhf": "pairs are padded",
            "task_type!=causal_lm": _PADDED,
        },
    )  # fmt: skip

    def problems(self) -> Iterator[str]:
        if self.packing and self.lazy_tokenize:
            yield "--packing true contradicts --lazy_tokenize true: packing needs every row's length; drop one"
        if self.lazy_tokenize and getattr(self, "streaming", False):
            yield "--lazy_tokenize true contradicts --streaming true: a stream is always encoded late; drop one"
        if self.lazy_tokenize and getattr(self, "cached_dataset", None):
            yield "--lazy_tokenize true contradicts --cached_dataset: its rows are encoded already; drop one"
        sampling = "group_by_length" if self.group_by_length else self.training_args.get("train_sampling_strategy")
        if sampling not in (None, *SAMPLING_STRATEGIES):
            yield f"--train_sampling_strategy {sampling}: choose from {', '.join(SAMPLING_STRATEGIES)}"
        if self.lazy_tokenize and sampling == "group_by_length":
            yield (
                "--lazy_tokenize true contradicts --train_sampling_strategy group_by_length: "
                "it needs every row's length; drop one"
            )

    def resolve(self) -> None:
        if self.group_by_length:
            self.training_args = {**self.training_args, "train_sampling_strategy": "group_by_length"}


@dataclass(init=False, repr=False, eq=False)
class CheckpointArguments(ResumeArguments):
    """Evaluation, checkpoints, logs."""

    topic: ClassVar[str] = "Evaluation, checkpoints and logs"

    output_dir: str | None = arg(None, "folder of the results", shown="output/<model>")
    add_version: bool = arg(True, "put each run into its own v{N}-{date} folder")
    eval_strategy: str | None = arg(
        None,
        "when to evaluate",
        choices=("no", "steps", "epoch"),
        aliases=("evaluation_strategy",),
        shown="--save_strategy; no without validation rows",
        no_effect=_EVALUATED,
    )
    eval_steps: int | float | None = arg(
        None, "steps between evaluations", gt=0, shown="--save_steps", example="100",
        no_effect={"eval_strategy=no|epoch": "only with --eval_strategy steps",
                   "eval_async=true": "every checkpoint is evaluated", **_EVALUATED},
    )  # fmt: skip
    eval_on_start: bool = arg(False, "evaluate before the first step", no_effect=_EVALUATED)
    per_device_eval_batch_size: int = arg(
        1, "rows per worker and forward pass in evaluation", ge=1, no_effect=_EVALUATED
    )
    eval_metric: str | None = arg(
        None, "metrics of evaluation", choices=("acc", "infonce", "paired", "reranker"), swift_only=("nlg",),
        aliases=("metric",), shown="those of --task_type; embedding: infonce with --loss_type infonce, else paired",
        no_effect={"task_type!=embedding": "the metrics of the task are always measured"},
    )  # fmt: skip
    early_stop_interval: int | None = arg(
        None, "stop after as many evaluations without a better --metric_for_best_model", ge=1, shown="never",
        example="3", no_effect=_EVALUATED,
    )  # fmt: skip
    save_strategy: str = arg("steps", "when to save a checkpoint", choices=("no", "steps", "epoch", "best"))
    save_steps: int | float = arg(
        500, "steps between checkpoints", gt=0,
        no_effect={"save_strategy!=steps eval_strategy!=steps": "only with --save_strategy steps"},
    )  # fmt: skip
    save_total_limit: int | None = arg(None, "checkpoints to keep (the best and the newest)", ge=1, shown="all")
    save_only_model: bool = arg(False, "save no optimiser state: a run that goes on begins with a new one")
    metric_for_best_model: str = arg("loss", "evaluation metric that picks the best checkpoint", no_effect=_EVALUATED)
    greater_is_better: bool | None = arg(
        None, "whether a higher metric is better", shown="false for losses", no_effect=_EVALUATED
    )
    load_best_model_at_end: bool = arg(False, "the best checkpoint is the result, not the last one")
    create_checkpoint_symlink: bool = arg(False, "make best and last links in the output folder")
    logging_steps: int = arg(5, "steps between log lines", ge=1)
    logging_first_step: bool = arg(True, "log the first step too")
    report_to: list[str] = arg(
        ["tensorboard"], "where metrics go", choices=("tensorboard", "wandb", "swanlab", "all", "none")
    )

    def problems(self) -> Iterator[str]:
        if self.load_best_model_at_end and (self.eval_strategy == "no" or self._no_validation()):
            cause = (
                "--eval_strategy no" if self.eval_strategy == "no" else "--split_dataset_ratio 0 without --val_dataset"
            )
            yield f"--load_best_model_at_end true contradicts {cause}: without evaluation there is no best checkpoint"
        elif self.load_best_model_at_end and self.save_strategy == "no":
            yield "--load_best_model_at_end true contradicts --save_strategy no: there is no checkpoint to load"
        elif self.load_best_model_at_end and self._best_may_not_be_saved():
            yield (f"--load_best_model_at_end true contradicts --save_steps {self.save_steps} with --eval_steps "
                   f"{self.eval_steps}: the best step would not be saved; make --save_steps a multiple")  # fmt: skip

        metric = self.metric_for_best_model.removeprefix("eval_")
        if metric not in (known := self.metric_names()):
            yield f"--metric_for_best_model {self.metric_for_best_model}: choose from {', '.join(known)}"
        tokens = self.training_args.get("include_num_input_tokens_seen", "no")
        if str(tokens).lower() not in ("true", "false", "all", "non_padding", "no"):
            yield f"--include_num_input_tokens_seen {tokens}: choose from no, all, non_padding"

    def remarks(self) -> Iterator[str]:
        if self.save_strategy == "best" and self._no_validation():
            yield "--save_strategy best: without validation rows the last step alone is saved"

    def metric_names(self) -> tuple[str, ...]:
        """What an evaluation measures."""
        return ("loss", "token_acc")

    def _best_may_not_be_saved(self) -> bool:
        by_steps = self.save_strategy == "steps" and self.eval_strategy in (None, "steps")
        evaluated = self.eval_steps or self.save_steps
        # Below 1 they are shares of the run, which is not known here.
        return by_steps and min(evaluated, self.save_steps) >= 1 and self.save_steps % evaluated != 0

    def _no_validation(self) -> bool:
        held_out = 0 if getattr(self, "streaming", False) else getattr(self, "split_dataset_ratio", 0)
        own = getattr(self, "val_dataset", None) or getattr(self, "cached_val_dataset", None)
        return not own and not held_out

    def resolve(self) -> None:
        if not self.is_set("output_dir"):
            self.output_dir = os.path.join("output", getattr(self, "model_suffix", "model"))
        if not self.is_set("eval_steps"):
            self.eval_steps = self.save_steps


@dataclass(init=False, repr=False, eq=False)
class TrainingRules(ModelArguments, DatasetArguments, TemplateArguments, OptimizerArguments):
    """What training needs as a whole."""

    def problems(self) -> Iterator[str]:
        if not self.model and not (self.load_args and self.adapters):
            yield "--model is required, for example --model Qwen/Qwen2.5-7B-Instruct"
        if not self.dataset and not self.cached_dataset:
            yield "--dataset is required, for example --dataset train.jsonl"
        if self.new_special_tokens and self.zero_stage == 3 and getattr(self, "train_type", "full") == "lora":
            yield "--new_special_tokens contradicts --deepspeed zero3: its workers hold parts of rows; give zero2"
        if self.streaming and self.cached_dataset:
            yield "--streaming true contradicts --cached_dataset: what is encoded needs no stream; drop one"
        if self.streaming and self.max_steps <= 0:
            yield "--streaming true needs --max_steps: a stream's length is not known, for example --max_steps 1000"

    def resolve(self) -> None:
        for flag, dtype in (("fp16", "float16"), ("bf16", "bfloat16")):
            if self.training_args.get(flag) and "torch_dtype" not in self.given:
                self.torch_dtype = dtype
        if self.pure_bf16 and getattr(self, "train_type", "full") == "full":
            self.torch_dtype = "bfloat16"

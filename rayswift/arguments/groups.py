"""The settings that several commands share: model, dataset, template."""

# ruff: noqa: RUF009 (arg() makes a dataclass field: it is meant to be called in the class body)
from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

from rayswift.arguments.base import Arguments
from rayswift.arguments.fields import arg, read_json, read_lines, read_text_file

_ALL_ROWS = "every row is read, once, in its order"
#: What a model is trained for. ``causal_lm`` writes text; the others read texts and tell numbers.
TASK_TYPES = ("causal_lm", "seq_cls", "embedding", "reranker", "generative_reranker")
#: What the head of a ``seq_cls`` model tells: a class, several, or numbers.
PROBLEM_TYPES = ("single_label_classification", "multi_label_classification", "regression")
_CLASSIFIER = {
    "task_type!=seq_cls": "only with --task_type seq_cls",
    "command=infer|deploy|app|sample|eval": "the checkpoint says it",
    "command=export to_cached_dataset=false": "the checkpoint says it",
}


DTYPES = ("bfloat16", "float16", "float32")
#: As the args.json of ms-swift 3 has them.
DTYPE_NAMES = {f"torch.{name}": name for name in DTYPES}
_HUB_ENV = "USE_HF"
ROPE_SCALINGS = ("linear", "dynamic", "yarn")
_MIXED = {"interleave_prob=none": "only with --interleave_prob", "command=infer|sample": _ALL_ROWS}
#: Rules for flags about a model of one's own: beside an endpoint, its server has decided.
SERVED_ELSEWHERE = {
    "base_url!=none": "the server at --base_url decides",
    "eval_url!=none": "the server at --eval_url decides",
}
#: … and for those of them that matter there, too.
SERVED_TOO = dict.fromkeys(SERVED_ELSEWHERE, "")
CHAT = "command=infer val_dataset=none dataset=none load_data_args=false"
#: Rules of what only answers to the rows of a dataset have.
ASKED_ROWS = {CHAT: "only with --val_dataset"}
#: Rules of what is about a hub: a model that is served elsewhere comes from none, the rows that ask it may.
_NOTHING_OF_A_HUB = {
    **SERVED_TOO,
    **dict.fromkeys((f"{CHAT} base_url!=none", "command=app base_url!=none"), SERVED_ELSEWHERE["base_url!=none"]),
}
#: Rules of the parts of `rayswift export`.
_CALIBRATED = "command=export to_cached_dataset=false quant_method!=gptq|awq"
_LAID_OUT = f"{_CALIBRATED} to_ollama=false"
_OF_ROWS = {_LAID_OUT: "", _CALIBRATED: "only with --to_cached_dataset true or --quant_method gptq or awq"}
_ENCODED = {
    **dict.fromkeys(_OF_ROWS, ""), "command=export to_cached_dataset=false": "only with --to_cached_dataset true",
}  # fmt: skip
_MERGED = "only with --merge_lora true"
#: A folder that is there is pushed; the same, or one that is made as GGUF.
NOTHING_MADE = (
    "command=export merge_lora=false quant_method=none to_cached_dataset=false to_ollama=false to_peft_format=false "
    "to_gguf=none"
)
_AS_IT_IS = NOTHING_MADE.removesuffix(" to_gguf=none")


def read_rope_scaling(raw: Any) -> str | dict[str, Any]:
    """The name of a way to scale positions, or the ``rope_scaling`` of a config.json as JSON."""
    if raw in ROPE_SCALINGS:
        return str(raw)
    try:
        value = read_json(raw)
    except ValueError:
        raise ValueError(f"choose from {', '.join(ROPE_SCALINGS)}, or give JSON") from None
    if "rope_type" not in value and "type" not in value:
        raise ValueError('expected a "rope_type"')
    return value


@dataclass(init=False, repr=False, eq=False)
class ModelArguments(Arguments):
    """Which model, from where, in which precision."""

    topic: ClassVar[str] = "Model"
    decides: ClassVar[str] = "answers"
    no_effect: ClassVar[dict[str, str]] = SERVED_ELSEWHERE

    model: str | None = arg(None, "model id on the hub, or a local folder", no_effect="")
    model_type: str | None = arg(
        None, "model family", shown="found from the model's config", no_effect="the model's config.json says it"
    )
    model_revision: str | None = arg(None, "branch, tag or commit on the hub", shown="the hub's default branch")
    task_type: str = arg(
        "causal_lm",
        "what the model is trained or run for: text, classes, vectors, or the order of documents",
        choices=TASK_TYPES,
        swift_only=("decision",),
        no_effect=_ENCODED,
    )
    num_labels: int | None = arg(None, "classes, or numbers, that the model tells", ge=1, example="2",
                                 no_effect=_CLASSIFIER)  # fmt: skip
    problem_type: str | None = arg(
        None, "what a label is: one class, several classes, or numbers", choices=PROBLEM_TYPES,
        shown="single_label_classification; regression with --num_labels 1", no_effect=_CLASSIFIER,
    )  # fmt: skip
    torch_dtype: str | None = arg(
        None, "precision of the loaded weights", choices=DTYPES, value_aliases=DTYPE_NAMES,
        shown="as in the model's config",
        no_effect={"command=export merge_lora=false quant_method=none": f"{_MERGED} or --quant_method"},
    )  # fmt: skip
    attn_impl: str | None = arg(
        None, "attention implementation", shown="Transformers' choice",
        value_aliases={"flash_attn": "flash_attention_2", "flash_attention": "flash_attention_2"},
        choices=("sdpa", "eager", "flash_attention_2", "flash_attention_3", "flash_attention_4", "flex_attention"),
        no_effect={
            "command=export": "weights are converted, whatever attends",
            "engine=vllm command=infer|sample|deploy|app|eval": "vLLM takes its own",
        },
    )  # fmt: skip
    experts_impl: str | None = arg(
        None, "how the experts of a mixture are computed", shown="Transformers' choice",
        choices=("eager", "batched_mm", "grouped_mm"), decides="",
        no_effect={
            "command=export": "weights are converted, whatever computes",
            "engine=vllm command=infer|sample|deploy|app|eval": "vLLM takes its own",
        },
    )  # fmt: skip
    rope_scaling: str | dict[str, Any] | None = arg(
        None, "longer positions: linear, dynamic, yarn (with --max_model_len), or the model's rope_scaling as JSON",
        parse=read_rope_scaling, shown="as in the model's config", example="yarn",
        no_effect={"command=export merge_lora=false": _MERGED},
    )  # fmt: skip
    max_model_len: int | None = arg(
        None, "positions that the model has, instead of those in its config", ge=1, example="65536",
        no_effect={"command=export merge_lora=false to_cached_dataset=false": f"{_MERGED} or --to_cached_dataset true"},
    )  # fmt: skip
    new_special_tokens: list[str] = arg(
        [], "tokens to add to the vocabulary, or a .txt file with one per line", parse=read_lines,
        no_effect={"command=export merge_lora=false to_cached_dataset=false": f"{_MERGED} or --to_cached_dataset true"},
    )  # fmt: skip
    model_kwargs: dict[str, Any] = arg(
        {}, "further keyword arguments for loading the model, as JSON",
        no_effect={"engine=vllm command=infer|sample|deploy|app|eval": "vLLM loads it: --vllm_engine_kwargs",
                   "command=export": "weights are converted as they are"},
    )  # fmt: skip
    adapters: list[str] = arg(
        [], "LoRA checkpoint folders or ids (deploy: name=path)", aliases=("lora_modules",),
        no_effect={"base_url!=none": "",
                   "command=export to_cached_dataset=true": "rows are encoded for --model"},
    )  # fmt: skip
    load_args: bool = arg(
        True, "read model, template and system from the checkpoint's args.json",
        no_effect={"command=export to_cached_dataset=true": "rows are encoded as training does, by the flags alone",
                   _AS_IT_IS: "only where a model is loaded, not to push one or write GGUF"},
    )  # fmt: skip
    load_data_args: bool = arg(
        False, "read the dataset settings from it too",
        no_effect={"command=deploy|app|eval": "a server has no dataset",
                   "command=export quant_method!=gptq|awq": "only with --quant_method gptq or awq"},
    )  # fmt: skip
    use_hf: bool = arg(
        False, "use the Hugging Face hub instead of ModelScope", shown="false; true if USE_HF=1 is set",
        no_effect={
            **_NOTHING_OF_A_HUB,
            "eval_url!=none eval_backend!=native": "only with --eval_backend Native, or a model that is started here",
        },
    )  # fmt: skip
    hub_token: str | None = arg(
        None, "access token for the hub", example="TOKEN", decides="",
        no_effect={**_NOTHING_OF_A_HUB, "eval_url!=none": SERVED_ELSEWHERE["eval_url!=none"]},
    )  # fmt: skip
    trust_remote_code: bool = arg(
        False,
        "run Python code that comes with a model",
        no_effect={_AS_IT_IS: "only where a model is loaded, not to push one or write GGUF"},
    )
    external_plugins: list[str] = arg(
        [], "Python files to import first (they register datasets and rewards)", aliases=("custom_register_path",),
        no_effect={
            **SERVED_TOO,
            **ASKED_ROWS,
            **_OF_ROWS,
            "command=deploy|app|eval": "they register datasets and rewards, and a server has none"
        },
    )  # fmt: skip

    def problems(self) -> Iterator[str]:
        for path in self.external_plugins:
            if not os.path.isfile(path):
                yield f"--external_plugins {path}: no such file"

    def resolve(self) -> None:
        if not self.is_set("use_hf"):
            self.use_hf = os.environ.get(_HUB_ENV, "").strip().lower() in ("1", "true", "yes")
        if self.experts_impl:  # Transformers' name for it, where the model is loaded
            self.model_kwargs = {**self.model_kwargs, "experts_implementation": self.experts_impl}
        given = {"rope_scaling": self.rope_scaling, "max_model_len": self.max_model_len}
        self.model_kwargs = {**self.model_kwargs, **{name: value for name, value in given.items() if value is not None}}

    @property
    def positions(self) -> dict[str, Any]:
        """What is given of ``rope_scaling`` and ``max_model_len``."""
        return {
            name: self.model_kwargs[name] for name in ("rope_scaling", "max_model_len") if name in self.model_kwargs
        }

    @property
    def model_suffix(self) -> str:
        """The last part of the model's id or path (of the adapter's without a model): names output folders."""
        name = self.model or next(iter(self.adapters), "")
        return os.path.basename(name.rstrip("/\\")) or "model"


@dataclass(init=False, repr=False, eq=False)
class DatasetArguments(Arguments):
    """Which rows, how many, in which order."""

    topic: ClassVar[str] = "Dataset"
    decides: ClassVar[str] = "answers"
    no_effect: ClassVar[dict[str, str]] = {**ASKED_ROWS, **_OF_ROWS}

    dataset: list[str] = arg(
        [], "dataset ids, files or folders, each [HF::|MS::]NAME[:SUBSET][#ROWS]", example="train.jsonl",
        no_effect={"command=infer val_dataset!=none": "the rows of --val_dataset are answered"},
    )  # fmt: skip
    cached_dataset: list[str] = arg(
        [], "folders of encoded rows (rayswift export --to_cached_dataset true)", example="cached_dataset",
        no_effect={"command=infer|sample": "its rows are token ids, which cannot be asked"},
    )  # fmt: skip
    cached_val_dataset: list[str] = arg(
        [], "the same, for validation", example="cached_dataset/val", decides="",
        no_effect={"command=infer|sample": "its rows are token ids, which cannot be asked", **_ENCODED},
    )  # fmt: skip
    val_dataset: list[str] = arg(
        [], "validation datasets, written like --dataset", example="val.jsonl",
        no_effect={"command=sample": "the rows of --dataset are answered", **_ENCODED},
    )  # fmt: skip
    split_dataset_ratio: float = arg(
        0.01, "share of --dataset held out where no --val_dataset is given", ge=0, lt=1,
        no_effect={
            "val_dataset!=none": "only without --val_dataset",
            "cached_val_dataset!=none": "only without --cached_val_dataset",
            "streaming=true": "a stream holds nothing out: give --val_dataset",
            "command=infer|sample": _ALL_ROWS,
            **_ENCODED,
        },
    )  # fmt: skip
    dataset_shuffle: bool = arg(
        True, "shuffle the training rows",
        no_effect={
            "interleave_prob!=none streaming=false": "the mix of --interleave_prob has an order of its own",
            "command=infer": "answers keep the order of the rows; see --val_dataset_shuffle",
        },
    )  # fmt: skip
    val_dataset_shuffle: bool = arg(
        False, "shuffle the validation rows", no_effect={"command=sample": "see --dataset_shuffle", **_ENCODED}
    )
    data_seed: int = arg(
        42, "seed of sampling, splitting and shuffling",
        no_effect={"command=infer val_dataset_shuffle=false": "only with --val_dataset_shuffle true"},
    )  # fmt: skip
    dataset_num_proc: int = arg(
        1, "processes that preprocess rows", ge=1, decides="", no_effect="rows are encoded by Ray on all cores"
    )
    streaming: bool = arg(
        False,
        "read the dataset as a stream; needs --max_steps",
        no_effect={
            "command=infer|sample": _ALL_ROWS,
            "command=export": "the whole dataset is read once",
        },
    )
    shuffle_buffer_size: int = arg(
        1000,
        "rows held for shuffling a stream",
        ge=1,
        no_effect={
            "streaming=false": "only with --streaming true",
            "command=infer|sample": _ALL_ROWS,
            "command=export": "the whole dataset is read once",
        },
    )
    interleave_prob: list[float] | None = arg(
        None,
        "mix the datasets with these probabilities, one each",
        ge=0,
        le=1,
        shown="one after the other",
        example="0.7 0.3",
        no_effect={"command=infer|sample": _ALL_ROWS},
    )
    stopping_strategy: str = arg(
        "first_exhausted",
        "when mixing ends",
        choices=("first_exhausted", "all_exhausted"),
        no_effect={**_MIXED, "streaming=true": "a stream's datasets begin again until --max_steps"},
    )
    interleave_by: str = arg("rows", "what --interleave_prob is a share of", choices=("rows", "tokens"),
                             no_effect=_MIXED)  # fmt: skip
    columns: dict[str, Any] = arg(
        {}, "columns to rename before the row format is recognised, as JSON", example='\'{"text1": "query"}\''
    )
    strict: bool = arg(False, "stop at the first bad row instead of counting and skipping it", decides="")
    model_name: list[str] = arg([], "self-cognition: the model's name (Chinese, English)")
    model_author: list[str] = arg([], "self-cognition: the author's name (Chinese, English)")
    custom_dataset_info: list[str] = arg([], "dataset_info.json files, or JSON text")
    download_mode: str = arg(
        "reuse_dataset_if_exists",
        "what to do with a dataset already downloaded",
        choices=("reuse_dataset_if_exists", "force_redownload"),
        no_effect="what changed on the hub is downloaded again, the rest never",
    )
    load_from_cache_file: bool = arg(
        True,
        "reuse rows and tokens of unchanged data",
        aliases=("enable_cache",),
        decides="",
        no_effect={"command=infer|sample": "rows are read as they are"},
    )
    remove_unused_columns: bool = arg(
        True, "drop columns that the model does not take", no_effect={"command=export": "tokens alone are kept"}
    )

    def problems(self) -> Iterator[str]:
        weights, names = self.interleave_prob, self.dataset
        if weights is not None and len(weights) != len(names):
            yield (f"--interleave_prob has {len(weights)} values but --dataset names {len(names)}: "
                   "give one probability per dataset")  # fmt: skip
        elif weights is not None and abs(sum(weights) - 1) > 1e-3:
            yield f"--interleave_prob adds up to {sum(weights):g}: the probabilities must add up to 1"
        if self.interleave_by == "tokens":
            if getattr(self, "lazy_tokenize", False):
                yield "--interleave_by tokens contradicts --lazy_tokenize true: it needs every row's length; drop one"
            if self.streaming and not getattr(self, "packing", False):
                yield ("--interleave_by tokens contradicts --streaming true: a stream's lengths are not known; add "
                       "--packing true, whose packs are of one length")  # fmt: skip
        for info in self.custom_dataset_info:
            if not info.lstrip().startswith(("[", "{")) and not os.path.isfile(info):
                yield f"--custom_dataset_info {info}: no such file"


@dataclass(init=False, repr=False, eq=False)
class TemplateArguments(Arguments):
    """How a conversation becomes token ids."""

    topic: ClassVar[str] = "Template"
    decides: ClassVar[str] = "answers"
    no_effect: ClassVar[dict[str, str]] = {
        **SERVED_ELSEWHERE,
        _LAID_OUT:
            "only with --to_cached_dataset true, --to_ollama true or --quant_method gptq or awq",
    }  # fmt: skip

    template: str | None = arg(None, "chat template name", shown="found from the model")
    system: str | None = arg(
        None, "system prompt, or a .txt file that holds it", parse=read_text_file, shown="the template's",
        no_effect={
            **SERVED_TOO,
            "eval_url!=none eval_backend!=native": "only with --eval_backend Native, or a model that is started here",
        },
    )  # fmt: skip
    max_length: int | None = arg(None, "longest sequence, in tokens", ge=1, shown="the model's maximum")
    truncation_strategy: str = arg(
        "delete",
        "what happens to longer rows",
        choices=("delete", "left", "right", "split"),
        no_effect={
            "command=infer|deploy|app|sample|eval": "a prompt that is too long is refused, never cut",
            **_OF_ROWS,
        },
    )
    use_chat_template: bool = arg(True, "apply the chat template; false trains on plain text")
    template_backend: str = arg("swift", "template engine", choices=("swift", "jinja"))
    template_date: str | None = arg(
        None, "day (YYYY-MM-DD) that templates with a date in their prompt show", shown="2024-07-26"
    )
    loss_scale: str = arg(
        "default", "which tokens are trained, and how strongly",
        no_effect={"command=infer|deploy|app|sample|eval": "nothing is trained", **_ENCODED},
    )  # fmt: skip
    enable_thinking: bool | None = arg(None, "thinking mode of the template", shown="the model's")
    add_non_thinking_prefix: bool = arg(
        True, "add the empty thinking block to answers without one",
        no_effect=dict.fromkeys(
            ("command=app|sample|eval", "command=infer|deploy task_type=causal_lm", "command=export to_ollama=true"),
            "a prompt has no answer to mark",
        ),
    )  # fmt: skip
    agent_template: str | None = arg(
        None, "format of tools and tool calls", aliases=("tools_prompt",), shown="the model's",
        no_effect={"base_url!=none": "", f"{CHAT} base_url=none": "a conversation in the terminal has no tools"},
    )  # fmt: skip
    response_prefix: str | None = arg(
        None, "text that every answer starts with", shown="the template's",
        no_effect={"command=export quant_method=gptq|awq": "rows have their answers"},
    )  # fmt: skip
    padding_side: str = arg(
        "right",
        "where short rows are padded",
        choices=("left", "right"),
        no_effect="training pads on the right, generation on the left",
    )


#: What Ray takes as a label's key, and as what is asked of its value.

"""Models that tell numbers instead of text (``--task_type``): how they are loaded, where they look, what is saved."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from rayswift.console import say
from rayswift.errors import UserError
from rayswift.modeling.adapter_folder import ADAPTER_WEIGHTS, read_adapter_config
from rayswift.modeling.loading import load_model, read_config, read_safetensors_header

#: Which tokens make the vector, by sentence-transformers' names.
_POOLINGS = {
    "pooling_mode_cls_token": "cls", "pooling_mode_mean_tokens": "mean", "pooling_mode_lasttoken": "last",
    "cls": "cls", "mean": "mean", "lasttoken": "last",
}  # fmt: skip
_MODULES = "modules.json"
_LIBRARY = "sentence_transformers.models"


def writes_text(model_dir: str) -> bool:
    """Whether the folder's model is a decoder that writes text, by its architecture."""
    names = read_config(model_dir).get("architectures") or [""]
    return str(names[0]).endswith(("ForCausalLM", "ForConditionalGeneration", "LMHeadModel"))


def reads_plain_texts(model_dir: str) -> bool:
    """Whether the model was made to read texts as its tokenizer gives them, without a chat template: an encoder, or a
    model of sentence-transformers that no run of ours made."""
    folder = Path(model_dir)
    is_ours = (folder / "args.json").is_file()
    return not is_ours and ((folder / _MODULES).is_file() or not writes_text(model_dir))


def settle_layout(args: Any, model_dir: str) -> None:
    """Have a model that was made to read plain texts read such (``use_chat_template``), unless the user says how."""
    if args.task_type != "causal_lm" and not args.is_set("use_chat_template") and reads_plain_texts(model_dir):
        args.use_chat_template = False
        say("texts are read as the model's tokenizer gives them (--use_chat_template true lays them out as chats)")


def auto_class_of(task_type: str, model_dir: str) -> str:
    """Transformers' class for training and running a task."""
    if task_type in ("seq_cls", "reranker"):
        return "AutoModelForSequenceClassification"
    return "AutoModel" if task_type == "embedding" and not writes_text(model_dir) else "AutoModelForCausalLM"


def load_task_model(
    model_dir: str, task_type: str, num_labels: int | None, problem_type: str | None, tokenizer: Any, **options: Any
) -> Any:
    """The model of a task, as :func:`load_model`; a head that the folder has not starts at random.

    What pads rows is told to the model, whose head looks at the last token before it.
    """
    kwargs = dict(options.pop("model_kwargs", None) or {})
    if is_classifier(task_type):
        kwargs["num_labels"] = 1 if task_type == "reranker" else num_labels
        if task_type == "seq_cls" and problem_type:
            kwargs["problem_type"] = problem_type
        use_own_pad(tokenizer)
    from transformers.utils import logging as transformers_logging

    verbosity = transformers_logging.get_verbosity()
    try:
        if is_classifier(task_type):  # a table would say that the head is new
            transformers_logging.set_verbosity_error()
        model = load_model(
            model_dir, auto_class=auto_class_of(task_type, model_dir), model_kwargs=kwargs,
            new_head=is_classifier(task_type), **options,
        )  # fmt: skip
    finally:
        transformers_logging.set_verbosity(verbosity)
    if is_classifier(task_type):
        model.config.pad_token_id = model.config.get_text_config().pad_token_id = tokenizer.pad_token_id
    return model


def is_classifier(task_type: str) -> bool:
    """Whether the task has a head of its own on the model."""
    return task_type in ("seq_cls", "reranker")


def use_own_pad(tokenizer: Any) -> None:
    """Pad with a token that ends no text, where there is one: heads of Transformers take the last token that is no
    padding for the text's last."""
    if tokenizer.pad_token_id is not None and tokenizer.pad_token_id != tokenizer.eos_token_id:
        return
    others = (tokenizer.unk_token, tokenizer.bos_token, *tokenizer.all_special_tokens)
    own = next((token for token in others if token and token != tokenizer.eos_token), None)
    if own is not None:
        tokenizer.pad_token = own


def classes_of_adapter(adapter_dir: str) -> int | None:
    """How many numbers the head that is saved with an adapter tells; None for an adapter without one."""
    if read_adapter_config(adapter_dir).get("task_type") != "SEQ_CLS":
        return None
    header = read_safetensors_header(Path(adapter_dir) / ADAPTER_WEIGHTS)
    ends = ("score.weight", "classifier.weight", "out_proj.weight")
    return next((tensor["shape"][0] for end in ends for name, tensor in header.items() if name.endswith(end)), None)


def pooling_of(model_dir: str) -> tuple[str, bool]:
    """Which tokens make the vector (``cls``, ``mean``, ``last``), and whether its length is 1.

    As the folder's sentence-transformers files say; else as vLLM takes it: the last token of a decoder, the first of an
    encoder, with length 1. Raises UserError for another pooling.
    """
    folder = Path(model_dir)
    modules = json.loads((folder / _MODULES).read_text()) if (folder / _MODULES).is_file() else []
    kinds = {str(module.get("type", "")).rpartition(".")[2]: module for module in modules}
    if (module := kinds.get("Pooling")) is None:
        return ("last" if writes_text(model_dir) else "cls"), True
    settings = json.loads((folder / str(module.get("path", "")) / "config.json").read_text())
    chosen = [key for key, value in settings.items() if key.startswith("pooling_mode_") and value is True]
    chosen = chosen or [str(settings.get("pooling_mode"))]
    if len(chosen) != 1 or chosen[0] not in _POOLINGS:
        raise UserError(f"--model {model_dir}: pooling by {', '.join(chosen)} needs --infer_backend vllm")
    return _POOLINGS[chosen[0]], "Normalize" in kinds


def pooled(states: Any, mask: Any, pooling: str) -> Any:
    """One vector a text.

    Args:
        states: (texts, length, size), padded on the right.
        mask: (texts, length), 1 where there is text.
        pooling: of :func:`pooling_of`.
    """
    import torch

    if pooling == "mean":
        return (states * mask[..., None].to(states.dtype)).sum(1) / mask.sum(1, keepdim=True).to(states.dtype)
    last = mask.sum(1) - 1 if pooling == "last" else torch.zeros_like(mask[:, 0])
    return states[torch.arange(len(states), device=states.device), last]


def write_sentence_transformers_files(folder: Path, model_dir: str, size: int) -> None:
    """Say in sentence-transformers' files which token makes the vector: those of the model that was trained, else the
    last token's with length 1."""
    base = Path(model_dir)
    if (base / _MODULES).is_file():
        parts = [str(module["path"]) for module in json.loads((base / _MODULES).read_text()) if module.get("path")]
        for name in (_MODULES, "config_sentence_transformers.json", "sentence_bert_config.json"):
            if (base / name).is_file():
                shutil.copyfile(base / name, folder / name)
        for part in parts:
            shutil.copytree(base / part, folder / part, dirs_exist_ok=True)
        return
    pooling, normal = pooling_of(model_dir)
    paths = {"Transformer": "", "Pooling": "1_Pooling"} | ({"Normalize": "2_Normalize"} if normal else {})
    modules = [{"idx": number, "name": str(number), "path": path, "type": f"{_LIBRARY}.{kind}"}
               for number, (kind, path) in enumerate(paths.items())]  # fmt: skip
    (folder / _MODULES).write_text(json.dumps(modules, indent=2))
    for path in filter(None, paths.values()):
        (folder / path).mkdir(exist_ok=True)
    names = {"cls": "cls_token", "mean": "mean_tokens", "last": "lasttoken"}
    settings = {"word_embedding_dimension": size} | {
        f"pooling_mode_{name}": kind == pooling for kind, name in names.items()
    }
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(settings, indent=2))

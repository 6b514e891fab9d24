"""The README.md of a pushed model: what it was made from and with, its losses and its scores."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import rayswift
from rayswift.files import parse_json
from rayswift.redaction import redact

#: In every card that was written here: such a card may be replaced, a person's own is kept.
_MARK = "<!-- written by rayswift export -->"
#: In the empty form that PEFT puts beside an adapter.
_PEFT_FORM = "<!-- Provide a quick summary of what the model is/does. -->"
#: The settings a reader asks for first, in this order; the whole list is args.json.
_SETTINGS = (
    "command", "train_type", "rlhf_type", "template", "system", "dataset", "val_dataset", "split_dataset_ratio",
    "max_length", "packing", "num_train_epochs", "max_steps", "learning_rate", "lr_scheduler_type", "warmup_ratio",
    "per_device_train_batch_size", "gradient_accumulation_steps", "weight_decay", "lora_rank", "lora_alpha",
    "lora_dropout", "target_modules", "use_rslora", "use_dora", "torch_dtype", "deepspeed", "loss_scale", "beta",
    "seed", "data_seed",
)  # fmt: skip
_SHOWN_STEPS = 10
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+", re.ASCII)


def needs_card(folder: str) -> bool:
    """Whether the folder has no README.md of a person's own."""
    path = Path(folder) / "README.md"
    if not path.is_file():
        return True
    text = path.read_text(encoding="utf-8", errors="replace")
    return _MARK in text or _PEFT_FORM in text


def model_card(folder: str, name: str, checkpoint: str) -> str:
    """The text of the card.

    Args:
        folder: what is pushed: an adapter, a model, a quantised model or GGUF files.
        name: ``owner/name`` on the hub.
        checkpoint: the training checkpoint it came from; its run directory has the losses.
    """
    saved = redact(_json(Path(folder) / "args.json") or _json(Path(checkpoint) / "args.json"))
    adapter, config = _json(Path(folder) / "adapter_config.json"), _json(Path(folder) / "config.json")
    base = saved.get("model") or adapter.get("base_model_name_or_path")
    parts = [_front_matter(base, saved, adapter, config), _MARK, f"# {name.split('/')[-1]}",
             _summary(base, saved, adapter, config)]  # fmt: skip
    if rows := [(key, _shown(saved[key])) for key in _SETTINGS if saved.get(key) not in (None, [], "")]:
        parts.append("## Settings\n\n" + _table(("setting", "value"), rows) + "\n\nAll of them: `args.json`.")
    parts += [section for section in (_losses(checkpoint), _scores(folder, checkpoint)) if section]
    return "\n\n".join(parts) + "\n"


def _front_matter(base: Any, saved: dict[str, Any], adapter: dict[str, Any], config: dict[str, Any]) -> str:
    import yaml

    matter: dict[str, Any] = {"library_name": "peft" if adapter else "transformers", "pipeline_tag": "text-generation"}
    matter["tags"] = ["rayswift", *(["lora"] if adapter else []), *_quantisation(config)[:1]]
    if isinstance(base, str) and _HUB_ID.fullmatch(base) and not os.path.exists(base):
        matter["base_model"] = base
    names = [str(item).split("::")[-1].split("#")[0].split(":")[0] for item in saved.get("dataset") or []]
    ids = [item for item in names if _HUB_ID.fullmatch(item) and not os.path.exists(item)]
    if ids:
        matter["datasets"] = ids
    return f"---\n{yaml.safe_dump(matter, sort_keys=False)}---"


def _quantisation(config: dict[str, Any]) -> list[str]:
    """Method and bits of a quantised model; empty for a plain one."""
    settings = config.get("quantization_config") or {}
    bits = settings.get("bits") or (4 if settings.get("load_in_4bit") else 8 if settings.get("load_in_8bit") else None)
    return [str(part) for part in (settings.get("quant_method"), f"{bits} bits" if bits else None) if part]


def _summary(base: Any, saved: dict[str, Any], adapter: dict[str, Any], config: dict[str, Any]) -> str:
    kind = "LoRA adapter" if adapter else "model"
    origin = f" of {_shown(base)}" if base else ""
    made = ", ".join(_quantisation(config))
    text = f"A {kind}{origin}" + (f", quantised ({made})" if made else "")
    if saved.get("command"):
        text += f", made with `rayswift {saved['command']}` and pushed with `rayswift export`"
    return f"{text} (RaySwift {rayswift.__version__})."


def _losses(checkpoint: str) -> str:
    """The run's losses at about ten steps, and at every evaluation."""
    rows = list(_log_rows(checkpoint))
    train = [row for row in rows if "loss" in row]
    evals = [row for row in rows if "eval_loss" in row]
    if not train and not evals:
        return ""
    stride = max(1, -(-len(train) // _SHOWN_STEPS))
    shown = train[::stride]
    if train and shown[-1] is not train[-1]:
        shown.append(train[-1])
    text = "## Losses\n\n" + _table(
        ("step", "loss", "token accuracy"),
        [(_step(row), f"{row['loss']:.4f}", _number(row.get("token_acc", row.get("acc")))) for row in shown],
    )
    if evals:
        text += "\n\n" + _table(
            ("step", "validation loss", "token accuracy"),
            [
                (_step(row), f"{row['eval_loss']:.4f}", _number(row.get("eval_token_acc", row.get("eval_acc"))))
                for row in evals
            ],
        )
    return text


def _log_rows(checkpoint: str) -> Iterator[dict[str, Any]]:
    """The rows of logging.jsonl beside the checkpoint up to its step; a broken line is passed over."""
    path = Path(checkpoint)
    last = int(path.name.rpartition("-")[2]) if re.fullmatch(r"checkpoint-\d+", path.name) else None
    for folder in (path, path.parent):
        if not (folder / "logging.jsonl").is_file():
            continue
        for line in (folder / "logging.jsonl").read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                row = json.loads(line)
                if last is None or int(str(row["global_step/max_steps"]).split("/")[0]) <= last:
                    yield row
            except (ValueError, KeyError, TypeError):
                continue
        return


def _scores(folder: str, checkpoint: str) -> str:
    """The benchmarks of ``eval_result.jsonl`` (``rayswift eval`` appends to it), the newest of each backend.

    A line is ``{BACKEND: {BENCHMARK: {METRIC: score}}, "eval_limit": …}`` (SWIFT's ``report`` for a backend as well).
    """
    found: dict[tuple[str, str, str], tuple[str, str]] = {}
    for place in dict.fromkeys((Path(checkpoint).parent, Path(checkpoint), Path(folder))):
        path = place / "eval_result.jsonl"
        for text in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else []:
            try:
                line = dict(json.loads(text))
            except (ValueError, TypeError):
                continue
            limit = line.get("eval_limit")
            for backend, report in line.items():
                for benchmark, metrics in report.items() if isinstance(report, dict) else []:
                    for metric, value in metrics.items() if isinstance(metrics, dict) else [("score", metrics)]:
                        by = f"{backend}, first {limit} questions" if limit else str(backend)
                        found[str(benchmark), str(metric), str(backend)] = (_number(value), by)
    rows = [(benchmark, metric, value, by) for (benchmark, metric, _), (value, by) in found.items() if value]
    return "## Scores\n\n" + _table(("benchmark", "metric", "value", "by"), rows) if rows else ""


def _json(path: Path) -> dict[str, Any]:
    try:
        content = parse_json(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _step(row: dict[str, Any]) -> str:
    return str(row["global_step/max_steps"]).split("/")[0]


def _number(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, (int, float)) and not isinstance(value, bool) else ""


def _shown(value: Any) -> str:
    """A setting for readers elsewhere: a path of this machine by its last part, one line, no table marks."""
    items = value if isinstance(value, list) else [value]
    texts = [os.path.basename(item.rstrip("/")) if isinstance(item, str) and os.path.isabs(item) else str(item)
             for item in items]  # fmt: skip
    text = " ".join(" ".join(texts).split())
    return f"`{text if len(text) <= 200 else text[:197] + '...'}`".replace("|", "\\|")


def _table(head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    lines = [head, tuple("---" for _ in head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)

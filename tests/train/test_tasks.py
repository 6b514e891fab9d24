"""Models that tell numbers: a tiny Llama trained in this process for each task, as the command's workers train it."""

from __future__ import annotations

import gc
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from tiny_models import llama, word_tokenizer

from rayswift.arguments import make_arguments
from rayswift.arguments.tasks import TaskSettings
from rayswift.data.tokens.encoder import Dropped, Encoder
from rayswift.data.tokens.table import TokenizedRow
from rayswift.modeling.merging import merge_adapter
from rayswift.train.collate import TaskCollator
from rayswift.train.hf_arguments import hf_training_arguments
from rayswift.train.loader import Rank
from rayswift.train.model import build_model
from rayswift.train.schedule import StepSchedule
from rayswift.train.stopping import Wish

TASKS: dict[str, dict[str, Any]] = {
    "seq_cls": {"task_type": "seq_cls", "num_labels": 3},
    "several": {"task_type": "seq_cls", "num_labels": 4, "problem_type": "multi_label_classification"},
    "regression": {"task_type": "seq_cls", "num_labels": 1},
    "infonce": {"task_type": "embedding", "loss_type": ["infonce"]},
    "cosine": {"task_type": "embedding", "loss_type": ["cosine_similarity"]},
    "reranker": {"task_type": "reranker", "loss_type": ["listwise_reranker"]},
    "judge": {"task_type": "generative_reranker", "loss_type": ["pointwise_reranker"]},
}


@pytest.fixture(autouse=True, scope="module")
def fast() -> Iterator[None]:
    """One thread suits models this small; and a Trainer ends with a collection of everything that is loaded."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    gc.freeze()
    yield
    gc.unfreeze()
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def base_dir(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("base") / "tiny"
    llama(initializer_range=0.3).save_pretrained(folder)
    tokenizer = word_tokenizer()
    tokenizer.add_tokens(["yes", "no"])
    tokenizer.save_pretrained(folder)
    return str(folder)


def message(text: str, role: str = "user") -> dict[str, str]:
    return {"role": role, "content": text}


def word(seed: int, count: int = 4) -> str:
    return " ".join(f"w{number}" for number in np.random.RandomState(seed).randint(3, 150, count))


def rows_of(name: str, count: int = 8) -> list[dict[str, Any]]:
    """Rows of a task, which a model can learn by heart."""
    found = []
    for seed in range(count):
        row: dict[str, Any] = {"messages": [message(word(seed, 3 + seed % 4))]}
        role = "user" if name in ("infonce", "cosine") else "assistant"
        if name in ("infonce", "cosine", "reranker", "judge"):
            row["positive_messages"] = [[message(word(100 + seed), role)]]
        if name in ("infonce", "reranker", "judge"):
            row["negative_messages"] = [[message(word(200 + seed + other), role)] for other in range(2)]
        labels = {"seq_cls": seed % 3, "several": [seed % 4, 3], "regression": seed / 8, "cosine": float(seed % 2)}
        found.append(row | ({"label": labels[name]} if name in labels else {}))
    return found


class Run:
    """One training of a task: its log, evaluation, checkpoint, trainer."""

    def __init__(self, base_dir: str, name: str, folder: Path, steps: int = 6, **flags: Any) -> None:
        from rayswift.train.trainers.task import TaskTrainer

        flags = {"train_type": "lora", "learning_rate": 0.02, "logging_steps": 1, "weight_decay": 0, **TASKS[name],
                 "save_steps": steps, "eval_steps": steps, "lora_dropout": 0, **flags}  # fmt: skip
        self.args = args = make_arguments("sft", model=base_dir, dataset=["d"], use_chat_template=False, **flags)
        self.encoder = Encoder.for_training(args, base_dir)
        encoded = self.encoder.encode_batch(rows_of(name))
        self.rows = [TokenizedRow(one.input_ids, one.labels, None, None, one.text_ends, one.targets)
                     for one in encoded if not isinstance(one, Dropped)]  # fmt: skip
        tokenizer = word_tokenizer()
        tokenizer.add_tokens(["yes", "no"])
        self.collate = TaskCollator(0, args.task_type, self.encoder.problem, args.num_labels or 1, TaskSettings())
        plan, self.events = StepSchedule(8, 4, steps, steps), []
        torch.manual_seed(0)

        def save(trainer: Any, write: Any) -> bool:
            write()
            return True

        class Val(list):  # type: ignore[type-arg]
            pass

        val: Any = Val(self.rows)
        self.trainer = TaskTrainer(
            run_args=args,
            model_dir=base_dir,
            task_settings=TaskSettings(),
            model=build_model(args, base_dir, "float32", None),
            args=hf_training_arguments(args, plan, 1, str(folder), "float32", False, True),
            processing_class=tokenizer,
            loader=[self.collate(self.rows[first : first + 4]) for _ in range(steps) for first in (0, 4)],
            schedule=plan,
            val_rows=val,
            rank=Rank(0, 1),
            push=self.events.append,
            save=save,
            wish=lambda: Wish.NOTHING,
            collate=self.collate,
            eval_dataset=val,
        )
        self.trainer.train()
        self.checkpoint = str(folder / f"checkpoint-{steps}")
        args.save(Path(self.checkpoint) / "args.json")

    @property
    def log(self) -> list[dict[str, Any]]:
        return [event["row"] for event in self.events if event["event"] == "log" and "grad_norm" in event["row"]]

    @property
    def evaluated(self) -> dict[str, float]:
        return next(event["row"] for event in self.events if event["event"] == "log" and "eval_loss" in event["row"])

    def told(self) -> torch.Tensor:
        """What the trained model tells of the first texts."""
        self.trainer.model.eval()
        with torch.no_grad():
            return self.trainer.teller(self.trainer.model, self.collate(self.rows[:4]))


@pytest.fixture(scope="module")
def runs(base_dir: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Run]:
    return {name: Run(base_dir, name, tmp_path_factory.mktemp(name)) for name in TASKS}


def test_every_task_learns_and_is_measured_as_swift_measures_it(runs: dict[str, Run]) -> None:
    for name, run in runs.items():
        losses = [row["loss"] for row in run.log]
        assert losses[-1] < 0.8 * losses[0], (name, losses)
        wanted = {f"eval_{metric}" for metric in run.args.metric_names()}
        assert wanted <= run.evaluated.keys(), name
        assert ("acc" in run.log[0]) == (name not in ("regression", "infonce", "cosine")), name
    assert runs["seq_cls"].evaluated["eval_acc"] > 0.9
    assert runs["infonce"].evaluated["eval_mean_pos"] > runs["infonce"].evaluated["eval_mean_neg"]
    assert runs["cosine"].evaluated["eval_pearson_cosine"] > 0.5
    assert runs["reranker"].evaluated["eval_mrr"] > 0.6

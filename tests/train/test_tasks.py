"""Models that tell numbers: a tiny Llama trained in this process for each task, as the command's workers train it."""

from __future__ import annotations

import gc
import json
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
from rayswift.generate.model_spec import ModelSpec, encoder_settings
from rayswift.generate.task_answers import TaskEngine
from rayswift.modeling.merging import merge_adapter
from rayswift.modeling.resolved import resolve_model
from rayswift.modeling.task_models import classes_of_adapter, pooling_of
from rayswift.train.collate import TaskCollator
from rayswift.train.hf_arguments import hf_training_arguments
from rayswift.train.loader import Rank
from rayswift.train.model import build_model
from rayswift.train.schedule import StepSchedule
from rayswift.train.stopping import Wish
from rayswift.train.task_loss import infonce_loss

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
    llama(vocab_size=192, initializer_range=0.3).save_pretrained(folder)
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

    def __init__(self, base_dir: str, name: str, folder: Path, steps: int = 4, **flags: Any) -> None:
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


#: Every part of the code; the others are trained with ``-m slow``.
FEW = ("seq_cls", "infonce", "reranker")


@pytest.fixture(scope="module", params=["few", pytest.param("all", marks=pytest.mark.slow)])
def runs(request: pytest.FixtureRequest, base_dir: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Run]:
    names = FEW if request.param == "few" else TASKS
    return {name: Run(base_dir, name, tmp_path_factory.mktemp(name)) for name in names}


def test_every_task_learns_and_is_measured_as_swift_measures_it(runs: dict[str, Run]) -> None:
    for name, run in runs.items():
        losses = [row["loss"] for row in run.log]
        assert losses[-1] < 0.8 * losses[0], (name, losses)
        wanted = {f"eval_{metric}" for metric in run.args.metric_names()}
        assert wanted <= run.evaluated.keys(), name
        assert ("acc" in run.log[0]) == (name not in ("regression", "infonce", "cosine")), name
    assert runs["seq_cls"].evaluated["eval_acc"] > 0.9
    assert runs["infonce"].evaluated["eval_mean_pos"] > runs["infonce"].evaluated["eval_mean_neg"]
    if "cosine" in runs:
        assert runs["cosine"].evaluated["eval_pearson_cosine"] > 0.5
    assert runs["reranker"].evaluated["eval_mrr"] > 0.6


def plain_transformers(folder: str, auto_class: str) -> Any:
    import transformers

    return getattr(transformers, auto_class).from_pretrained(folder, dtype=torch.float32).eval()


def test_checkpoints_and_merged_models_load_with_transformers_alone(runs: dict[str, Run], base_dir: str) -> None:
    for name in ("seq_cls", "reranker", "infonce"):
        run = runs[name]
        merged = merge_adapter(run.checkpoint, base_dir)
        auto_class = "AutoModel" if name == "infonce" else "AutoModelForSequenceClassification"
        model = plain_transformers(merged, auto_class)
        batch = run.collate(run.rows[:4])
        with torch.no_grad():
            output = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
        if name == "infonce":
            last = output.last_hidden_state[torch.arange(len(batch["input_ids"])), batch["attention_mask"].sum(1) - 1]
            found = torch.nn.functional.normalize(last, dim=-1)
            assert pooling_of(merged) == ("last", True)
            assert json.loads(Path(merged, "modules.json").read_text())[1]["type"].endswith("Pooling")
        else:
            found = output.logits if name == "seq_cls" else output.logits[:, 0]
            assert model.config.num_labels == (3 if name == "seq_cls" else 1)
        assert torch.allclose(found, run.told(), atol=1e-4), name
    with safe_open(Path(runs["seq_cls"].checkpoint, "adapter_model.safetensors"), "pt") as file:
        assert "base_model.model.score.weight" in file.keys()  # noqa: SIM118 (no mapping)
    assert classes_of_adapter(runs["seq_cls"].checkpoint) == 3


def test_full_training_saves_a_plain_model(base_dir: str, tmp_path: Path) -> None:
    run = Run(base_dir, "several", tmp_path, 2, train_type="full", learning_rate=1e-3)
    model = plain_transformers(run.checkpoint, "AutoModelForSequenceClassification")
    batch = run.collate(run.rows[:4])
    with torch.no_grad():
        found = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    assert torch.allclose(found, run.told(), atol=1e-4)
    assert (model.config.num_labels, model.config.problem_type) == (4, "multi_label_classification")


def test_rows_are_answered_as_they_were_trained(runs: dict[str, Run], base_dir: str) -> None:
    """``infer`` on the adapter, and ``deploy`` of what is merged, say what training said."""
    for name, run in runs.items():
        encoder = Encoder.from_args(run.args, base_dir)
        engine = TaskEngine.load(encoder, run.checkpoint, torch_dtype="float32", use_gpu=False)
        row = rows_of(name)[0]
        if name in ("reranker", "judge"):
            row = {"messages": [*row["messages"], *row["positive_messages"][0]]}
        answer = engine.answer([row, {"messages": []}])
        assert answer[1].error and answer[1].told is None
        told = run.told()[0]
        if name == "seq_cls":
            assert answer[0].told == int(told.argmax()) == 0
        elif name == "several":
            assert answer[0].told == [place for place in range(4) if told[place] >= 0]
        elif name == "regression":
            assert answer[0].told == pytest.approx(float(told[0]), abs=1e-4)
        elif name in ("reranker", "judge"):
            assert answer[0].told == pytest.approx(float(told.sigmoid()), abs=1e-4)
        else:
            assert answer[0].told == pytest.approx(told.tolist(), abs=1e-4)


def test_a_merged_model_is_served_as_it_was_trained(runs: dict[str, Run], base_dir: str) -> None:
    from starlette.testclient import TestClient

    from rayswift.serve.replica.pooling import PoolingServing

    for name, path in (("seq_cls", "/classify"), ("infonce", "/v1/embeddings"), ("reranker", "/v1/rerank")):
        run = runs[name]
        merged, task = merge_adapter(run.checkpoint, base_dir), run.args.task_type
        args = resolve_model(make_arguments("deploy", model=merged, task_type=task)).args
        plan = ModelSpec(
            "m", merged, "transformers", task, torch_dtype="float32", template=encoder_settings(args, merged)
        )
        http = TestClient(PoolingServing.from_plan(plan, plan.encoders(merged)[""]).app)
        row = rows_of(name)[0]
        text, told = row["messages"][0]["content"], run.told()
        if name == "seq_cls":
            found = http.post(path, json={"input": text}).json()["data"][0]
            assert found["probs"] == pytest.approx(told[0].softmax(-1).tolist(), abs=1e-4)
            assert (found["label"], found["num_classes"]) == ("LABEL_0", 3)
        elif name == "infonce":
            found = http.post(path, json={"input": text}).json()["data"][0]["embedding"]
            assert found == pytest.approx(told[0].tolist(), abs=1e-4)
        else:
            documents = [one[0]["content"] for one in (*row["positive_messages"], *row["negative_messages"])]
            found = http.post(path, json={"query": text, "documents": documents}).json()["results"]
            scores = {one["index"]: one["relevance_score"] for one in found}
            assert [scores[place] for place in range(3)] == pytest.approx(told[:3].sigmoid().tolist(), abs=1e-4)


def test_a_step_weighs_its_items_whatever_its_micro_batches_are(base_dir: str) -> None:
    """The mean over a step's rows is the same for micro-batches of different sizes, and empty ones."""
    from rayswift.train.trainers.task import TaskTrainer

    trainer: Any = object.__new__(TaskTrainer)
    sizes = {"pointwise_reranker": (3, 4), "listwise_reranker": (1, 2)}
    for loss, (one, other) in sizes.items():
        trainer.run_args = make_arguments("sft", model=base_dir, dataset=["d"], task_type="reranker", loss_type=[loss])
        trainer.settings = TaskSettings()
        assert trainer._items({"sizes": torch.tensor([3])}) == one
        assert trainer._items({"sizes": torch.tensor([2, 2])}) == other
        assert trainer._items({"sizes": torch.tensor([], dtype=torch.int64)}) == 0


def test_what_is_no_label_is_left_out_with_its_reason(base_dir: str) -> None:
    encoder = Encoder(base_dir, task_type="seq_cls", num_labels=3, use_chat_template=False)
    asked = {"messages": [message("w3 w4")]}
    found = encoder.encode_batch([{**asked, "label": label} for label in (2, True, "good", 3, [0, 1], 1.5)] + [asked])
    reasons = [one.reason if isinstance(one, Dropped) else one.targets.tolist() for one in found]  # type: ignore[union-attr]
    assert reasons[:2] == [[2.0], [1.0]]
    assert all("label" in str(reason) for reason in reasons[2:])
    encoder = Encoder(base_dir, task_type="reranker", use_chat_template=False)
    assert encoder.encode_batch([asked])[0].reason == "no positive_messages"  # type: ignore[union-attr]


def test_rows_of_all_workers_are_each_others_negatives(base_dir: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two workers' losses are that of all rows in one, and so is the mean of their gradients, as DDP takes it."""
    from rayswift.train.trainers.task import TaskTrainer

    torch.manual_seed(0)
    vectors, sizes = torch.nn.functional.normalize(torch.randn(10, 8), dim=-1), [2, 3, 2, 3]
    parts = [(vectors[:5], sizes[:2]), (vectors[5:], sizes[2:])]
    whole = vectors.clone().requires_grad_()
    expected = infonce_loss(whole, sizes, TaskSettings())
    expected.backward()

    def gather(found: list[Any], _own: Any) -> None:
        found[:] = parts

    monkeypatch.setattr(torch.distributed, "all_gather_object", gather)
    gradients = []
    for number, (own, own_sizes) in enumerate(parts):
        trainer: Any = object.__new__(TaskTrainer)
        trainer.run_args = make_arguments("sft", model=base_dir, dataset=["d"], task_type="embedding")
        trainer.settings, trainer.rank = TaskSettings(), Rank(number, 2)
        assert trainer._sees_all
        mine = own.clone().requires_grad_()
        loss, rows = trainer._loss_over_workers(mine, own_sizes)
        loss.backward()
        assert (float(loss), rows) == (pytest.approx(float(expected)), 4)
        gradients.append(mine.grad / 2)
    assert torch.allclose(torch.cat(gradients), whole.grad, atol=1e-6)

"""Supervised training of a tiny Llama in this process: what flags do to its losses, steps, logs and checkpoints."""

from __future__ import annotations

import gc
import json
import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_models import llama, word_tokenizer
from torch.utils._python_dispatch import TorchDispatchMode

from rayswift.arguments import make_arguments
from rayswift.data.tokens.table import TokenizedRow
from rayswift.train.collate import Collator
from rayswift.train.hf_arguments import best_is_last, hf_training_arguments
from rayswift.train.loader import Rank
from rayswift.train.schedule import StepSchedule
from rayswift.train.stopping import Wish

COLLATE = Collator(0)


@pytest.fixture(autouse=True, scope="module")
def fast() -> Iterator[None]:
    """One thread suits models this small; and a Trainer ends with a collection of everything that is loaded."""
    import rayswift.train.trainers.sft  # noqa: F401

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    gc.freeze()
    yield
    gc.unfreeze()
    torch.set_num_threads(threads)


def row(seed: int, trained: bool = True, scale: float | None = None) -> TokenizedRow:
    """Six tokens, of which the last four are trained."""
    ids = np.random.RandomState(seed).randint(3, 150, 6).astype(np.int32)
    labels = np.where((np.arange(6) < 2) | (not trained), -100, ids).astype(np.int32)
    return TokenizedRow(ids, labels, None if scale is None else np.full(6, scale, np.float32))


class Batches(list[Any]):
    """What a loader gives, and which rows that is."""

    def __init__(self, steps: Sequence[list[list[TokenizedRow]]], first: int) -> None:
        super().__init__(COLLATE(rows) for step in steps[first:] for rows in step)
        self._steps = steps

    def rows_of(self, step: int) -> list[list[tuple[int, TokenizedRow]]]:
        return [[(10 * step + number, one) for one in rows] for number, rows in enumerate(self._steps[step])]


class Run:
    """One training: its log, its checkpoints, its trainer.

    Args:
        folder: where checkpoints go.
        steps: the micro-batches of each step.
        losses: what evaluations find, one after the other; None: what they really find.
        resume: a checkpoint of another run to go on from.
        full: steps whose checkpoints have no room.
        stop_after: a step after which the driver wants the run to end.
        prepare: called with the trainer before it trains.
        dtype: what it computes in.
        flags: those of the command.
    """

    def __init__(
        self,
        folder: Path,
        steps: Sequence[list[list[TokenizedRow]]],
        losses: list[float] | None = None,
        resume: str | None = None,
        epoch: int | None = None,
        kept: Sequence[int] = (),
        full: Sequence[int] = (),
        stop_after: int = 0,
        prepare: Callable[[Any], None] = lambda trainer: None,
        dtype: str = "float32",
        **flags: Any,
    ) -> None:
        from rayswift.train.trainers.sft import SftTrainer

        given = {"learning_rate": 0.1, "optim": "sgd", "lr_scheduler_type": "constant", "weight_decay": 0,
                 "logging_steps": 1, "save_strategy": "no", "gradient_checkpointing": False}  # fmt: skip
        self.args = make_arguments(
            "sft", model="m/m", dataset=["d"], **{"train_type": "full", "max_grad_norm": 1e9, **given, **flags}
        )
        self.plan = StepSchedule(len(steps[0]), 1, len(steps), epoch or len(steps))
        self.events: list[dict[str, Any]] = []
        self.saved: list[int] = []

        def save(trainer: Any, write: Callable[[], None]) -> bool:
            write()
            step = trainer.state.global_step
            self.saved += [] if step in full else [step]
            return step not in full

        val = [row(100)] if losses is not None else None
        first = json.loads((Path(resume) / "trainer_state.json").read_text())["global_step"] if resume else 0
        self.trainer = SftTrainer(
            model=self.model(),
            args=hf_training_arguments(self.args, self.plan, 1, str(folder), dtype, False, val is not None),
            processing_class=word_tokenizer(),
            loader=Batches(steps, first),
            on_nan=self.args.on_nan,
            schedule=self.plan,
            val_rows=val,
            rank=Rank(0, 1),
            push=self.events.append,
            kept=kept,
            save=save,
            wish=lambda: Wish.STOP if self.trainer.state.global_step == stop_after else Wish.NOTHING,
            collate=COLLATE,
            eval_dataset=val,
        )
        self.trainer.left_out = self.args.left_out
        if losses is not None:
            scripted = iter(losses)
            self.trainer.eval_means = lambda counts: {"loss": next(scripted), "token_acc": 0.5}  # type: ignore[method-assign]
        self.prepare(folder)
        prepare(self.trainer)
        self.trainer.train(resume_from_checkpoint=resume)
        self.trainer.save_final()

    def model(self) -> Any:
        """What is trained."""
        return llama()

    def prepare(self, folder: Path) -> None:
        """Last changes before the first step."""

    @property
    def log(self) -> list[dict[str, Any]]:
        return [event["row"] for event in self.events if event["event"] == "log" and "grad_norm" in event["row"]]

    @property
    def log_rows(self) -> list[dict[str, Any]]:
        """Also those of steps that were left out."""
        return [event["row"] for event in self.events if event["event"] == "log" and "learning_rate" in event["row"]]

    @property
    def evaluated(self) -> list[int]:
        return [event["row"]["global_step"] for event in self.events
                if event["event"] == "log" and "eval_loss" in event["row"]]  # fmt: skip


def plain_steps(count: int) -> list[list[list[TokenizedRow]]]:
    return [[[row(number)]] for number in range(count)]


def test_the_best_is_the_best_of_what_is_kept(tmp_path: Path) -> None:
    """Evaluated at 3, 6, 9 and 10, saved at 2, 4, 6, 8 and 10: step 3 is not there, however good it was."""
    losses = [0.1, 0.5, 0.2, 0.7]
    run = Run(tmp_path, plain_steps(10), losses, save_strategy="steps", save_steps=2, eval_steps=3)
    assert (run.evaluated, run.saved) == ([3, 6, 9, 10], [2, 4, 6, 8, 10])
    assert (run.trainer.state.best_global_step, run.trainer.state.best_metric) == (6, 0.5)
    states = [json.loads((tmp_path / f"checkpoint-{step}" / "trainer_state.json").read_text()) for step in run.saved]
    assert [state["best_global_step"] for state in states] == [None, None, 6, 6, 6]
    assert states[2]["best_model_checkpoint"] == str(tmp_path / "checkpoint-6")
    # --load_best_model_at_end: its weights, not the last step's.
    last = {name: value.clone() for name, value in run.trainer.model.state_dict().items()}
    run.trainer.load_checkpoint(str(tmp_path / "checkpoint-6"))
    from safetensors.torch import load_file

    best = load_file(tmp_path / "checkpoint-6" / "model.safetensors")
    found = run.trainer.model.state_dict()
    assert all(torch.equal(found[name], value) for name, value in best.items())
    assert not all(torch.equal(last[name], value) for name, value in best.items())


def test_a_checkpoint_without_room_is_neither_the_best_nor_tried_twice(tmp_path: Path) -> None:
    settings = {"save_strategy": "steps", "save_steps": 2, "eval_steps": 2}
    run = Run(tmp_path, plain_steps(8), [0.5, 0.1, 0.4, 0.01], full=(4, 8), **settings)
    assert run.saved == [2, 6]
    assert (run.trainer.state.best_global_step, run.trainer.state.best_metric) == (6, 0.4)
    assert run.trainer.state.global_step == 8


def test_a_run_that_shall_end_saves_its_step_and_evaluates_nothing(tmp_path: Path) -> None:
    run = Run(tmp_path, plain_steps(8), [], stop_after=3, save_strategy="steps", save_steps=5, eval_steps=3)
    assert (run.saved, run.evaluated, run.trainer.state.global_step) == ([3], [], 3)
    assert json.loads((tmp_path / "checkpoint-3" / "trainer_state.json").read_text())["global_step"] == 3
    unsaved = Run(tmp_path / "none", plain_steps(8), stop_after=3, save_strategy="no")
    assert (unsaved.saved, unsaved.trainer.state.global_step) == ([], 3)


def test_the_best_of_another_run_is_no_best_of_this_one(tmp_path: Path) -> None:
    first = Run(tmp_path / "one", plain_steps(2), [0.1], save_strategy="steps", save_steps=2, eval_steps=2)
    assert first.trainer.state.best_global_step == 2
    checkpoint = str(tmp_path / "one" / "checkpoint-2")
    settings = {"save_strategy": "steps", "save_steps": 2, "eval_steps": 2}
    for kept, best in (((), 4), ((2,), 2)):
        run = Run(tmp_path / f"two{best}", plain_steps(4), [0.3], checkpoint, kept=kept, **settings)
        assert run.trainer.state.best_global_step == best


def test_a_resumed_run_has_the_intervals_that_are_given_now(tmp_path: Path) -> None:
    first = Run(tmp_path / "one", plain_steps(2), [1.0], save_strategy="steps", save_steps=2, eval_steps=2)
    run = Run(tmp_path / "two", plain_steps(8), [1.0] * 6, str(tmp_path / "one" / "checkpoint-2"),
              save_strategy="steps", save_steps=3, eval_steps=1, logging_steps=4, logging_first_step=False)  # fmt: skip
    assert first.saved == [2]
    assert (run.saved, run.evaluated) == ([3, 6, 8], [3, 4, 5, 6, 7, 8])
    assert [entry["global_step"] for entry in run.log] == [4, 8]


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ({"save_steps": 2, "eval_steps": 3, "max_steps": 6}, True),
        ({"save_steps": 2, "eval_steps": 3, "max_steps": 7}, False),
        ({"save_steps": 2, "max_steps": 5}, False),
        ({"save_steps": 100, "eval_steps": 3, "max_steps": 6}, False),
        ({"save_steps": 2, "eval_strategy": "epoch", "max_steps": 5}, True),
        ({"save_steps": 0.25, "eval_steps": 0.5, "max_steps": 8}, False),
        ({"save_steps": 2, "eval_strategy": "no", "max_steps": 5}, False),
        ({"save_strategy": "best", "eval_steps": 3, "max_steps": 5}, False),
    ],
)
def test_steps_that_never_meet_are_said_before_the_first(flags: dict[str, Any], said: bool) -> None:
    args = make_arguments("sft", model="m/m", dataset=["d"], **flags)
    assert bool(best_is_last(args, StepSchedule(16, 1, args.max_steps, 3))) == said


def test_weights_are_made_bfloat16_once_a_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the number of its micro-batches; steps, losses and weights are those of making them each time."""
    from rayswift.train.trainers.sft import SftTrainer

    steps = [[[row(10 * step + number)] for number in range(3)] for step in range(2)]

    class Casts(TorchDispatchMode):
        def __init__(self) -> None:
            super().__init__()
            self.count: Counter[int] = Counter()

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if "_to_copy" in str(func) and kwargs["dtype"] == torch.bfloat16:
                self.count[id(args[0])] += 1
            return func(*args, **(kwargs or {}))

    def trained(folder: str) -> tuple[Run, Casts]:
        casts = Casts()
        with casts:
            return Run(tmp_path / folder, steps, dtype="bfloat16", prepare=lambda _: casts.count.clear()), casts

    once, casts = trained("once")
    for name in ("training_step", "_get_grad_norm"):
        monkeypatch.delattr(SftTrainer, name)
    each, more = trained("each")
    counts = [(casts.count[id(a)], more.count[id(b)]) for (name, a), (_, b)
              in zip(*(run.trainer.model.named_parameters() for run in (once, each)), strict=True)
              if name.endswith("proj.weight")]  # fmt: skip
    assert set(counts) == {(2, 6)}
    assert [entry["loss"] for entry in once.log] == [entry["loss"] for entry in each.log]
    found, wanted = (run.trainer.model.state_dict() for run in (once, each))
    assert all(torch.equal(found[name], value) for name, value in wanted.items())


def test_a_step_that_trains_no_token_logs_no_loss(tmp_path: Path) -> None:
    """And leaves the weights alone; the mean of several steps is that of those that train."""
    full, none = [[row(0)], [row(1)]], [[row(2, trained=False)], []]
    run = Run(tmp_path, [full, none, full])
    assert ["loss" in entry for entry in run.log] == [True, False, True]
    assert "token_acc" not in run.log[1]
    assert all(math.isfinite(value) for entry in run.log for value in entry.values())
    assert run.log[1]["grad_norm"] == 0
    one, mean = (Run(tmp_path, steps, learning_rate=0, logging_steps=len(steps), logging_first_step=False)
                 for steps in ([full], [full, none, none]))  # fmt: skip
    assert mean.log[0]["loss"] == pytest.approx(one.log[0]["loss"])


def test_label_smoothing_with_and_without_weights(tmp_path: Path) -> None:
    """Cross entropy against a target that is smoothed, once a step over all its tokens, written out."""
    rows = [row(0), row(1), row(2)]
    model = llama()
    with torch.no_grad():
        logits = model(input_ids=torch.tensor(np.stack([one.input_ids for one in rows]), dtype=torch.long)).logits
    log_probabilities = logits[:, 1:-1].log_softmax(-1)
    targets = torch.tensor(np.stack([one.input_ids[2:] for one in rows]), dtype=torch.long)
    chosen = -log_probabilities.gather(2, targets[..., None])[..., 0]
    expected = float((0.8 * chosen - 0.2 * log_probabilities.mean(-1)).mean())
    for scale, factor in ((None, 1.0), (2.0, 2.0)):
        weighed = [row(number, scale=scale) for number in range(3)]
        run = Run(tmp_path, [[weighed[:2], weighed[2:]]], label_smoothing_factor=0.2)
        assert run.log[0]["loss"] == pytest.approx(factor * expected, rel=1e-5)


def test_a_learning_rate_of_zero_is_zero(tmp_path: Path) -> None:
    run = Run(tmp_path, plain_steps(2), learning_rate=0)
    assert [entry["learning_rate"] for entry in run.log] == [0, 0]
    assert torch.equal(run.trainer.model.model.embed_tokens.weight, llama().model.embed_tokens.weight)


@pytest.mark.parametrize(("ratio", "rates"), [(1.0, [0, 0.25, 0.5, 0.75]), (0.5, [0, 0.5, 1, 1])])
def test_the_learning_rate_rises_over_the_share_that_is_given(tmp_path: Path, ratio: float, rates: list[float]) -> None:
    run = Run(tmp_path, plain_steps(4), warmup_ratio=ratio, lr_scheduler_type="constant_with_warmup", learning_rate=1)
    assert [entry["learning_rate"] for entry in run.log] == pytest.approx(rates)


def test_epochs_of_logs_and_of_evaluations(tmp_path: Path) -> None:
    """The Trainer sees one long pass: what counts epochs is counted in steps."""
    run = Run(tmp_path, plain_steps(6), [1.0] * 3, epoch=2, logging_strategy="epoch", logging_first_step=False,
              eval_strategy="epoch", eval_delay=2)  # fmt: skip
    assert [entry["global_step"] for entry in run.log] == [2, 4, 6]
    assert run.evaluated == [4, 6]


def test_tokens_seen_are_in_the_log(tmp_path: Path) -> None:
    run = Run(tmp_path, plain_steps(2), include_num_input_tokens_seen="true")
    assert [entry["num_input_tokens_seen"] for entry in run.log] == [6, 12]


def test_a_loss_that_makes_no_logits_says_its_own_accuracy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As Liger's fused linear cross entropy: logits only without labels or outside training."""
    from transformers import LlamaForCausalLM

    plain = Run(tmp_path, plain_steps(2))
    forward, asked = LlamaForCausalLM.forward, []

    def fused(self: Any, *args: Any, return_token_accuracy: bool = False, **kwargs: Any) -> Any:
        outputs, labels = forward(self, *args, **kwargs), kwargs.get("labels")
        if labels is None or not self.training:
            return outputs
        asked.append(return_token_accuracy)
        mask = labels[:, 1:] != -100
        outputs["token_accuracy"] = (outputs.logits[:, :-1].argmax(-1) == labels[:, 1:])[mask].float().mean()
        outputs["logits"] = None
        return outputs

    monkeypatch.setattr(LlamaForCausalLM, "forward", fused)
    monkeypatch.setattr("transformers.trainer.apply_liger_kernel", lambda *_: None)
    run = Run(tmp_path, plain_steps(2), use_liger_kernel=True)
    assert asked == [True, True]
    for one, other in zip(run.log, plain.log, strict=True):
        assert {name: one[name] for name in ("loss", "token_acc")} == {
            name: other[name] for name in ("loss", "token_acc")
        }

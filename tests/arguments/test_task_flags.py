"""``--task_type`` and what belongs to it: SWIFT's command lines, and what contradicts what."""

from __future__ import annotations

import logging

import pytest

from rayswift.arguments import make_arguments, parse_arguments
from rayswift.errors import UserError

COMMON = "--model m/m --dataset d --torch_dtype bfloat16 --dataloader_drop_last true"
RANK = f"sft {COMMON} --task_type generative_reranker --loss_type pointwise_reranker"
#: After ms-swift's examples (embedding, reranker, seq_cls), and what is settled by them.
SWIFTS = [
    (f"sft {COMMON} --task_type seq_cls --num_labels 2 --use_chat_template false", ("cross_entropy", False)),
    (f"sft {COMMON} --task_type embedding --loss_type infonce --attn_impl flash_attn --padding_free true",
     ("infonce", False)),
    (f"{RANK} --padding_free true --tuner_type lora", ("pointwise_reranker", False)),
    (f"{RANK} --packing true --tuner_type full --label_names labels", ("pointwise_reranker", False)),
    (f"sft {COMMON} --task_type reranker --loss_type listwise_reranker", ("listwise_reranker", False)),
]  # fmt: skip


@pytest.mark.parametrize(("line", "settled"), SWIFTS)
def test_swifts_command_lines(line: str, settled: tuple[str, bool]) -> None:
    args = parse_arguments(*_split(line))
    assert (args.loss_type[0], bool(args.packing or args.padding_free)) == settled


def _split(line: str) -> tuple[str, list[str]]:
    command, *rest = line.split()
    return command, rest


def test_joined_rows_are_said_to_be_none(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        parse_arguments(*_split(f"{RANK} --packing true"))
    assert "--packing has no effect here: the texts of this --task_type are padded" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        parse_arguments("sft", [*COMMON.split(), "--metric", "acc"])
    assert "--eval_metric has no effect here: the metrics of the task are always measured" in caplog.text


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("--task_type seq_cls", "needs --num_labels"),
        ("--task_type seq_cls --num_labels 2 --loss_type infonce", "choose one of cross_entropy"),
        ("--task_type embedding --loss_type listwise_reranker", "choose one of infonce"),
        ("--task_type reranker --eval_metric infonce", "--eval_metric infonce: is not measured"),
        ("--task_type reranker --metric_for_best_model token_acc", "choose from loss, acc, mrr, ndcg"),
        ("--task_type embedding --truncation_strategy split", "a text is read whole"),
        ("--task_type embedding --streaming true --max_steps 3", "--streaming true contradicts"),
        ("--task_type seq_cls --num_labels 1 --problem_type single_label_classification", "contradicts --num_labels 1"),
        ("--task_type decision", "RaySwift does not have it yet"),
        ("--loss_type infonce", "choose one of cross_entropy"),
    ],
)
def test_what_contradicts_what(line: str, said: str) -> None:
    with pytest.raises(UserError, match=said):
        parse_arguments("sft", f"--model m/m --dataset d {line}".split())


def test_what_a_label_is_and_what_is_measured() -> None:

    one = make_arguments("sft", model="m/m", dataset=["d"], task_type="seq_cls", num_labels=1)
    assert (one.problem_type, one.metric_names()) == ("regression", ("loss",))
    two = make_arguments("sft", model="m/m", dataset=["d"], task_type="seq_cls", num_labels=2)
    assert (two.problem_type, two.metric_names()) == ("single_label_classification", ("loss", "acc"))
    pairs = make_arguments("sft", model="m/m", dataset=["d"], task_type="embedding", loss_type=["contrastive"])
    assert "spearman_cosine" in pairs.metric_names()
    for command in ("pt", "rlhf", "app", "sample", "eval"):
        with pytest.raises(UserError, match="task_type"):
            make_arguments(command, model="m/m", task_type="seq_cls")

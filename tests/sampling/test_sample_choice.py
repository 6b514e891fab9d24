"""Which answers are kept, and what is rejected beside them."""

from __future__ import annotations

from typing import Any

import pytest

from rayswift.sampling.choice import SampleStats, SelectionRules, choose, scaled

BOTH = SelectionRules(orm=True, prm=True, n_best_to_keep=2)


def kept(rules: SelectionRules, texts: list[str], reference: str | None, orm: Any = None, prm: Any = None) -> list[Any]:
    return choose(rules, texts, reference, orm, prm, SampleStats())


def test_the_best_are_kept_each_beside_the_worst() -> None:
    found = kept(BOTH, ["a", "b", "c", "d"], "gold", [1, 0, 1, 0, 1], [0.2, 0.9, 0.8, -0.5, 0.1])
    assert found == [("c", "d"), ("a", "d")]


def test_outcome_counts_ten_times_the_process_and_thresholds_count_unscaled() -> None:
    assert kept(SelectionRules(True, True, 9, prm_threshold=0.5), ["a", "b"], None, [1, 0], [0.4, 1.0]) == []
    assert kept(SelectionRules(True, True, 9, prm_threshold=0.3), ["a", "b"], None, [1, 0], [0.4, 1.0]) == [("a", "b")]


def test_the_datasets_answer_fills_up_what_is_missing_behind_answers_as_good() -> None:
    rules = SelectionRules(orm=True, prm=False, n_best_to_keep=2)
    assert kept(rules, ["a", "b"], "gold", [1, 0, 1]) == [("a", "b"), ("gold", "b")]
    assert kept(rules, ["a", "b"], "gold", [0, 0, 1]) == [("gold", "b")]


def test_nothing_is_rejected_for_an_answer_that_is_no_better() -> None:
    rules = SelectionRules(orm=True, prm=False, n_best_to_keep=5)
    assert kept(rules, ["a", "b"], "gold", [1, 1, 1]) == [("a", None), ("b", None), ("gold", None)]
    assert kept(rules, ["a", "b"], "gold", [0, 0, 0]) == []


def test_a_text_is_kept_once() -> None:
    rules = SelectionRules(orm=True, prm=False, n_best_to_keep=2)
    assert kept(rules, ["a", "a", "x", "b"], "a", [1, 1, 0, 1, 1]) == [("a", "x"), ("b", "x")]


def test_what_a_reward_cannot_judge_is_neither_kept_nor_rejected() -> None:
    counts = SampleStats()
    rules = SelectionRules(orm=True, prm=True, n_best_to_keep=5, easy_query_threshold=0.6)
    found = choose(rules, ["words", "a", "b", "c"], "gold", [None, 1, 0, 1, 1], [0.1, 0.9, 0.2, None, 0.3], counts)
    assert found == [("a", "b"), ("gold", "b")]
    assert (counts.right, counts.undecided) == (1, 2)
    assert "2 undecided" in SampleStats(undecided=2, scored=True).describe()
    assert kept(SelectionRules(orm=True, prm=False), ["a", "b"], None, [None, None]) == []


@pytest.mark.parametrize(("threshold", "dropped"), [(None, False), (0.5, True), (0.75, False), (1.0, False)])
def test_easy_prompts_are_dropped_by_the_share_of_sampled_answers(threshold: float | None, dropped: bool) -> None:
    counts = SampleStats()
    rules = SelectionRules(True, False, 5, easy_query_threshold=threshold)
    found = choose(rules, ["a", "b", "c", "x"], "gold", [1, 1, 1, 0, 1], None, counts)
    assert (not found) == dropped == bool(counts.too_easy)
    assert counts.right == 3
    assert counts.prompts_with_a_right_answer == 1


@pytest.mark.parametrize(
    ("scores", "expected"),
    [([1, 3, 2], [0, 1, 0.5]), ([0, 0], [0, 0]), ([7, 7], [1, 1]), ([0.5], [0.5]), (None, [1, 1])],
)
def test_scores_are_scaled_over_the_answers_to_a_prompt(scores: Any, expected: list[float]) -> None:
    assert scaled(scores, len(expected)) == expected


def test_a_prompt_without_answers_keeps_nothing() -> None:
    assert kept(BOTH, [], None, [], []) == []

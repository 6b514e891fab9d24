"""``--metric``: exact match, and ROUGE with BLEU as SWIFT reports them."""

from __future__ import annotations

from typing import Any

import pytest

from rayswift.errors import UserError
from rayswift.inference import scores
from rayswift.inference.scores import check_metric, score


def results(*pairs: tuple[str, str | None]) -> list[dict[str, Any]]:
    return [{"response": response, "labels": reference} for response, reference in pairs]


def test_acc_is_the_share_of_equal_answers_and_rows_without_reference_do_not_count() -> None:
    assert score(results(("Paris", " Paris\n"), ("Rome", "Paris"), ("x", None), ("", "y")), "acc") == {"acc": 0.333333}
    assert score(results(("x", None)), "acc") == {"acc": None}


def test_rouge_of_equal_texts_is_100_and_of_different_ones_0() -> None:
    found = score(results(("今天天气很好", "今天天气很好")), "rouge")
    assert list(found) == ["rouge-1", "rouge-2", "rouge-l", "bleu-4"]
    assert found["rouge-1"] == pytest.approx(100, abs=0.01)
    assert found["rouge-l"] == pytest.approx(100, abs=0.01)
    assert score(results(("猫", "狗")), "rouge")["rouge-1"] == 0


def test_rouge_counts_words_by_hand() -> None:
    # 3 of 4 said words are among the 5 wanted: precision 3/4, recall 3/5, F = 2/3.
    found = score(results(("the cat sat down", "the cat sat over there")), "rouge")
    assert found["rouge-1"] == pytest.approx(100 * 2 / 3, abs=0.01)
    # Bigrams: "the cat", "cat sat" of 3 and 4: F = 4/7.
    assert found["rouge-2"] == pytest.approx(100 * 4 / 7, abs=0.01)


def test_an_empty_answer_counts_as_zero() -> None:
    assert score(results(("the cat", "the cat"), ("", "the dog")), "rouge")["rouge-1"] == pytest.approx(50, abs=0.01)


def test_missing_packages_are_named_before_anything_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scores, "_ROUGE_PACKAGES", ("json", "no_such_package"))
    with pytest.raises(UserError, match=r"no_such_package: pip install 'rayswift\[metrics\]'"):
        check_metric("rouge")
    check_metric("acc")

"""Outcome rewards against an answer key: answers that are known to be right, and known to be wrong."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from rayswift.rewards import InferRequest, make_reward, orms
from rayswift.rewards.maths import final_answer, final_number, same_answer

GSM8K = [
    json.loads(line)
    for line in (Path(__file__).parent.parent / "data" / "gsm8k_40.jsonl").read_text(encoding="utf-8").splitlines()
]
RIGHT = (
    "So it is 3 and then.\n#### {}", "We get $\\boxed{{{}}}$.", "2 + 2 is 4. The answer is {}.", "1 * 2 = {}",
    "<think>7</think><answer>{}</answer> I counted 3 times.", "Answer: {} clips", "It costs ${}", "{}.00",
)  # fmt: skip
WRONG = (
    "#### {}1", "We get $\\boxed{{-{}}}$, and {}.", "{} is too many, it is 123456",
    "<answer>{}5</answer> {}", "", "{}.5",
)  # fmt: skip
UNDECIDED = ("The answer is not known", "Eighteen dollars.", "Let us see.\nShe has them all.")


def scores(name: str, said: str, right: str) -> float | None:
    request = InferRequest(messages=[{"role": "user", "content": "?"}, {"role": "assistant", "content": said}])
    return make_reward("--orm_model", name, orms).scores([request], [right])[0]


@pytest.mark.parametrize("name", ["gsm8k", "math", "accuracy"])
def test_every_gsm8k_row_accepts_its_answer_in_any_spelling_and_nothing_else(name: str) -> None:
    for row in GSM8K:
        number = row["answer"].rpartition("####")[2].strip()
        assert scores(name, row["answer"], row["answer"]) == 1.0
        for said in RIGHT:
            assert scores(name, said.format(number), row["answer"]) == 1.0, said.format(number)
        for said in WRONG:
            assert scores(name, said.format(number, number), row["answer"]) == 0.0, said.format(number, number)
        for said in UNDECIDED:
            assert scores(name, said, row["answer"]) is None, said
        other = int(number.replace(",", "")) + 1
        assert scores(name, f"#### {other:,}", row["answer"]) == 0.0


@pytest.mark.parametrize(
    ("said", "right", "score"),
    [
        ("Eighteen.", "#### 18", None), ("The answer is eighteen.", "18", None), ("18", "eighteen", None),
        ("It is Paris.", "Paris", None), ("Paris has 3 airports", "Paris", None), ("Paris", "paris", 1.0),
        ("London", "Paris", 0.0), ("The answer is New York", "Paris", 0.0), ("no", "yes", 0.0), ("", "18", 0.0),
        ("x+y", "2x", 0.0), (r"$\sqrt{x}$", "3", 0.0), (r"\boxed{17}", "18", 0.0), ("Seventeen", "one\nor two", None),
    ],
)  # fmt: skip
def test_words_beside_numbers_are_undecided_not_wrong(said: str, right: str, score: float | None) -> None:
    assert scores("math", said, right) == score


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("1,234", "1234"), ("72 clips", "72"), ("$18", "18"), (r"18\text{ dollars}", "18"), ("50\\%", "50"),
        (r"\frac{1}{2}", "0.5"), (r"\dfrac12", "1/2"), ("x=3", "3"), (r"90^\circ", "90"), ("+5", "5"),
        (r"2\sqrt{3}", r"\sqrt{12}"), (r"\sqrt[3]{8}", "2"), (r"\frac{\pi}{2}", r"\pi/2"), ("2^{10}", "1024"),
        ("2x+1", "1+2x"), ("x^2-1", "(x-1)(x+1)"), (r"\left( 1, 2 \right)", "(1,2)"), (r"\{1, 2\}", r"\{2,1\}"),
        ("Yes", "yes"), (r"\text{Tuesday}", "tuesday"), ("3, 4", "3,4"), (r"-\frac{3}{4}", "-0.75"), ("(−3)^2", "9"),
    ],
)  # fmt: skip
def test_answers_that_are_the_same(one: str, other: str) -> None:
    assert same_answer(one, other)
    assert same_answer(other, one)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("1,2", "12"), ("3, 4", "34"), ("1 2", "12"),
        ("-3", "3"), ("3.14", r"\pi"), ("1/3", "0.333"), ("(1,2)", "(2,1)"), ("[0,1)", "[0,1]"), ("2x", "x^2"),
        ("10000001", "10000000"), (r"\{1,2\}", r"\{1,2,3\}"), ("yes", "no"), ("", ""), ("", "0"), ("x", "y"),
        ("1/0", "1/0+1"), ("2^{999999999}", "1"), ("__import__('os')", "1"), ("(" * 290, "1"), (r"\sqrt{-1}", "1"),
    ],
)  # fmt: skip
def test_answers_that_differ(one: str, other: str) -> None:
    assert not same_answer(one, other)


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("She has 3 apples and 4 pears, so 7.", "7"), ("20 - 5", "5"), ("minus: -5", "-5"), ("3/4 of it", "3/4"),
        ("1,200 people", "1200"), ("nothing", None), ("\\boxed{", None), ("#### ", None), ("$1.50", "3/2"),
    ],
)  # fmt: skip
def test_the_final_number_of_a_text(text: str, number: str | None) -> None:
    found = final_number(text)
    assert (None if found is None else str(found)) == number


def test_the_last_box_whose_braces_close_is_the_answer() -> None:
    assert final_answer(r"\boxed{1} and \boxed{\frac{1}{2}} and \boxed{3") == r"\frac{1}{2}"


@pytest.mark.parametrize("text", ["\\boxed{" * 20000, "<answer>" * 20000, "$$ " * 20000, "9" * 100000, "{" * 50000])
def test_hostile_texts_cost_no_time(text: str) -> None:
    start = time.monotonic()
    assert not scores("math", text, "#### 72")
    assert time.monotonic() - start < 5


def test_rewards_about_the_form() -> None:
    assert scores("format", "<think>a\nb</think>\n<answer>c</answer>", "") == 1.0
    assert scores("format", "<think>a</think> c", "") == 0.0
    react = '<think>a</think>\nAction: search\nAction Input: {"q": 1}'
    assert scores("react_format", react, "") == 1.0
    assert scores("react_format", "Action: search", "") == 0.0
    assert scores("toolbench", react, 'Action: search\nAction Input: { "q" : 1 }') == 1.0
    assert scores("toolbench", react, 'Action: search\nAction Input: {"q": 2}') == 0.0
    assert scores("toolbench", react, 'Action: find\nAction Input: {"q": 1}') == 0.0

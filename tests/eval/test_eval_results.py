"""Results, report, run folder and models: plain code, no model."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from rayswift.arguments import make_arguments
from rayswift.errors import UserError
from rayswift.eval.evaluate import deciding_settings
from rayswift.eval.models import plan_endpoints
from rayswift.eval.report import page, table
from rayswift.eval.results import Question, Result, load_result
from rayswift.journal import open_run


def result(model: str, right: list[float], benchmark: str = "ARC_c") -> Result:
    questions = [Question(f"q/{n}", f"question {n}", "ANSWER: A", "A", "B", {"acc": v}) for n, v in enumerate(right)]
    return Result(benchmark, model, "Native", "acc", {"acc": sum(right) / len(right)}, 0, questions)


def test_the_table_has_a_column_per_model_and_the_difference_to_the_first() -> None:
    text = table([result("base", [1, 0, 0, 0]), result("tuned", [1, 1, 0, 0]), result("base", [1, 1], "gsm8k")])
    head, _, first, second = text.splitlines()
    assert head.split() == ["benchmark", "questions", "examples", "metric", "base", "tuned"]
    assert first.split() == ["ARC_c", "4", "0", "acc", "0.2500", "±", "0.2500", "0.5000", "±", "0.2887", "(+0.2500)"]
    assert second.split()[-2:] == ["0.0000", "–"]


def test_the_page_shows_every_answer_and_nothing_of_it_is_markup() -> None:
    bad = result("<b>base</b>", [1, 0])
    bad.questions[0] = Question("q/0", "<script>alert(1)</script>\nmore", "<img src=x>", "A", "B", {"acc": 1.0})
    text = page([bad, result("tuned", [0, 0])], "eval <x>")
    assert "<script" not in text
    assert "<img" not in text
    assert "&lt;script&gt;" in text
    assert text.count('class="same') == 1
    assert text.count('class="right"') == 1
    assert text.count('class="wrong"') == 3


def test_a_result_is_read_back_as_it_was_saved(tmp_path: Path) -> None:
    saved = result("base", [1, 0])
    assert load_result(tmp_path / "x") is None
    saved.save(tmp_path / "x")
    assert load_result(tmp_path / "x") == saved


# --- the run folder ---------------------------------------------------------------------------------------------


def test_an_unfinished_run_goes_on_and_a_finished_one_does_not(tmp_path: Path) -> None:
    with open_run(tmp_path, "m") as first:
        assert not first.resumed
    with open_run(tmp_path, "m") as again:
        assert (again.path, again.resumed) == (first.path, True)
        again.mark(finished=True)
    with open_run(tmp_path, "m") as new:
        assert new.path != first.path


def test_other_settings_and_a_run_that_is_still_going_get_a_folder_of_their_own(tmp_path: Path) -> None:
    with open_run(tmp_path, "m") as first, open_run(tmp_path, "m") as beside:
        assert beside.path != first.path
    with open_run(tmp_path, "other") as other:
        assert other.path not in (first.path, beside.path)


def test_a_row_cut_by_a_kill_is_dropped_before_going_on(tmp_path: Path) -> None:
    with open_run(tmp_path, "m") as run:
        (run.path / "predictions.jsonl").write_text('{"index": 0}\n{"index": ')
    with open_run(tmp_path, "m") as run:
        assert (run.path / "predictions.jsonl").read_text() == '{"index": 0}\n'


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(UserError, match=r"--eval_output_dir .*: cannot be written"),
        open_run(tmp_path / "file" / "x", "m"),
    ):
        pass


def test_answers_depend_on_generation_and_data_but_not_on_concurrency(tmp_path: Path) -> None:
    def settings(**more: Any) -> dict[str, Any]:
        return deciding_settings(make_arguments("eval", model="m", eval_dataset=["arc"], **more), [])

    assert settings() == settings(eval_num_proc=4, eval_output_dir="x", max_replicas=3)
    assert settings() != settings(temperature=1.0)
    assert settings() != settings(eval_limit=3)
    assert settings() != settings(eval_generation_config={"max_tokens": 5})


# --- models -----------------------------------------------------------------------------------------------------


def models(**settings: Any) -> list[list[tuple[str, str | None]]]:
    args: Any = make_arguments("eval", **{"eval_dataset": ["arc"], **settings})
    return [[(one.label, one.name) for one in endpoint.models] for endpoint in plan_endpoints(args)]


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"model": "org/base"}, [[("base", None)]]),
        ({"model": "base", "adapters": ["out/checkpoint-7"]}, [[("checkpoint-7", None)]]),
        ({"model": "base", "adapters": ["a=x", "b=y"]}, [[("a", "a"), ("b", "b")]]),
        ({"model": "base", "adapters": ["out/checkpoint-7"], "eval_base": True},
         [[("base", None), ("checkpoint-7", "checkpoint-7")]]),
        ({"model": "base", "adapters": ["a=x", "b=y"], "merge_lora": True, "eval_base": True},
         [[("base", None)], [("a", None)], [("b", None)]]),
        ({"models": {"base": {"model": "m"}, "tuned": {"adapters": ["out/checkpoint-7"]}}},
         [[("base", None)], [("tuned", None)]]),
        ({"eval_url": "http://127.0.0.1:1/v1", "model": "served"}, [[("served", "served")]]),
        ({"eval_url": "http://127.0.0.1:1/v1", "models": {"a": {}, "b": {}}}, [[("a", "a")], [("b", "b")]]),
    ],
)  # fmt: skip
def test_who_is_evaluated_and_who_shares_a_deployment(settings: dict[str, Any], expected: Any) -> None:
    assert models(**settings) == expected


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"model": "m", "adapters": ["a/x", "b/x"]}, "the name x is taken; write NAME=b/x"),
        ({"models": {"a": {"modle": "m"}}}, "--models a: "),
        ({"model": "m", "eval_base": True}, "--eval_base true needs --adapters"),
    ],
)
def test_models_that_cannot_be_told_apart_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        models(**settings)


# --- the command line -------------------------------------------------------------------------------------------


def command(*words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "rayswift", "eval", *words], capture_output=True, text=True, timeout=120,
        env={**os.environ, "HF_HUB_OFFLINE": "1", **environment},
    )  # fmt: skip


def test_help_and_mistakes_load_nothing_heavy() -> None:
    code = (
        "import sys; from rayswift.cli.main import main; "
        "status = main(sys.argv[1:]); "
        "heavy = {'torch', 'ray', 'transformers', 'evalscope', 'lm_eval'} & set(sys.modules); "
        "assert not heavy, heavy; sys.exit(status)"
    )
    done = subprocess.run([sys.executable, "-c", code, "eval", "--help"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "--eval_backend" in done.stdout
    done = subprocess.run(
        [sys.executable, "-c", code, "eval", "--model", "m", "--eval_dataset", "gsm8k", "--local_dataset", "/none"],
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (
        2,
        "rayswift eval: error: --local_dataset /none: no such file or folder\n",
    )


@pytest.mark.parametrize(
    ("backend", "library"), [("Native", "evalscope"), ("lm-eval", "lm_eval"), ("OpenCompass", ""), ("VLMEvalKit", "")]
)
def test_a_missing_library_is_one_line_that_names_the_extra(
    backend: str, library: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import importlib.util

    from rayswift.eval.backends import choose_backend

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    settings: dict[str, Any] = {} if library else {"extra_eval_args": {"python": sys.executable}}
    args: Any = make_arguments("eval", model="m", eval_dataset=["x"], eval_backend=backend, **settings)
    with pytest.raises(UserError) as error:
        choose_backend(args)
    assert str(error.value).startswith(f"--eval_backend {backend} needs ")
    assert "SET=eval" in str(error.value) or "pip install 'evalscope[" in str(error.value)
    assert "\n" not in str(error.value)


def test_json_of_answers_is_one_object_a_line(tmp_path: Path) -> None:
    result("base", [1, 0]).save(tmp_path)
    rows = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text().splitlines()]
    assert [row["scores"] for row in rows] == [{"acc": 1}, {"acc": 0}]

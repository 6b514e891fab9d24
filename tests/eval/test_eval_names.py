"""Names, settings and local files of benchmarks: what is asked, from which rows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from rayswift.arguments import make_arguments
from rayswift.errors import UserError
from rayswift.eval.benchmarks import Benchmark, known_names, read_benchmarks, require_known
from rayswift.eval.local_data import checked_rows, lay_out
from rayswift.eval.question_sets import answer_row, choice_row, lay_out_questions

DATA = Path(__file__).resolve().parents[1] / "data"
ARC = Benchmark("ARC_c", "arc", local_path=str(DATA / "arc_challenge_24.jsonl"), file_names=("ARC_c", "arc"))


def arguments(**settings: Any) -> Any:
    return make_arguments("eval", **{"model": "m", "eval_dataset": ["gsm8k"], **settings})


def rows_of(folder: str) -> dict[str, list[dict[str, Any]]]:
    return {
        path.name: [json.loads(line) for line in path.read_text("utf-8").splitlines()]
        for path in sorted(Path(folder).glob("*.jsonl"))
    }


# --- names ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("backend", "asked", "name", "settings"),
    [
        ("Native", "ARC_c", "arc", {"subset_list": ["ARC-Challenge"]}),
        ("Native", "arc_C", "arc", {"subset_list": ["ARC-Challenge"]}),
        ("Native", "gsm8k", "gsm8k", {}),
        ("Native", "commonsenseqa", "commonsense_qa", {}),
        ("lm-eval", "ARC_c", "arc_challenge", {}),
        ("lm-eval", "ceval", "ceval-valid", {}),
        ("OpenCompass", "ARC_c", "ARC_c", {}),
        ("VLMEvalKit", "MMBench_DEV_EN", "MMBench_DEV_EN", {}),
    ],
)
def test_a_benchmark_has_swifts_name_in_every_backend(
    backend: str, asked: str, name: str, settings: dict[str, Any]
) -> None:
    (found,) = read_benchmarks(arguments(eval_dataset=[asked], eval_backend=backend))
    assert (found.asked, found.name, found.settings) == (asked, name, settings)


def test_settings_may_be_given_under_the_name_typed_or_the_backends() -> None:
    for key in ("ARC_c", "arc"):
        (found,) = read_benchmarks(arguments(eval_dataset=["ARC_c"], eval_dataset_args={key: {"few_shot_num": 3}}))
        assert found.settings == {"subset_list": ["ARC-Challenge"], "few_shot_num": 3}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"eval_dataset_args": {"arc": {}}}, "--eval_dataset_args: arc is not among --eval_dataset gsm8k"),
        ({"eval_dataset_args": {"gsm8k": "DIR"}}, "--eval_dataset_args: gsm8k is 'DIR', expected its settings"),
        (
            {"eval_dataset_args": {"gsm8k": {"local_path": "/none"}}},
            "--eval_dataset_args: local_path of gsm8k /none: no such file or folder",
        ),
        ({"local_dataset": "/none"}, "--local_dataset /none: no such file or folder"),
        ({"eval_dataset": ["general_mcq"]}, "--eval_dataset general_mcq: your own questions need a file"),
    ],
)
def test_a_mistake_in_a_benchmarks_settings_is_one_line(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as error:
        read_benchmarks(arguments(**settings))
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_an_unknown_benchmark_is_answered_with_the_nearest_names() -> None:
    with pytest.raises(UserError, match="no such benchmark; did you mean gsm8k") as error:
        require_known(Benchmark("gms8k", "gms8k"), "Native", ["gsm8k", "arc"])
    assert "--eval_dataset gms8k: --eval_backend Native" in str(error.value)


def test_swifts_local_dataset_flag_means_its_folder_or_yours() -> None:
    assert arguments(local_dataset=True).local_dataset == "data"
    assert arguments(local_dataset="false").local_dataset is None
    assert arguments(local_dataset="benchmarks").local_dataset == "benchmarks"


def test_every_name_of_the_table_is_known_to_its_library() -> None:
    pytest.importorskip("lm_eval")
    registry = pytest.importorskip("evalscope.api.registry")
    import evalscope  # noqa: F401 (registers the benchmarks)
    from lm_eval.tasks import TaskManager

    tasks = set(TaskManager().all_tasks)
    for asked, row in known_names().items():
        native, harness = row.get("Native"), row.get("lm-eval")
        if native is not None:
            assert (native["name"] if isinstance(native, dict) else native) in registry.BENCHMARK_REGISTRY, asked
        if harness is not None and not asked.startswith("general_"):
            assert harness in tasks, asked


# --- local files ------------------------------------------------------------------------------------------------


def test_a_file_is_laid_out_as_the_subset_and_split_that_the_task_reads() -> None:
    data = lay_out(ARC, ["ARC-Challenge"], "test", ["train"])
    assert data.has("ARC-Challenge", "test")
    assert not data.has("ARC-Challenge", "train")
    (rows,) = rows_of(data.path).values()
    assert len(rows) == 24
    assert 'config_name: "ARC-Challenge"' in Path(data.path, "README.md").read_text()
    assert lay_out(ARC, ["ARC-Challenge"], "test", ["train"]).path == data.path  # written once


def test_datasets_reads_the_laid_out_folder() -> None:
    import datasets

    data = lay_out(ARC, ["ARC-Challenge"], "test")
    rows = datasets.load_dataset(data.path, name="ARC-Challenge", split="test")
    assert (len(rows), rows[0]["answerKey"]) == (24, "C")


@pytest.mark.parametrize(
    "names",
    [
        ("gsm8k_test.jsonl", "gsm8k_train.jsonl"),
        ("test.jsonl", "train.jsonl"),
        ("main/test.jsonl", "main/train.jsonl"),
        ("main_test.jsonl", "main-train.jsonl"),
    ],
)
def test_files_are_found_by_subset_split_or_name(tmp_path: Path, names: tuple[str, str]) -> None:
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text((DATA / "gsm8k_40.jsonl").read_text())
    (tmp_path / "other_test.jsonl").write_text("not json")  # somebody else's file is not read
    data = lay_out(Benchmark("gsm8k", "gsm8k", {}, str(tmp_path), ("gsm8k",)), ["main"], "test", ["train"])
    assert data.splits == {("main", "test"), ("main", "train")}


def test_a_clone_of_the_hubs_repository_is_left_to_the_library(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("---\nconfigs:\n- config_name: main\n---\n")
    data = lay_out(Benchmark("gsm8k", "gsm8k", {}, str(tmp_path)), ["main"], "test")
    assert (data.path, data.has("any", "split")) == (str(tmp_path), True)


def test_parquet_keeps_its_types(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet as pq

    pq.write_table(pyarrow.table({"question": ["q"], "answer": ["#### 1"]}), tmp_path / "test-00000-of-00001.parquet")
    data = lay_out(Benchmark("gsm8k", "gsm8k", {}, str(tmp_path), ("gsm8k",)), ["main"], "test")
    assert Path(data.path, "main_test.parquet").is_file()


def test_a_missing_file_is_named_with_what_is_expected(tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_text("{}\n")
    with pytest.raises(UserError) as error:
        lay_out(Benchmark("gsm8k", "gsm8k", {}, str(tmp_path), ("gsm8k",)), ["main"], "test", ["train"])
    assert "has no file of subset main, split test; expected gsm8k_test.jsonl or test.jsonl" in str(error.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"question": "q", "answer": "a"}\n{"question": "q"\n', ":2: "),
        ('{"question": "q", "answer": "a"}\n{"question": "q"}\n', ":2: no answer; expected question, answer"),
        ("", "no rows in it"),
    ],
)
def test_a_row_that_cannot_be_used_is_named_by_file_and_line(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "test.jsonl"
    path.write_text(content)
    with pytest.raises(UserError) as error:
        lay_out(Benchmark("gsm8k", "gsm8k", {}, str(path), (), ("question", "answer")), ["main"], "test")
    assert f"{path}{message}" in str(error.value).replace(": no rows", "no rows")


# --- question sets ----------------------------------------------------------------------------------------------


def test_a_csv_of_choices_is_laid_out_with_what_both_libraries_read(tmp_path: Path) -> None:
    path = tmp_path / "maths.csv"
    path.write_text('id,question,A,B,C,answer\n1,"2+2, or so?",3,4,5,B\n2,Odd?,1,2,,a\n')
    data, subsets = lay_out_questions(Benchmark("general_mcq", "general_mcq", {}, str(path)))
    assert subsets == ["default"]
    rows = rows_of(data.path)["default_val.jsonl"]
    assert [(row["answer"], row["gold"], row["choices"]) for row in rows] == [
        ("B", 1, ["3", "4", "5"]),
        ("A", 0, ["1", "2"]),
    ]
    assert "C" not in rows[1]


def test_each_file_of_a_folder_is_a_subset_with_its_examples(tmp_path: Path) -> None:
    for name in ("law_val.csv", "law_dev.csv", "art.csv"):
        (tmp_path / name).write_text("question,A,B,answer\nq,x,y,A\n")
    data, subsets = lay_out_questions(Benchmark("general_mcq", "general_mcq", {}, str(tmp_path)))
    assert subsets == ["art", "law"]
    assert (data.has("law", "dev"), data.has("art", "dev")) == (True, False)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"A": "x", "B": "y", "answer": "A"}, "no question"),
        ({"question": "q", "A": "x", "answer": "A"}, "at least the choices A and B"),
        ({"question": "q", "A": "x", "B": "y", "answer": "C"}, "answer is 'C', expected one of A, B"),
        ({"question": "q", "A": "x", "B": "y", "answer": ""}, "answer is '', expected one of A, B"),
        ({"question": "q", "A": "x", "C": "y", "answer": "A"}, "choice B is empty, but C is not"),
        ({"question": "q", "A": "x", "B": "y", "answer": "AB"}, "several right answers need"),
    ],
)
def test_a_bad_row_of_choices_says_what_is_wrong(row: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        choice_row(row)


def test_several_right_answers_are_a_list() -> None:
    row = {"question": "q", "A": "x", "B": "y", "C": "z", "answer": "A,C"}
    assert choice_row(row, multiple=True)["answer"] == ["A", "C"]


def test_answers_may_come_as_swifts_query_and_response_or_as_messages() -> None:
    assert answer_row({"query": "q", "response": "a"})["question"] == "q"
    row = answer_row({"messages": [{"role": "user", "content": "q"}], "answer": "a"})
    assert (row["question"], row["answer"]) == ("q", "a")
    with pytest.raises(ValueError, match="no answer"):
        answer_row({"question": "q"})


def test_a_broken_csv_row_is_named_by_file_and_line(tmp_path: Path) -> None:
    path = tmp_path / "q.csv"
    path.write_text("question,A,B,answer\nq,x,y,A\nq,x,y\n")
    with pytest.raises(UserError, match=r"q\.csv:3: fewer fields than the header has columns"):
        lay_out_questions(Benchmark("general_mcq", "general_mcq", {}, str(path)))
    path.write_text("question,A,B,answer\nq,x,y,A\nq,x,y,Z\n")
    with pytest.raises(UserError, match=r"q\.csv:3: answer is 'Z', expected one of A, B"):
        list(checked_rows([str(path)], choice_row))


@pytest.mark.parametrize("name", ["general_mcq", "general_qa"])
def test_a_question_with_a_picture_is_refused_and_not_asked_without_it(name: str, tmp_path: Path) -> None:
    path = tmp_path / "q.jsonl"
    row = {"question": "q", "A": "x", "B": "y", "answer": "A"}
    path.write_text("".join(json.dumps(each) + "\n" for each in (row, {**row, "images": ["dot.png"]})))
    with pytest.raises(UserError, match=rf"q\.jsonl:2: it has images, and {name} asks in text alone"):
        lay_out_questions(Benchmark(name, name, {}, str(path)))

"""An answer key for the scorers: generations known to be right and wrong, on real rows, through each library.

No model is asked: what a model might have said is given to the task that ``rayswift eval`` prepared.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from rayswift.arguments import make_arguments
from rayswift.eval.benchmarks import read_benchmarks

DATA = Path(__file__).resolve().parents[1] / "data"
ARC, GSM8K = str(DATA / "arc_challenge_24.jsonl"), str(DATA / "gsm8k_40.jsonl")

# The first row of each: ARC's answer is C ("Planetary days will become shorter."), GSM8K's is 72.
NATIVE_KEY = {
    "ARC_c": {
        "ANSWER: C": 1, "The planet spins faster, so its days shrink.\n\nANSWER: C": 1, "ANSWER: C.": 1,
        "ANSWER: B": 0, "": 0, "I cannot say.": 0, "ANSWER: A\nNo, wait.\nANSWER: B": 0,
    },
    "gsm8k": {
        "48 + 24 = 72, so \\boxed{72}": 1, "\\boxed{72.0}": 1, "\\boxed{\\$72}": 1, "\\boxed{72\\text{ clips}}": 1,
        "\\boxed{27}": 0, "\\boxed{7.2}": 0, "": 0, "\\boxed{72} is too many, so \\boxed{24}": 0,
    },
}  # fmt: skip
HARNESS_KEY = {  # generation → (strict-match, flexible-extract)
    "48 + 24 = 72\n#### 72": (1, 1), "#### 72.": (1, 1), "so it is 72 clips": (0, 1), "$72": (0, 1),
    "#### 27": (0, 0), "": (0, 0), "72 minus 24 is 48": (0, 0), "#### 72\n#### 24": (1, 0),
}  # fmt: skip


def prepared(backend: str, asked: str, path: str, **settings: Any) -> tuple[Any, Any]:
    """The backend with one benchmark of a local file prepared, and the benchmark."""
    from rayswift.eval.backends import choose_backend

    own = {asked: {"local_path": path, "few_shot_num": 0, **settings}}
    args: Any = make_arguments("eval", model="m", eval_dataset=[asked], eval_backend=backend, eval_dataset_args=own)
    (benchmark,) = read_benchmarks(args)
    chosen = choose_backend(args)
    chosen.prepare(benchmark)
    return chosen, benchmark


def native_scores(
    asked: str, path: str, generations: list[str], row: int = 0, **settings: Any
) -> list[dict[str, float]]:
    """What EvalScope says about generations for one row."""
    from evalscope.api.evaluator import TaskState
    from evalscope.api.model import ModelOutput
    from evalscope.api.registry import get_benchmark

    backend, benchmark = prepared("Native", asked, path, **settings)
    task = backend._task(benchmark, backend.dataset_args[asked])
    adapter = get_benchmark(benchmark.name, task)
    sample = next(iter(adapter.load_dataset().values()))[row]
    found = []
    for text in generations:
        state = TaskState(model="m", sample=sample, output=ModelOutput.from_content("m", text), completed=True)
        found.append(adapter.calculate_metrics(state).score.value)
    return found


@pytest.mark.parametrize(("asked", "path"), [("ARC_c", ARC), ("gsm8k", GSM8K)])
def test_evalscope_tells_right_from_wrong(asked: str, path: str) -> None:
    pytest.importorskip("evalscope")
    key = NATIVE_KEY[asked]
    scores = native_scores(asked, path, list(key))
    assert {text: next(iter(score.values())) for text, score in zip(key, scores, strict=True)} == key


def test_evalscope_tells_right_from_wrong_in_ones_own_questions(tmp_path: Path) -> None:
    pytest.importorskip("evalscope")
    (tmp_path / "mcq.csv").write_text("question,A,B,C,answer\nWhat is 2+2?,3,4,5,B\n")
    key = {"答案：B": 1.0, "答案：A": 0.0, "": 0.0}
    scores = native_scores("general_mcq", str(tmp_path / "mcq.csv"), list(key))
    assert {text: next(iter(score.values())) for text, score in zip(key, scores, strict=True)} == key
    (tmp_path / "qa.jsonl").write_text('{"query": "Where is Paris?", "response": "Paris is in France."}\n')
    same, other = native_scores("general_qa", str(tmp_path / "qa.jsonl"), ["Paris is in France.", "I like cheese"])
    assert same["Rouge-L-R"] == pytest.approx(1.0)
    assert other["Rouge-L-R"] == 0.0


def test_the_harness_tells_right_from_wrong_in_gsm8k() -> None:
    pytest.importorskip("lm_eval")
    backend, benchmark = prepared("lm-eval", "gsm8k", GSM8K)
    (task,) = backend.tasks[benchmark.asked]["tasks"].values()
    task.build_all_requests(limit=1, rank=0, world_size=1)
    (request,) = task.instances
    found = {}
    for text in HARNESS_KEY:
        request.resps = [text]
        task.apply_filters()
        found[text] = tuple(
            task.process_results(request.doc, [request.filtered_resps[kind]])["exact_match"]
            for kind in ("strict-match", "flexible-extract")
        )
    assert found == HARNESS_KEY


@pytest.mark.parametrize("best", range(4))
def test_the_harness_takes_the_likeliest_choice(best: int) -> None:
    pytest.importorskip("lm_eval")
    backend, benchmark = prepared("lm-eval", "ARC_c", ARC)
    (task,) = backend.tasks[benchmark.asked]["tasks"].values()
    doc = next(iter(task.eval_docs))
    likelihoods = [(-1.0 if number == best else -9.0, False) for number in range(4)]
    assert task.process_results(doc, likelihoods)["acc"] == (best == 2)


def test_ones_own_choices_are_scored_by_the_harness(tmp_path: Path) -> None:
    pytest.importorskip("lm_eval")
    path = tmp_path / "mcq.csv"
    path.write_text("question,A,B,C,answer\nWhat is 2+2?,3,4,5,B\nOdd?,1,2,,A\n")
    backend, benchmark = prepared("lm-eval", "general_mcq", str(path))
    (task,) = backend.tasks[benchmark.asked]["tasks"].values()
    docs = list(task.eval_docs)
    assert task.doc_to_text(docs[0]) == "What is 2+2?\nA. 3\nB. 4\nC. 5\nAnswer:"
    assert task.doc_to_choice(docs[1]) == ["A", "B"]
    assert task.process_results(docs[0], [(-5.0, False), (-1.0, False), (-5.0, False)])["acc"] == 1.0
    assert task.process_results(docs[0], [(-1.0, False), (-5.0, False), (-5.0, False)])["acc"] == 0.0


def test_ones_own_answers_are_scored_by_the_harness(tmp_path: Path) -> None:
    pytest.importorskip("lm_eval")
    path = tmp_path / "qa.jsonl"
    path.write_text('{"question": "Capital of France?", "answer": "Paris"}\n')
    backend, benchmark = prepared("lm-eval", "general_qa", str(path))
    (task,) = backend.tasks[benchmark.asked]["tasks"].values()
    doc = next(iter(task.eval_docs))
    assert task.process_results(doc, ["paris."])["exact_match"] == 1.0
    assert task.process_results(doc, ["Lyon"])["exact_match"] == 0.0

"""``rayswift eval`` over a small model: answers, files, going on after a stop, and what is refused."""

from __future__ import annotations

import json
import os
import shutil
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from rayswift.arguments import make_arguments
from rayswift.errors import UserError
from rayswift.eval.evaluate import evaluate
from rayswift.eval.results import Question, Result
from rayswift.exporting.model_card import model_card
from rayswift.generate.endpoint import EndpointEngine
from rayswift.generate.types import SamplingParams

DATA = Path(__file__).resolve().parents[1] / "data"
ARC, GSM8K = str(DATA / "arc_challenge_24.jsonl"), str(DATA / "gsm8k_40.jsonl")


@pytest.fixture(autouse=True)
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def run(url: str, *asked: str, backend: str = "Native", **settings: Any) -> dict[str, dict[str, float]]:
    local = {"ARC_c": {"local_path": ARC}, "gsm8k": {"local_path": GSM8K, "few_shot_num": 0}}
    own: Any = {
        "eval_url": url, "eval_dataset": list(asked), "eval_backend": backend, "max_new_tokens": 12,
        "eval_dataset_args": {name: local[name] for name in asked if name in local}, "eval_limit": 2, **settings,
    }  # fmt: skip
    return evaluate(make_arguments("eval", **own))  # type: ignore[arg-type]


def run_folders(backend: str) -> list[Path]:
    return sorted(path.parent for path in Path("eval_output", backend).glob("*/run.json"))


def answers(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "answers.jsonl").read_text("utf-8").splitlines()]


@pytest.mark.slow
@pytest.mark.skipif("RAYSWIFT_OPENCOMPASS" not in os.environ, reason="RAYSWIFT_OPENCOMPASS: a Python with OpenCompass")
def test_opencompass_gives_score_and_answers_and_the_key_is_in_no_file(small_endpoint: str, tmp_path: Path) -> None:
    """OpenCompass itself, in the environment of its own that docs/eval.md describes."""
    data = tmp_path / "data/ARC/ARC-c/ARC-Challenge-Dev.jsonl"
    data.parent.mkdir(parents=True)
    with open(ARC, encoding="utf-8") as file:
        data.write_text("".join(json.dumps(opencompass_row(json.loads(line))) + "\n" for line in file))
    own = {"ARC_c": {"local_path": str(tmp_path)}}
    python = {"python": os.environ["RAYSWIFT_OPENCOMPASS"]}
    key = "sk-of-the-test"
    scores = run(
        small_endpoint, "ARC_c", backend="OpenCompass", eval_dataset_args=own, extra_eval_args=python, api_key=key
    )
    (folder,) = run_folders("opencompass")
    found = answers(folder / "small" / "ARC_c")
    assert len(found) == 2
    assert all(one["answer"] and one["expected"] in "ABCD" and "\nA. " in one["prompt"] for one in found)
    (own_result,) = (folder / "small" / "ARC_c").glob("*/results/*/*.json")
    assert scores["small"]["ARC_c"] == pytest.approx(json.loads(own_result.read_text())["accuracy"] / 100)
    assert [path for path in tmp_path.rglob("*") if path.is_file() and key.encode() in path.read_bytes()] == []


def opencompass_row(row: dict[str, Any]) -> dict[str, Any]:
    """A row of ARC as AI2 wrote it, which is how OpenCompass reads it."""
    choices = [dict(zip(("text", "label"), pair, strict=True)) for pair in zip(*row["choices"].values(), strict=True)]
    return {"question": {"stem": row["question"], "choices": choices}, "answerKey": row["answerKey"]}


def test_evalscopes_benchmarks_end_in_table_json_page_and_swifts_line(
    small_endpoint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("evalscope")
    scores = run(small_endpoint, "ARC_c", "gsm8k")
    assert set(scores["small"]) == {"ARC_c", "gsm8k"}
    (folder,) = run_folders("native")
    found = answers(folder / "small" / "ARC_c")
    assert [one["expected"] for one in found] == ["C", "B"]
    assert all(one["answer"] and "meteorite" in found[0]["prompt"] for one in found)
    assert scores["small"]["ARC_c"] == pytest.approx(sum(one["scores"]["accuracy"] for one in found) / 2)
    summary = json.loads((folder / "results.json").read_text())["results"]
    assert [(one["benchmark"], one["num_questions"]) for one in summary] == [("ARC_c", 2), ("gsm8k", 2)]
    assert "meteorite" in (folder / "report.html").read_text()
    (line,) = [json.loads(row) for row in Path("result/small/eval_result.jsonl").read_text().splitlines()]
    assert set(line) == {"native", "time", "model", "adapters", "result_path", "eval_output_dir", "eval_limit"}
    assert line["native"]["ARC_c"]["accuracy"] == scores["small"]["ARC_c"]
    assert "ARC_c" in capsys.readouterr().out


def test_a_stopped_evaluation_asks_only_what_is_left(small_endpoint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("evalscope")
    from rayswift.eval.backends.evalscope import Native

    asked: list[str] = []
    real = Native.run

    def stopping(self: Native, benchmark: Any, *rest: Any) -> Any:
        asked.append(benchmark.asked)
        if benchmark.asked == "gsm8k" and asked.count("gsm8k") == 1:
            raise KeyboardInterrupt
        return real(self, benchmark, *rest)

    monkeypatch.setattr(Native, "run", stopping)
    with pytest.raises(KeyboardInterrupt):
        run(small_endpoint, "ARC_c", "gsm8k")
    scores = run(small_endpoint, "ARC_c", "gsm8k")
    assert asked == ["ARC_c", "gsm8k", "gsm8k"]
    assert set(scores["small"]) == {"ARC_c", "gsm8k"}
    assert len(run_folders("native")) == 1


def test_kept_answers_are_not_asked_again(small_endpoint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("evalscope")
    run(small_endpoint, "ARC_c")
    (folder,) = run_folders("native")
    benchmark = folder / "small" / "ARC_c"
    before = answers(benchmark)
    # As a kill in the middle leaves it: one whole answer, half of the next, nothing finished.
    for kind in ("predictions", "reviews"):
        (file,) = (benchmark / kind).rglob("*.jsonl")
        first, second = file.read_text("utf-8").splitlines()
        file.write_text(f"{first}\n{second[: len(second) // 2]}")
    (benchmark / "result.json").unlink()
    state = json.loads((folder / "run.json").read_text())
    (folder / "run.json").write_text(json.dumps({**state, "finished": False}))
    import openai.resources.chat.completions.completions as completions

    calls: list[str] = []
    real = completions.Completions.create

    def counted(self: Any, *rest: Any, **body: Any) -> Any:
        calls.append(str(body["messages"]))
        return real(self, *rest, **body)

    monkeypatch.setattr(completions.Completions, "create", counted)
    run(small_endpoint, "ARC_c")
    assert len(calls) == 1
    assert answers(benchmark) == before


def test_the_harness_asks_for_generations(small_endpoint: str, smollm2_dir: str) -> None:
    pytest.importorskip("lm_eval")
    scores = run(small_endpoint, "gsm8k", backend="lm-eval", model=smollm2_dir)
    (label,) = scores
    (folder,) = run_folders("lm_eval")
    found = answers(folder / label / "gsm8k")
    assert found[0]["prompt"].startswith("Question: Natalia sold clips")
    assert set(found[0]["scores"]) == {"exact_match-strict-match", "exact_match-flexible-extract"}
    assert found[0]["answer"]


def test_ones_own_questions_in_csv(small_endpoint: str, tmp_path: Path) -> None:
    pytest.importorskip("evalscope")
    path = tmp_path / "maths.csv"
    path.write_text("question,A,B,C,answer\nWhat is 2+2?,3,4,5,B\nWhat is 1+1?,2,3,4,A\n")
    run(small_endpoint, "general_mcq", eval_dataset_args={"general_mcq": {"local_path": str(path)}})
    (folder,) = run_folders("native")
    assert [one["expected"] for one in answers(folder / "small" / "general_mcq")] == ["B", "A"]


@pytest.mark.parametrize(
    ("row", "settings", "instruction"),
    [
        ("Which planet is red?,Mars,Venus,A", {}, "Answer the following multiple choice question."),
        ("哪颗行星是红色的?,火星,金星,A", {}, "回答下面的单项选择题"),
        ("What does 你好 mean in English?,hello,goodbye,A", {}, "Answer the following multiple choice question."),
        ("Which are planets?,Mars,Venus,AB", {"extra_params": {"multiple_correct": True}},
         "Answer the following multiple choice question where multiple answers may be correct."),
        ("Which planet is red?,Mars,Venus,A", {"prompt_template": "{question}\n{choices}"}, "Which planet is red?"),
    ],
)  # fmt: skip
def test_an_exam_is_asked_in_its_own_language(
    small_endpoint: str, tmp_path: Path, row: str, settings: dict[str, Any], instruction: str
) -> None:
    pytest.importorskip("evalscope")
    path = tmp_path / "exam.csv"
    path.write_text(f"question,A,B,answer\n{row}\n")
    run(small_endpoint, "general_mcq", eval_dataset_args={"general_mcq": {"local_path": str(path), **settings}})
    (folder,) = run_folders("native")
    (found,) = answers(folder / "small" / "general_mcq")
    assert found["prompt"].startswith(instruction)


class Api:
    """An endpoint of one model that answers with the statuses it is given, then with a text."""

    def __init__(self, statuses: list[int], models: list[dict[str, Any]]) -> None:
        self.asked: list[dict[str, Any]] = []
        api = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self.answer(200, {"object": "list", "data": models})

            def do_POST(self) -> None:
                api.asked.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
                status = statuses[min(len(api.asked), len(statuses)) - 1]
                text = {"choices": [{"index": 0, "text": "7"} for _ in api.asked[-1]["prompt"]]}
                self.answer(status, text if status == 200 else {"error": {"message": "no such thing"}})

            def answer(self, status: int, body: dict[str, Any]) -> None:
                content = json.dumps(body).encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, *_: Any) -> None: ...

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()


@pytest.mark.parametrize(
    ("statuses", "requests", "score"), [([400], 1, None), ([503, 503, 200], 3, 0.0), ([503, 404], 2, None)]
)
def test_what_is_refused_is_asked_once_and_the_key_is_in_no_log(
    smollm2_dir: str,
    statuses: list[int],
    requests: int,
    score: float | None,
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
) -> None:
    pytest.importorskip("lm_eval")
    api = Api(statuses, [{"id": "m", "object": "model", "max_model_len": 64}])
    settings = {"model": smollm2_dir, "api_key": "sk-of-the-test", "eval_limit": 1}
    if score is None:
        text = refused(api.url, "gsm8k", backend="lm-eval", **settings)
        assert text == f"--eval_dataset gsm8k: the endpoint refused it: HTTP {statuses[-1]}: " + (
            '{"error": {"message": "no such thing"}}'
        )
    else:
        (scores,) = run(api.url, "gsm8k", backend="lm-eval", **settings).values()
        assert scores["gsm8k"] == score
    assert len(api.asked) == requests
    # The prompt is cut to what the endpoint lists.
    assert all(len(prompt) < 64 for body in api.asked for prompt in body["prompt"])
    written = caplog.text + "".join(capfd.readouterr())
    assert "sk-of-the-test" not in written
    assert all(other not in written for other in ("fatal: not a git", "Requesting API", "it/s]"))


@pytest.mark.parametrize(
    ("models", "settings", "longest"),
    [
        ([{"id": "m", "max_model_len": 4096}], {}, 4096),
        ([{"id": "base", "max_model_len": 512}, {"id": "m", "parent": "base", "max_model_len": None}], {}, 512),
        ([{"id": "m"}], {"vllm_max_model_len": 777}, 777),
        ([{"id": "m"}], {"model": "SMOLLM2"}, 8192),
        ([{"id": "m"}], {}, 2048),
    ],
)
def test_prompts_are_as_long_as_the_endpoint_lists(
    smollm2_dir: str,
    models: list[dict[str, Any]],
    settings: dict[str, Any],
    longest: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pytest.importorskip("lm_eval")
    from rayswift.eval.backends.lm_eval import Harness
    from rayswift.serve.running import Endpoint

    warned: list[str] = []
    monkeypatch.setattr("rayswift.eval.backends.lm_eval.logger.warning", lambda text, *_: warned.append(text))
    api = Api([200], models)
    tokenizer = smollm2_dir if settings.pop("model", None) else None
    args: Any = make_arguments("eval", eval_url=api.url, eval_dataset=["gsm8k"], eval_backend="lm-eval", **settings)
    assert Harness(args)._max_length(Endpoint(api.url, None, "m"), tokenizer) == longest
    assert len(warned) == (longest == 2048)


class OneQuestion:
    """A backend in a few lines, for an environment without EvalScope: asks the endpoint one question."""

    folder = "native"

    def prepare(self, benchmark: Any) -> None: ...

    def check(self, benchmark: Any, endpoint: Any) -> None: ...

    def run(self, benchmark: Any, model: Any, endpoint: Any, folder: Path) -> Result:
        engine = EndpointEngine.connect(endpoint.base_url, model=endpoint.model)
        answer = engine.complete([{"role": "user", "content": "2+2?"}], SamplingParams(max_new_tokens=4)).text
        question = Question("q/0", "2+2?", answer, answer, "4", {"accuracy": 0.25})
        return Result(benchmark.asked, model.label, "Native", "accuracy", {"accuracy": 0.25}, 0, [question])


@pytest.mark.parametrize("backend", ["OneQuestion", "Native"])
def test_the_card_of_a_pushed_checkpoint_has_the_scores_that_eval_wrote(
    small_endpoint: str, smollm2_dir: str, tmp_path: Path, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = tmp_path / "v0-20250422-101811" / "checkpoint-7"
    shutil.copytree(smollm2_dir, checkpoint, ignore=shutil.ignore_patterns("*.safetensors"))
    (checkpoint / "args.json").write_text('{"command": "sft", "model": "org/base"}')
    if backend == "OneQuestion":
        monkeypatch.setattr("rayswift.eval.evaluate.choose_backend", lambda args: OneQuestion())
    else:
        pytest.importorskip("evalscope")
    scores = run(small_endpoint, "gsm8k", model=str(checkpoint))
    card = model_card(str(checkpoint), "me/tuned", str(checkpoint))
    (line,) = [json.loads(row) for row in (checkpoint / "eval_result.jsonl").read_text().splitlines()]
    metrics = line["native"]["gsm8k"]
    rows = [f"| gsm8k | {metric} | {value:.4g} | native, first 2 questions |" for metric, value in metrics.items()]
    assert rows
    assert all(row in card.splitlines() for row in rows)
    assert scores["checkpoint-7"]["gsm8k"] in metrics.values()
    assert str(tmp_path) not in card


# --- refused ----------------------------------------------------------------------------------------------------


def refused(url: str, *asked: str, **settings: Any) -> str:
    with pytest.raises(UserError) as error:
        run(url, *asked, **settings)
    assert "\n" not in str(error.value)
    return str(error.value)


NOWHERE = "http://127.0.0.1:9/v1"


def test_an_endpoint_that_does_not_answer_is_named() -> None:
    pytest.importorskip("evalscope")
    assert refused(NOWHERE, "ARC_c").startswith(f"--eval_url {NOWHERE}: no server answers there")


def test_data_is_looked_at_before_the_endpoint(tmp_path: Path) -> None:
    pytest.importorskip("evalscope")
    assert "no such benchmark; did you mean gsm8k" in refused(NOWHERE, "gms8k")
    text = refused(NOWHERE, "gsm8k", eval_dataset_args={})
    assert text.startswith("--eval_dataset gsm8k: its data cannot be loaded")
    assert '"local_path": "DIR"' in text
    broken = tmp_path / "q.csv"
    broken.write_text("question,A,B,answer\nq,x,y,A\nq,x,y\n")
    text = refused(NOWHERE, "general_mcq", eval_dataset_args={"general_mcq": {"local_path": str(broken)}})
    assert text == f"{broken}:3: fewer fields than the header has columns; mend the line"


def test_examples_that_are_not_there_are_refused_when_asked_for() -> None:
    own = {"gsm8k": {"local_path": GSM8K, "few_shot_num": 3}}
    for backend, library in (("Native", "evalscope"), ("lm-eval", "lm_eval")):
        pytest.importorskip(library)
        text = refused(NOWHERE, "gsm8k", backend=backend, eval_dataset_args=own)
        assert text.startswith("--eval_dataset_args: few_shot_num 3 of gsm8k needs its split train")


def test_settings_that_the_libraries_do_not_have_are_refused() -> None:
    pytest.importorskip("evalscope")
    assert refused(NOWHERE, "ARC_c", extra_eval_args={"work_dir": "x"}).startswith("--extra_eval_args: work_dir is set")
    pytest.importorskip("lm_eval")
    text = refused(NOWHERE, "gsm8k", backend="lm-eval", extra_eval_args={"nonsense": 1})
    assert text.startswith("--extra_eval_args: lm-eval has no nonsense here")


def test_likelihoods_need_an_engine_that_gives_them(smollm2_dir: str) -> None:
    pytest.importorskip("lm_eval")
    settings = {"eval_url": None, "model": smollm2_dir, "infer_backend": "transformers"}
    text = refused("", "ARC_c", backend="lm-eval", **settings)
    assert text.startswith("--eval_dataset ARC_c: lm-eval's arc_challenge needs log probabilities of the prompt")
    assert text.endswith("use vllm")

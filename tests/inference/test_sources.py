"""Results are kept for what answered them: other weights in the folder, another endpoint, and the run begins again."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from fake_endpoint import fake_endpoint

from rayswift.arguments import make_arguments
from rayswift.errors import UserError
from rayswift.eval import evaluate as evaluation
from rayswift.eval.results import Question, Result
from rayswift.generate.types import Answer
from rayswift.inference import command
from rayswift.journal import open_journal, open_results, open_run
from rayswift.modeling.loading import folder_fingerprint, model_fingerprint
from rayswift.sampling import run as sampling

QUESTIONS = [{"query": f"{n}?"} for n in range(3)]


def save_weights(folder: Path, value: float, **more: float) -> None:
    import torch
    from safetensors.torch import save_file

    tensors = {"w": torch.full((400, 300), value), "v": torch.zeros(8)}
    for name, number in more.items():
        tensors[name] = torch.full((2,), number)
    save_file(tensors, folder / "model.safetensors")


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """What looks like a model's folder, with weights of its own."""
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "llama", "architectures": ["LlamaForCausalLM"]}')
    (folder / "tokenizer.json").write_text("{}")
    save_weights(folder, 1.0)
    return folder


@pytest.fixture
def rows(tmp_path: Path) -> str:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in QUESTIONS))
    return str(path)


def jsonl(path: Path) -> list[Any]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def change_weights(folder: Path) -> None:
    save_weights(folder, 2.0)


def change_template(folder: Path) -> None:
    (folder / "chat_template.jinja").write_text("{{ messages }}")


def change_few_rows(folder: Path) -> None:
    """As a run does that trains nothing but the rows of new tokens."""
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    tensors["w"][350:360] = 9.0
    save_file(tensors, folder / "model.safetensors")


@pytest.mark.parametrize("change", [change_weights, change_template, change_few_rows])
def test_a_fingerprint_follows_the_content_and_not_the_place(
    model: Path, tmp_path: Path, change: Callable[[Path], None]
) -> None:
    before, weights = folder_fingerprint(str(model)), model_fingerprint(str(model))
    shutil.copytree(model, tmp_path / "copy")
    assert folder_fingerprint(str(tmp_path / "copy")) == before
    (model / "infer_result").mkdir()
    (model / "eval_result.jsonl").write_text("{}\n")
    assert folder_fingerprint(str(model)) == before  # results beside the weights are none of them
    change(model)
    assert folder_fingerprint(str(model)) != before
    assert (model_fingerprint(str(model)) != weights) == (change is change_weights)


@pytest.mark.parametrize("change", [change_weights, change_template])
def test_infer_asks_again_when_other_weights_lie_there(
    model: Path, rows: str, tmp_path: Path, change: Any, monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    caplog.set_level("INFO", "rayswift")
    said, path = ["old"], tmp_path / "out.jsonl"

    @contextlib.contextmanager
    def opened(job: Any, *_: Any) -> Iterator[Any]:
        yield lambda requests: [(request.numbers[0], Answer(said[0])) for request in requests]

    monkeypatch.setattr(command, "open_answers", opened)

    def answers() -> list[str]:
        args: Any = make_arguments("infer", model=str(model), val_dataset=[rows], result_path=str(path))
        return [row["response"] for row in command.infer(args) or ()]

    assert answers() == ["old"] * 3
    said[0] = "new"
    assert answers() == ["old"] * 3
    assert f"{path} is finished: its 3 rows are answered already" in caplog.text
    assert "another --result_path" in caplog.text
    change(model)
    assert answers() == ["new"] * 3
    assert f"--model {model} is not what it was when these rows were answered" in caplog.text
    assert [row["response"] for row in jsonl(path)] == ["old"] * 3 + ["new"] * 3


def test_infer_asks_again_when_the_endpoint_says_that_it_is_another(rows: str, tmp_path: Path) -> None:
    card, said = {"root": "/models/a", "created": 1, "max_model_len": None}, ["old"]
    with fake_endpoint(lambda body: [{"content": said[0]}], card=card) as (base_url, _):

        def answers() -> list[str]:
            path = str(tmp_path / "out.jsonl")
            args: Any = make_arguments("infer", base_url=base_url, val_dataset=[rows], result_path=path)
            return [row["response"] for row in command.infer(args) or ()]

        assert answers() == ["old"] * 3
        said[0] = "new"
        card |= {"created": 2, "max_model_len": 4096}  # it was started again
        assert answers() == ["old"] * 3
        card["root"] = "/models/b"
        assert answers() == ["new"] * 3


@pytest.mark.parametrize("known", [{}, {"--model m": "1"}])
def test_files_without_marks_are_gone_on_with_and_get_them(tmp_path: Path, known: dict[str, str]) -> None:
    path, now = tmp_path / "out.jsonl", {"--model m": "1", "--adapters a": "2"}
    with open_results(path, "run", known) as results:
        results.append({"n": 0})
    for sources in (now, {}):  # an endpoint may not answer at the second start
        with open_results(path, "run", sources) as results:
            assert results.rows == [{"n": 0}]
    with open_results(path, "run", now | {"--adapters a": "3"}) as results:
        assert results.rows == []
    for sources in (known, now, {}):
        with open_journal(tmp_path / "j", "run", override=False, sources=sources) as journal:
            journal.add(1, {"text": "one"})
            assert len(journal) == 1
    with (
        pytest.raises(UserError, match="1 answers of an unfinished run of what --adapters a was before; give another"),
        open_journal(tmp_path / "j", "run", override=False, sources=now | {"--adapters a": "3"}),
    ):
        pass
    for sources in (known, now, {}):
        with open_run(tmp_path / "runs", "run", sources) as run:
            pass
    assert run.resumed
    with open_run(tmp_path / "runs", "run", now | {"--adapters a": "3"}) as run:
        assert not run.resumed


def test_sample_does_not_mix_the_answers_of_two_models(
    model: Path, rows: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    @contextlib.contextmanager
    def stops(args: Any, *files: Any) -> Iterator[Any]:
        def answers(requests: Any) -> Iterator[tuple[int, Answer]]:
            yield requests[0].numbers[0], Answer("old")
            raise KeyboardInterrupt

        yield answers

    monkeypatch.setattr(sampling, "open_answers", stops)

    def sample(**more: Any) -> None:
        args: Any = make_arguments("sample", model=str(model), dataset=[rows], num_return_sequences=2,
                                   output_dir=str(tmp_path / "out"), **more)  # fmt: skip
        with contextlib.suppress(KeyboardInterrupt):
            sampling.sample(args)

    sample(output_file="a.jsonl")
    change_weights(model)
    with pytest.raises(UserError, match=rf"1 answers of an unfinished run of what --model {model} was before"):
        sample(output_file="a.jsonl")
    sample(resume=True)  # the other run is not this one's
    assert len(list((tmp_path / "out").glob(".*.answers"))) == 2
    sample(output_file="a.jsonl", override_exist_file=True)


@pytest.mark.parametrize("flag", ["eval_url", "model"])
def test_eval_goes_on_with_the_answers_of_the_same_model_only(
    flag: str, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    asked: list[str] = []

    class Backend:
        folder = "native"

        def prepare(self, benchmark: Any) -> None: ...

        def check(self, benchmark: Any, endpoint: Any) -> None: ...

        def run(self, benchmark: Any, model: Any, endpoint: Any, folder: Path) -> Result:
            if asked and asked[-1] == "stop":
                asked.pop()
                raise KeyboardInterrupt
            asked.append(benchmark.asked)
            question = Question("q/0", "1+1?", "2", "2", "2", {"accuracy": 1.0})
            return Result(benchmark.asked, model.label, "Native", "accuracy", {"accuracy": 1.0}, 0, [question])

    monkeypatch.setattr(evaluation, "choose_backend", lambda args: Backend())
    monkeypatch.setattr(evaluation, "check_endpoints", lambda endpoints: None)
    monkeypatch.setattr(
        evaluation, "_running", lambda endpoint: contextlib.nullcontext(evaluation.Endpoint("", None, "m"))
    )
    card = {"root": "a"}
    with fake_endpoint(lambda body: [], card=card) as (base_url, _):
        where = {"eval_url": base_url} if flag == "eval_url" else {"model": str(model)}

        def evaluate() -> None:
            args: Any = make_arguments("eval", **where, eval_dataset=["ARC_c", "gsm8k"])
            with contextlib.suppress(KeyboardInterrupt):
                evaluation.evaluate(args)

        monkeypatch.setattr(Result, "save", save_and_stop(asked, Result.save))
        evaluate()  # stops after the first
        assert asked == ["ARC_c"]
        card["root"] = "b"
        change_weights(model)
        evaluate()
        assert asked == ["ARC_c", "ARC_c"]  # not gsm8k alone
        evaluate()
        assert asked == ["ARC_c", "ARC_c", "gsm8k"]


def save_and_stop(asked: list[str], save: Any) -> Any:
    """Results are saved, and the run stops after the first benchmark."""

    def saved(result: Result, folder: Path) -> None:
        save(result, folder)
        if result.benchmark == "ARC_c":
            asked.append("stop")

    return saved

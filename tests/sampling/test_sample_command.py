"""``rayswift sample`` from command to file: a pool of Transformers engines, an endpoint, and answers sampled before."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from rayswift.arguments import make_arguments
from rayswift.errors import UserError
from rayswift.generate.pool import Request
from rayswift.generate.types import Answer
from rayswift.sampling import run as sampling_run
from rayswift.sampling import sample

GSM8K = Path(__file__).parent.parent / "data" / "gsm8k_40.jsonl"
PLUGIN = """
from rayswift.rewards import ORM, PRM, orms, prms

class EvenLength(ORM):
    def __call__(self, completions, solution, **kwargs):
        return [float(len(text) % 2 == 0 or text == right) for text, right in zip(completions, solution)]

class Length(PRM):  # as plugins of SWIFT are written
    def __call__(self, infer_requests, ground_truths, **kwargs):
        return [[1.0, len(request.messages[-1]["content"]) / 1000] for request in infer_requests]

class Broken(ORM):
    def __call__(self, completions, **kwargs):
        return [1 / 0 for _ in completions]

orms.update(even=EvenLength, broken=Broken, short=lambda completions: [1.0])
prms["length"] = Length
"""


@pytest.fixture
def plugin(tmp_path: Path) -> str:
    path = tmp_path / "rewards_of_the_test.py"
    path.write_text(PLUGIN)
    return str(path)


def run(folder: Path, **settings: Any) -> dict[str, Any]:
    """``rayswift sample`` over the first 5 rows of GSM8K, 3 answers each."""
    defaults: dict[str, Any] = {"dataset": [f"{GSM8K}#5"], "num_return_sequences": 3, "max_new_tokens": 8,
                                "output_dir": str(folder), "output_file": "out.jsonl", "use_gpu": False}  # fmt: skip
    args = make_arguments("sample", **{**defaults, **settings})
    return sample(args)  # type: ignore[arg-type]


def read(path: str | Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]


# --- a pool -----------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("ray_cluster")
def test_a_pool_answers_every_prompt_so_many_times_and_a_second_run_scores_the_file(
    tiny_dir: str, tmp_path: Path, plugin: str, capsys: pytest.CaptureFixture[str]
) -> None:
    found = run(tmp_path / "a", model=tiny_dir, sampler_engine="pt", num_sampling_batch_size=2)
    rows = read(found["output_file"])
    questions = [json.loads(line)["question"] for line in GSM8K.read_text(encoding="utf-8").splitlines()[:5]]
    assert [row["messages"][0]["content"] for row in rows] == [question for question in questions for _ in range(3)]
    assert [len({row["id"] for row in rows[first : first + 3]}) for first in range(0, 15, 3)] == [1] * 5
    assert len({row["messages"][1]["content"] for row in rows}) == 15  # every answer has a seed of its own
    assert found["rows"] == found["answers"] == 15
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == ["out.jsonl"]
    printed = capsys.readouterr().out
    assert "'num_generated_tokens': 120" in printed
    assert "5 prompts, 15 answers; 15 rows, 0 with a rejected answer" in printed
    assert f"rayswift sft --model MODEL --dataset {found['output_file']}" in printed

    second = run(tmp_path / "b", sampler_engine="no", cache_files=[found["output_file"]], orm_model="even",
                 prm_model="length", external_plugins=[plugin], n_best_to_keep=2)  # fmt: skip
    pairs = read(second["output_file"])
    assert {row["id"] for row in pairs} <= {row["id"] for row in rows}
    assert second["pairs"] == len([row for row in pairs if "rejected_response" in row]) > 0
    for row in pairs:
        assert list(row) in (["messages", "rejected_response", "id"], ["messages", "id"])
        assert row["messages"][-1]["content"] != row.get("rejected_response")


@dataclass
class StubEngine:
    """Answers at once, the last number first; the user stops the run after ``most`` answers. Texts tell the seeds."""

    most: int = 100
    asked: list[int] = field(default_factory=list)

    @contextlib.contextmanager
    def opened(self, _: Any, files: bool) -> Iterator[Callable[[Sequence[Request]], Iterator[tuple[int, Answer]]]]:
        """In the place of ``open_answers``."""
        yield self.answers

    def answers(self, requests: Sequence[Request]) -> Iterator[tuple[int, Answer]]:
        for request in reversed(requests):
            for number, seed in zip(request.numbers, request.seeds, strict=True):
                if len(self.asked) == self.most:
                    raise KeyboardInterrupt
                self.asked.append(number)
                yield number, Answer(f"seed {seed}", num_generated_tokens=2)


def test_a_run_that_was_stopped_goes_on_and_asks_nothing_twice(
    tiny_dir: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    asked = []
    settings = {"model": tiny_dir, "resume": True, "output_file": None}
    for most in (4, 5, 100):
        engine = StubEngine(most)
        monkeypatch.setattr(sampling_run, "open_answers", engine.opened)
        caplog.clear()
        caplog.set_level("INFO", "rayswift")
        if most < 100:
            with pytest.raises(KeyboardInterrupt):
                run(tmp_path, **settings)
            assert "goes on where it stopped" in caplog.text
            with next(tmp_path.glob(".*.answers")).open("a") as file:
                file.write('{"number": 14, "text": "half a r')
        else:
            found = run(tmp_path, **settings)
            assert "9 of 15 answers are there already" in caplog.text
        asked += engine.asked
    assert sorted(asked) == list(range(15))
    rows = read(found["output_file"])
    assert len(rows) == 15
    assert len({(row["id"], row["messages"][-1]["content"]) for row in rows}) == 15
    assert not list(tmp_path.glob(".*"))
    before = Path(found["output_file"]).read_bytes()
    monkeypatch.setattr(sampling_run, "open_answers", StubEngine(most=0).opened)
    again = run(tmp_path, model=tiny_dir, output_file=Path(found["output_file"]).name)
    assert again == {"output_file": found["output_file"]}  # there already: nothing is done
    assert Path(found["output_file"]).read_bytes() == before


@pytest.mark.slow
@pytest.mark.usefixtures("ray_cluster")
def test_a_reward_model_scores_and_one_that_is_none_is_refused_first(
    tiny_dir: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch
    from tiny_models import llama_config
    from transformers import AutoTokenizer, LlamaForSequenceClassification

    torch.manual_seed(0)
    config = llama_config(vocab_size=49152, max_position_embeddings=512, num_labels=1, initializer_range=0.5)
    LlamaForSequenceClassification(config).save_pretrained(tmp_path / "rm")
    AutoTokenizer.from_pretrained(tiny_dir).save_pretrained(tmp_path / "rm")
    monkeypatch.setattr(sampling_run, "open_answers", StubEngine().opened)
    first = run(tmp_path / "a", model=tiny_dir)
    settings = {"sampler_engine": "no", "cache_files": [first["output_file"]], "n_best_to_keep": 1}
    found = run(tmp_path / "b", prm_model=str(tmp_path / "rm"), prm_threshold=-1e9, **settings)
    assert found["rows"] == found["pairs"] == 5
    with pytest.raises(UserError, match="a LlamaForCausalLM gives no score"):
        run(tmp_path / "c", prm_model=tiny_dir, **settings)
    assert not (tmp_path / "c").exists()


# --- an endpoint ------------------------------------------------------------------------------------------------


def test_an_endpoint_answers_and_its_answers_are_judged(tiny_served: Any, tmp_path: Path) -> None:
    endpoint = {"sampler_engine": "client", "base_url": tiny_served.base_url, "api_key": tiny_served.api_key}
    found = run(tmp_path, **endpoint, dataset=[f"{GSM8K}#2"], sampler_type="distill", system="Be brief.",
                max_requests_per_minute=600)  # fmt: skip
    rows = read(found["output_file"])
    assert len(rows) == 6
    assert {row["messages"][0]["content"] for row in rows} == {"Be brief."}
    assert len({row["messages"][-1]["content"] for row in rows}) > 2
    judged = run(tmp_path, sampler_engine="no", cache_files=[found["output_file"]], prm_model="client",
                 dataset=[f"{GSM8K}#2"], system="Be brief.", judge_base_url=tiny_served.base_url, prm_threshold=-2.0,
                 judge_max_tokens=8, judge_api_key=tiny_served.api_key, output_file="judged.parquet",
                 orm_model="gsm8k")  # fmt: skip
    from pyarrow import parquet

    table = parquet.read_table(judged["output_file"])
    assert {"messages", "id"} <= set(table.column_names)
    assert table.num_rows == judged["rows"] >= 2  # the dataset's own answers are right
    assert table.column("messages")[0].as_py()[-1]["role"] == "assistant"


def test_an_endpoint_that_cannot_be_used_is_one_line_and_leaves_nothing(tiny_served: Any, tmp_path: Path) -> None:
    for settings, line in (
        ({"api_key": "wrong"}, "the key is not accepted"),
        ({"base_url": "http://127.0.0.1:9/v1"}, "no server answers there"),
        ({"model": "nobody"}, "nobody"),
    ):
        endpoint = {"sampler_engine": "client", "base_url": tiny_served.base_url, "api_key": tiny_served.api_key}
        with pytest.raises(UserError, match=line) as caught:
            run(tmp_path / "out", **{**endpoint, **settings})
        assert "\n" not in str(caught.value)
        assert not (tmp_path / "out").exists()


# --- answers sampled before -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("reward", "line"),
    [("broken", r"--orm_model broken: ZeroDivisionError: .*rewards_of_the_test.py:14"),
     ("short", "--orm_model short: returned 1 numbers for 2 answers")],
)  # fmt: skip
def test_a_reward_that_fails_is_one_line(tmp_path: Path, plugin: str, reward: str, line: str) -> None:
    cache = tmp_path / "cache.jsonl"
    cache.write_text(json.dumps({"id": "x", "messages": [
        {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}) + "\n")  # fmt: skip
    with pytest.raises(UserError, match=line):
        run(tmp_path / "out", sampler_engine="no", cache_files=[str(cache), str(cache)], dataset=[], orm_model=reward,
            external_plugins=[plugin])  # fmt: skip
    assert not (tmp_path / "out").exists()

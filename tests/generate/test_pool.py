"""Batch inference over a pool of engines: the answers of one engine, in the order of the dataset."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import psutil
import pytest

from rayswift.arguments import make_arguments
from rayswift.cluster import Cluster
from rayswift.data.tokens.encoder import Encoder
from rayswift.errors import UserError
from rayswift.generate import pool as engine_pool
from rayswift.generate.model_spec import ModelSpec
from rayswift.generate.pool import EnginePool, pool_size
from rayswift.generate.pool_rows import answer_row, read_answer
from rayswift.generate.transformers import TransformersEngine
from rayswift.generate.types import Answer, SamplingParams
from rayswift.generate.vllm_pool import RequestMaker, openai_logprobs, sampling_params
from rayswift.inference.command import infer
from rayswift.modeling.resolved import ResolvedModel

FRANCE = [{"role": "user", "content": "What is the capital of France?"}]


def process_title(process: psutil.Process) -> str:
    """``ray::MapWorker(MapBatches(TransformersWorker)).submit`` while such an engine answers."""
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


@pytest.fixture
def dataset(tmp_path: Path) -> str:
    rows = [{"query": f"What is the capital of {name}?"} for name in ("France", "Italy", "Spain", "Japan", "Peru")]
    rows[3] = {"nothing": "here"}
    rows.append({"query": "word " * 9000})
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.mark.usefixtures("ray_cluster")
def test_a_pool_answers_as_one_engine_does(tiny_dir: str, dataset: str, tmp_path: Path) -> None:
    def run(name: str, **settings: Any) -> list[dict[str, Any]] | None:
        return infer(
            make_arguments(
                "infer", model=tiny_dir, val_dataset=[dataset], max_new_tokens=8, temperature=0, use_gpu=False,
                logprobs=True, result_path=str(tmp_path / name), **settings,
            )
        )  # fmt: skip

    alone, pooled = run("alone.jsonl"), run("pool.jsonl", num_workers=1, max_batch_size=1)
    assert pooled is not None
    assert pooled == alone
    assert len({row["response"] for row in pooled}) == 5
    assert [bool(row["response"]) for row in pooled] == [True, True, True, False, True, False]
    assert "tokens, the context holds" in pooled[5]["error"]
    assert (tmp_path / "pool.jsonl").read_text() == (tmp_path / "alone.jsonl").read_text()


@pytest.mark.slow
@pytest.mark.usefixtures("ray_cluster")
def test_prompts_that_engine_after_engine_dies_of_end_the_run(
    smollm2_dir: str, dataset: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine_pool, "BLOCK_RETRIES", 1)
    args = make_arguments(
        "infer", model=smollm2_dir, val_dataset=[dataset], num_workers=1, use_gpu=False, max_new_tokens=4000,
        result_path=str(tmp_path / "out.jsonl"),
    )  # fmt: skip
    killed: set[int] = set()
    ended = threading.Event()

    def kill_engines() -> None:
        while not ended.wait(0.5):
            for one in psutil.Process().children(recursive=True):
                title = process_title(one)
                if "TransformersWorker" in title and ".submit" in title and one.pid not in killed:
                    killed.add(one.pid)
                    one.kill()

    killer = threading.Thread(target=kill_engines)
    killer.start()
    try:
        with pytest.raises(UserError, match="engines died 2 times of the same prompts"):
            infer(args)
    finally:
        ended.set()
        killer.join()
    assert len(killed) >= 2


@pytest.mark.slow
@pytest.mark.usefixtures("ray_cluster")
def test_an_engine_that_cannot_start_is_one_line(smollm2_dir: str, dataset: str, tmp_path: Path) -> None:
    args = make_arguments(
        "infer", model=smollm2_dir, val_dataset=[dataset], num_workers=1, use_gpu=False,
        model_kwargs={"no_such_setting": 1}, result_path=str(tmp_path / "out.jsonl"),
    )  # fmt: skip
    with pytest.raises(UserError, match="the engine failed") as caught:
        infer(args)
    assert "\n" not in str(caught.value)
    assert "no_such_setting" in str(caught.value)


@pytest.mark.parametrize(
    ("asked", "bundles", "gpus", "size"),
    [
        (None, [{"CPU": 1.0}], 0, (1, 1)),
        (2, [{"CPU": 1.0}], 0, (2, 2)),
        ((1, 9), [{"CPU": 1.0}], 0, (1, 9)),
        (None, [{"CPU": 2.0, "GPU": 1.0}, {"CPU": 1.0, "GPU": 1.0}], 8, (4, 4)),
    ],
)
def test_the_size_of_a_pool_follows_num_workers_or_the_gpus(
    asked: Any, bundles: Any, gpus: float, size: tuple[int, int]
) -> None:
    args = make_arguments("infer", model="m", val_dataset=["d"], num_workers=asked)
    plan = ModelSpec("m", "m", "vllm", bundles=bundles)
    assert pool_size(args, plan, Cluster(embedded=True, cpus=16, gpus=gpus, nodes=1)) == size


def test_a_pool_has_the_engines_of_data_parallel_size() -> None:
    args = make_arguments("infer", model="m", val_dataset=["d"], infer_backend="vllm", vllm_data_parallel_size=3)
    plan = ModelSpec("m", "m", "vllm", bundles=[{"CPU": 1.0, "GPU": 1.0}])
    assert pool_size(args, plan, Cluster(embedded=True, cpus=16, gpus=8, nodes=1)) == (3, 3)


@pytest.mark.parametrize(("engine", "count", "needed"), [("transformers", 3, "3"), ("vllm", 2, "2.2")])
def test_a_pool_that_never_fits_is_refused_instead_of_waiting_for_ever(engine: str, count: int, needed: str) -> None:
    args = make_arguments("infer", model="m", val_dataset=["d"], num_workers=count)
    with pytest.raises(UserError, match=rf"--num_workers {count}: .* need {needed} CPUs and this machine has 2 CPUs"):
        pool_size(args, ModelSpec("m", "m", engine), Cluster(embedded=True, cpus=2, gpus=0, nodes=1))


def test_vllm_gets_the_token_ids_of_training_and_rows_that_are_no_prompt_pass_it_by(smollm2_dir: str) -> None:
    encoder = Encoder(smollm2_dir)
    maker = RequestMaker(encoder, SamplingParams(max_new_tokens=100), seed=7, context=64, model=smollm2_dir)
    made = maker({"messages": json.dumps(FRANCE), "tools": "null"})
    assert made["tokenized_prompt"] == encoder.encode_prompt(FRANCE)
    assert made["__inference_error__"] == ""
    assert made["sampling_params"]["max_tokens"] == 64 - len(made["tokenized_prompt"])
    assert made["sampling_params"]["stop_token_ids"] == encoder.eos_token_ids
    refused = maker({"messages": json.dumps([{"role": "user", "content": "word " * 99}]), "tools": "null"})
    assert "the context holds 64" in refused["__inference_error__"]
    assert refused.keys() == made.keys()  # Arrow fills gaps with None, which would read as an error


@pytest.mark.parametrize(
    "settings",
    [{}, {"temperature": 0.0}, {"temperature": 0.5}, {"top_p": 0.5}, {"top_k": 7, "temperature": 2.0}, {"top_k": -1},
     {"repetition_penalty": 1.2}],
)  # fmt: skip
@pytest.mark.parametrize("own", [{}, {"do_sample": True, "temperature": 0.2, "top_p": 0.9, "top_k": 50}])
def test_unset_sampling_is_the_models_own_as_in_the_transformers_engine(
    engine: TransformersEngine, settings: Any, own: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "generation_config.json").write_text(json.dumps(own))
    found = engine.model.generation_config
    for name in ("do_sample", "temperature", "top_p", "top_k"):
        monkeypatch.setattr(found, name, own.get(name))
    monkeypatch.setattr("rayswift.generate.vllm_pool.generation_config", lambda _: own)
    chosen = SamplingParams(**settings)
    expected, searched = engine.sampling(chosen, 10), engine.generation_config(chosen, 10)
    params = sampling_params(chosen, engine.encoder, 0, 100)
    assert (params["temperature"] > 0) == searched.do_sample == (not expected.greedy)
    for name in ("temperature", "top_p", "top_k"):
        assert params[name] == getattr(expected, name)
        assert getattr(searched, name) == (params[name] if searched.do_sample else None)
    assert params["repetition_penalty"] == searched.repetition_penalty == expected.repetition_penalty


def test_vllms_logprobs_become_openais(smollm2_dir: str) -> None:
    tokenizer = Encoder(smollm2_dir).tokenizer
    first, second = tokenizer.encode("Hello world")[:2]
    steps = [{first: {"logprob": -0.1, "rank": 1}, second: {"logprob": -2.0, "rank": 2}},
             {second: {"logprob": float("-inf"), "rank": 9}}]  # fmt: skip
    found = openai_logprobs(tokenizer, [first, second], steps)
    assert found is not None
    assert [entry["logprob"] for entry in found["content"]] == [-0.1, -9999.0]
    assert [other["logprob"] for other in found["content"][0]["top_logprobs"]] == [-0.1, -2.0]
    assert openai_logprobs(tokenizer, [first], None) is None


def test_an_answer_survives_the_way_back() -> None:
    answer = Answer("text", 3, 4, {"content": []})
    assert read_answer(answer_row(0, answer)) == answer
    assert read_answer(answer_row(0, Answer(error="why"))) == Answer(error="why")
    assert read_answer({"index": 0, "__inference_error__": "why"}) == Answer(error="why")


def test_a_pool_without_rows_starts_nothing() -> None:
    args = make_arguments("infer", model="m", val_dataset=["d"])
    pool = EnginePool(ResolvedModel(args, "m"), ModelSpec("m", "m", "vllm"), (1, 1))
    assert list(pool.answers([])) == []

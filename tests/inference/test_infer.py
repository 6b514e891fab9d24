"""``rayswift infer`` as a whole: checkpoints, datasets, result files, and what is refused."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from in_process import rayswift

from rayswift.arguments import make_arguments
from rayswift.errors import UserError
from rayswift.inference.command import infer, result_path
from rayswift.inference.rows import read_rows, resolve_asked
from rayswift.modeling.resolved import resolve_model

ROWS = [
    {"messages": [{"role": "user", "content": "What is the capital of France?"},
                  {"role": "assistant", "content": "The capital of France is Paris."}]},
    {"query": "What is the capital of Italy?", "response": "Rome", "channel": "b"},
    {"instruction": "Say hi", "input": ""},
    {"nothing": 1},
    {"query": "Name a colour."},
]  # fmt: skip


@pytest.fixture
def dataset(tmp_path: Path) -> str:
    path = tmp_path / "val.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return str(path)


def infer_args(**settings: Any) -> Any:
    return make_arguments("infer", **({"max_new_tokens": 10, "temperature": 0} | settings))


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_dataset_mode_writes_swifts_rows_and_survives_bad_ones(
    smollm2_dir: str, dataset: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "new" / "out.jsonl"
    args = infer_args(model=smollm2_dir, val_dataset=[dataset], result_path=str(path), max_batch_size=3, metric="acc")
    results = infer(args)
    assert results == read_jsonl(path)
    assert results is not None
    assert list(results[0]) == ["response", "labels", "logprobs", "messages", "dataset"]
    assert results[0] == {
        "response": "The capital of France is Paris.",
        "labels": "The capital of France is Paris.",
        "logprobs": None,
        "messages": ROWS[0]["messages"],
        "dataset": dataset,
    }
    assert (results[1]["labels"], results[1]["channel"]) == ("Rome", "b")
    assert results[1]["messages"][-1] == {"role": "assistant", "content": results[1]["response"]}
    assert results[2]["labels"] is None
    assert f"{dataset}:4: " in results[3]["error"]
    assert [bool(row["response"]) for row in results] == [True, True, True, False, True]
    printed = capsys.readouterr().out
    assert "{'acc': 0.5}" in printed
    assert "'num_samples': 5" in printed
    assert str(path) in printed


def test_rows_can_be_limited_sampled_and_shuffled(dataset: str) -> None:
    def rows_of(args: Any) -> list[Any]:
        return read_rows(resolve_asked(args), args)

    def first_user(args: Any) -> list[str]:
        return [row["messages"][0]["content"] if row["messages"] else "bad" for row in rows_of(args)]

    everything = first_user(infer_args(model="m", val_dataset=[dataset]))
    assert len(everything) == 5
    assert first_user(infer_args(model="m", val_dataset=[dataset + "#2"])) == everything[:2]
    assert first_user(infer_args(model="m", val_dataset=[dataset], val_dataset_sample=3)) == everything[:3]
    shuffled = first_user(infer_args(model="m", val_dataset=[dataset], val_dataset_shuffle=True))
    assert shuffled != everything
    assert sorted(shuffled) == sorted(everything)
    with pytest.raises(UserError, match=r"val\.jsonl:4: "):
        rows_of(infer_args(model="m", val_dataset=[dataset], strict=True))


def test_a_checkpoint_alone_is_enough_and_its_system_is_used(checkpoint: str, smollm2_dir: str) -> None:
    asked = infer_args(adapters=[checkpoint])
    args = resolve_model(asked).args
    assert args.model == smollm2_dir
    assert args.system == "Answer with one word."
    assert (asked.model, asked.system) == (None, None)  # the caller's arguments are as they were
    assert resolve_model(infer_args(adapters=[checkpoint], system="Mine")).args.system == "Mine"
    assert str(result_path(args)).startswith(checkpoint + "/infer_result/")
    args.storage_path = "/storage"
    assert str(result_path(args)).startswith(f"/storage/result/{args.model_suffix}/infer_result/")


def test_an_adapter_without_args_json_names_its_base_model(checkpoint: str, smollm2_dir: str) -> None:
    saved = Path(checkpoint) / "args.json"
    hidden = saved.rename(saved.with_suffix(".hidden"))
    try:
        assert resolve_model(infer_args(adapters=[checkpoint])).args.model == smollm2_dir
    finally:
        hidden.rename(saved)


def test_adapter_and_merged_adapter_answer_alike_and_unlike_the_base(
    checkpoint: str, smollm2_dir: str, tmp_path: Path
) -> None:
    path = tmp_path / "one.jsonl"
    path.write_text(json.dumps({"query": "What is your name?"}))
    common = {"val_dataset": [str(path)], "max_new_tokens": 4, "result_path": str(tmp_path / "out.jsonl")}
    base = infer(infer_args(model=smollm2_dir, **common))
    adapted = infer(infer_args(adapters=[checkpoint], **common))
    merged = infer(infer_args(adapters=[checkpoint], merge_lora=True, **common))
    assert base is not None
    assert adapted is not None
    assert merged is not None
    assert adapted[0]["response"] != base[0]["response"]
    assert merged[0]["response"] == adapted[0]["response"]
    assert (Path(checkpoint + "-merged") / "model.safetensors").is_file()
    assert len(read_jsonl(tmp_path / "out.jsonl")) == 3  # appended


def test_streaming_over_a_dataset_shows_query_and_answer(
    smollm2_dir: str, dataset: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = str(tmp_path / "out.jsonl")
    results = infer(infer_args(model=smollm2_dir, val_dataset=[dataset + "#1"], result_path=path, stream=True))
    assert results is not None
    assert results[0]["response"] == "The capital of France is Paris."
    assert "[QUERY] What is the capital of France?\n[RESPONSE] The capital" in capsys.readouterr().out


def test_the_command_answers_a_pipe_and_exits_with_0(smollm2_dir: str) -> None:
    done = rayswift(
        "infer", "--model", smollm2_dir, "--infer_backend", "pt", "--temperature", "0", "--max_new_tokens", "10",
        "--stream", "true", stdin="What is the capital of France?\n",
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (0, "The capital of France is Paris.\n"), done.stderr


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"adapters": ["/nowhere/checkpoint-1"]}, "/nowhere/checkpoint-1"),
        ({"model": "/nowhere/model"}, "/nowhere/model"),
        ({"val_dataset": ["/nowhere/rows.jsonl"]}, "--val_dataset /nowhere/rows.jsonl"),
        ({"adapters": ["a", "b"]}, "one adapter"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(
    settings: dict[str, Any], message: str, smollm2_dir: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as caught:
        infer(infer_args(**({"model": smollm2_dir} | settings)))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_a_result_path_that_cannot_be_written_is_refused_before_the_model_loads(
    smollm2_dir: str, dataset: str, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="--result_path"):
        infer(infer_args(model=smollm2_dir, val_dataset=[dataset], result_path=str(tmp_path / "file" / "out.jsonl")))


def test_load_data_args_asks_what_the_run_held_out(
    smollm2_dir: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, elsewhere = tmp_path / "run", tmp_path / "elsewhere"
    (run / "checkpoint-7").mkdir(parents=True)
    elsewhere.mkdir()
    for name, text in (("run/val_dataset.jsonl", "held out"), ("train.jsonl", "trained"), ("mine.jsonl", "mine")):
        (tmp_path / name).write_text(json.dumps({"query": text}) + "\n")
    shutil.copytree(smollm2_dir, run / "checkpoint-7", dirs_exist_ok=True, copy_function=os.symlink)
    trained = make_arguments("sft", model=smollm2_dir, dataset=[str(tmp_path / "train.jsonl")])
    trained.save(run / "checkpoint-7" / "args.json")
    monkeypatch.chdir(elsewhere)

    def asked(**settings: Any) -> list[str]:
        args = resolve_model(infer_args(model=str(run / "checkpoint-7"), load_data_args=True, **settings)).args
        return [row["messages"][0]["content"] for row in read_rows(resolve_asked(args), args)]

    assert asked() == ["held out"]
    assert (
        asked(dataset=[str(tmp_path / "mine.jsonl")]) == asked(val_dataset=[str(tmp_path / "mine.jsonl")]) == ["mine"]
    )
    (run / "val_dataset.jsonl").unlink()
    with pytest.raises(UserError, match=r"--load_data_args true: no val_dataset\.jsonl in .*run, .* with --val_data"):
        asked()


def test_a_model_named_from_another_folder_is_found(
    checkpoint: str, smollm2_dir: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "there" / "models").mkdir(parents=True)
    os.symlink(smollm2_dir, tmp_path / "there" / "models" / "m")
    (tmp_path / "there" / "rows.jsonl").write_text("{}\n")
    monkeypatch.chdir(tmp_path / "there")
    given = make_arguments("sft", model="./models/m", dataset=["rows.jsonl#3", "org/set:sub#5", "HF::a/b"])
    seen = given.with_absolute_paths()
    assert seen.model == str(tmp_path / "there" / "models" / "m")
    assert seen.dataset == [f"{tmp_path}/there/rows.jsonl#3", "org/set:sub#5", "HF::a/b"]
    assert (given.model, given.given) == ("./models/m", seen.given)
    # A checkpoint of an earlier version, which has the path as it was typed.
    saved = Path(shutil.copytree(checkpoint, tmp_path / "checkpoint-7")) / "args.json"
    saved.write_text(json.dumps({**json.loads(saved.read_text()), "model": "./models/m"}))
    monkeypatch.chdir(tmp_path)
    assert resolve_model(infer_args(adapters=[str(saved.parent)])).args.model == smollm2_dir


def test_training_writes_paths_that_are_found_from_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from rayswift.train import driver

    (tmp_path / "m").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(driver, "find_model", lambda args: pytest.fail(args.model))
    with pytest.raises(pytest.fail.Exception, match=str(tmp_path / "m")):
        driver.train(make_arguments("sft", model="m", dataset=["rows.jsonl"]))

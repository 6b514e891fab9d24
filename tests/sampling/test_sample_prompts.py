"""From a dataset and earlier answers to the prompts of a run; mistakes in them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from rayswift.arguments import make_arguments, parse_arguments
from rayswift.cli.main import main
from rayswift.errors import UserError
from rayswift.sampling.prompts import Prompt, read_prompts
from rayswift.sampling.scoring import check_references, make_scorers

GSM8K = str(Path(__file__).parent.parent / "data" / "gsm8k_40.jsonl")


def prompts(**settings: Any) -> list[Prompt]:
    return read_prompts(make_arguments("sample", **{"model": "m", "dataset": [GSM8K], **settings}))  # type: ignore[arg-type]


def write(path: Path, rows: list[Any]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_prompts_are_the_rows_without_their_answer_which_is_the_reference() -> None:
    first = prompts()[0]
    assert [message["role"] for message in first.row["messages"]] == ["user"]
    assert (first.reference or "").endswith("#### 72")
    assert first.where == f"{GSM8K}:1"
    assert first.answered("x")["messages"][-1] == {"role": "assistant", "content": "x"}
    assert [message["role"] for message in first.row["messages"]] == ["user"]


@pytest.mark.parametrize("parts", [1, 3, 7, 40])
def test_the_parts_of_a_dataset_have_every_row_once(parts: int) -> None:
    found = [prompt for part in range(parts) for prompt in prompts(data_range=[part, parts])]
    assert [prompt.id for prompt in found] == [prompt.id for prompt in prompts()]


def test_batches_limit_the_prompts_and_the_last_batch_may_be_short() -> None:
    assert len(prompts(num_sampling_batch_size=7, num_sampling_batches=2)) == 14
    assert len(prompts(num_sampling_batch_size=7, num_sampling_batches=9)) == 40
    assert len(prompts(dataset=[f"{GSM8K}#5"])) == 5


def test_equal_rows_have_ids_and_seeds_of_their_own(tmp_path: Path) -> None:
    path = write(tmp_path / "r.jsonl", [{"query": "a", "response": "b"}] * 3 + [{"query": "c"}])
    found = prompts(dataset=[path])
    assert len({prompt.id for prompt in found}) == 4
    assert found[1].id == f"{found[0].id}-2"
    seeds = [prompt.seed(42, number) for prompt in found for number in range(4)]
    assert len(set(seeds)) == 16
    assert all(0 <= seed < 2**31 for seed in seeds)
    assert seeds == [prompt.seed(42, number) for prompt in prompts(dataset=[path]) for number in range(4)]


def test_the_system_prompt_becomes_part_of_the_row(tmp_path: Path) -> None:
    own = {"messages": [{"role": "system", "content": "old"}, {"role": "user", "content": "a"}]}
    path = write(tmp_path / "r.jsonl", [{"query": "a"}, own])
    for prompt in prompts(dataset=[path], system="new"):
        assert prompt.row["messages"][0] == {"role": "system", "content": "new"}
        assert [message["role"] for message in prompt.row["messages"]] == ["system", "user"]


def test_bad_rows_are_counted_and_named_or_stop_the_run(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = write(tmp_path / "r.jsonl", [{"query": "a"}, {"nothing": 1}, {"query": "b"}])
    assert len(prompts(dataset=[path])) == 2
    assert f"1 rows cannot be prompts and are left out, the first: {path}:2" in caplog.text
    with pytest.raises(UserError, match=r"r\.jsonl:2"):
        prompts(dataset=[path], strict=True)


def test_earlier_answers_belong_to_their_rows(tmp_path: Path) -> None:
    one, two = prompts()[:2]
    rows = [
        {**one.answered("x"), "id": one.id},
        {**two.answered("y"), "id": two.id},
        {**one.answered("z"), "id": one.id},
    ]
    cache = write(tmp_path / "c.jsonl", rows)
    assert [prompt.cached for prompt in prompts(cache_files=[cache])[:3]] == [("x", "z"), ("y",), ()]
    found = prompts(sampler_engine="no", cache_files=[cache])
    assert [(prompt.id, prompt.cached) for prompt in found] == [(one.id, ("x", "z")), (two.id, ("y",))]
    alone = prompts(sampler_engine="no", cache_files=[cache], dataset=[])
    assert [prompt.cached for prompt in alone] == [("x", "z"), ("y",)]
    assert alone[0].reference is None
    with pytest.raises(UserError, match="no answer in there belongs to a row of --dataset"):
        prompts(cache_files=[cache], system="another")


@pytest.mark.parametrize("row", [{"messages": []}, {"id": "x", "messages": [{"role": "user", "content": "a"}]}, [1]])
def test_a_cache_that_is_none_names_the_line(tmp_path: Path, row: Any) -> None:
    cache = write(tmp_path / "c.jsonl", [row])
    with pytest.raises(UserError, match=r"c.jsonl:1: .*expected|--cache_files .*c.jsonl:1: expected"):
        prompts(cache_files=[cache])


def test_a_reward_that_compares_needs_an_answer_in_every_row(tmp_path: Path) -> None:
    path = write(tmp_path / "r.jsonl", [{"query": "a", "response": "1"}, {"query": "b"}])
    args = make_arguments("sample", model="m", dataset=[path], orm_model="gsm8k")
    with pytest.raises(UserError, match=r"r.jsonl:2: the row does not end with an answer, which --orm_model"):
        check_references(make_scorers(args), read_prompts(args))  # type: ignore[arg-type]
    other = make_arguments("sample", model="m", dataset=[path], orm_model="format")
    check_references(make_scorers(other), read_prompts(other))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        (
            "--orm_model acuracy",
            "--orm_model acuracy: no reward of that name and no model there; did you mean accuracy?",
        ),
        ("--prm_model zzz", "--prm_model zzz: no reward of that name and no model there; known are client, qwen_max"),
        ("--prm_model client", "--prm_model client needs --judge_base_url"),
        ("--prm_model qwen_max", "--prm_model qwen_max needs a key"),
        ("--output_file out.txt", "--output_file out.txt: expected a file name ending in .jsonl or .parquet"),
        ("--output_file a/b.jsonl", "--output_file a/b.jsonl: expected a file name"),
        ("--data_range 3 3", "--data_range: expected I N with 0 <= I < N"),
        ("--cache_files nowhere.jsonl", "--cache_files nowhere.jsonl: no such file"),
        ("--sampler_engine no", "--sampler_engine no needs --cache_files"),
        ("--sampler_engine client", "--sampler_engine client needs --base_url"),
        ("--base_url http://x/v1", "--base_url needs --sampler_engine client, not transformers"),
        ("--min_replicas 3 --max_replicas 2", "--max_replicas 2 is below --min_replicas 3"),
        ("--num_workers 2 --min_replicas 2", "--num_workers says the same as --min_replicas"),
        ("--num_beams 2", "--num_beams: answers are sampled"),
        ("--num_return_sequences 0", "--num_return_sequences"),
        ("--dataset nowhere.jsonl", "--dataset nowhere.jsonl"),
        ("--model nowhere/", "nowhere"),
    ],
)
def test_a_mistake_is_one_line_and_exit_status_2(
    flags: str, line: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("DASHSCOPE_API_KEY", raising=False)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    base = ["sample", "--model", str(tmp_path), "--dataset", GSM8K, "--output_dir", str(tmp_path / "out")]
    assert main([*base, *flags.split()]) == 2
    errors = [found for found in capsys.readouterr().err.splitlines() if "error:" in found]
    assert any(line in found for found in errors), errors
    assert not (tmp_path / "out").exists()


def test_what_has_no_effect_is_said(caplog: pytest.LogCaptureFixture) -> None:
    words = "--model m --dataset d --prm_threshold 0.5 --easy_query_threshold 0.5 --n_best_to_keep 3 --temperature 0"
    parse_arguments("sample", words.split())
    for flag in ("--prm_threshold", "--easy_query_threshold", "--n_best_to_keep", "--temperature 0"):
        assert any(record.message.startswith(flag) for record in caplog.records), flag
    caplog.clear()
    parse_arguments(
        "sample", ["--model", "m", "--dataset", "d", "--sampler_engine", "vllm", "--vllm_max_num_seqs", "8"]
    )
    assert not caplog.records


def test_replicas_and_engine_settings_reach_the_pool() -> None:
    args = parse_arguments("sample", ["--model", "m", "--dataset", "d", "--sampler_engine", "vllm", "--max_replicas",
                                      "4", "--engine_kwargs", '{"block_size": 16}'])  # fmt: skip
    assert args.num_workers == (1, 4)  # type: ignore[attr-defined]
    assert args.infer_backend == "vllm"  # type: ignore[attr-defined]
    assert args.vllm_engine_kwargs == {"block_size": 16}  # type: ignore[attr-defined]

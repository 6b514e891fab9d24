"""Engines of SWIFT's that RaySwift does not start: vLLM runs in their place, and one line says so."""

from __future__ import annotations

from typing import Any

import pytest

from rayswift.arguments import make_arguments
from rayswift.generate.model_spec import serving_settings

ROWS = {"dataset": ["d"]}


@pytest.mark.parametrize(
    ("command", "settings", "effect", "said"),
    [
        ("infer", {"infer_backend": "lmdeploy"}, {}, ["--infer_backend lmdeploy: vLLM runs in its place"]),
        (
            "deploy",
            {"infer_backend": "lmdeploy", "lmdeploy_tp": 2, "lmdeploy_session_len": 99, "vllm_max_num_seqs": 3},
            {"vllm_tensor_parallel_size": 2, "vllm_max_model_len": 99, "vllm_max_num_seqs": 3},
            ["--infer_backend lmdeploy: vLLM runs in its place; --lmdeploy_tp counts as --vllm_tensor_parallel_size; "
             "--lmdeploy_session_len counts as --vllm_max_model_len"],
        ),
        (
            "app",
            {"infer_backend": "sglang", "sglang_tp_size": 2, "sglang_pp_size": 3, "sglang_dp_size": 4,
             "sglang_context_length": 9, "sglang_mem_fraction_static": 0.5},
            {"vllm_tensor_parallel_size": 2, "vllm_pipeline_parallel_size": 3, "vllm_data_parallel_size": 4,
             "vllm_max_model_len": 9, "vllm_gpu_memory_utilization": 0.5},
            ["--infer_backend sglang: vLLM runs in its place; --sglang_tp_size counts as"],
        ),
        (
            "eval",
            {"infer_backend": "lmdeploy", "eval_dataset": ["ARC_c"], "lmdeploy_tp": 2, "vllm_tensor_parallel_size": 1,
             "lmdeploy_quant_policy": 8},
            {"vllm_tensor_parallel_size": 1},
            ["--lmdeploy_quant_policy: no effect, vLLM has no such setting", "--infer_backend lmdeploy: vLLM runs"],
        ),
        (
            "sample",
            {"sampler_engine": "lmdeploy", "lmdeploy_tp": 2, "engine_kwargs": {"max_num_seqs": 4}, **ROWS},
            {"vllm_tensor_parallel_size": 2, "sampler_engine": "vllm", "vllm_engine_kwargs": {"max_num_seqs": 4}},
            ["--sampler_engine lmdeploy: vLLM runs in its place; --lmdeploy_tp counts as --vllm_tensor_parallel_size"],
        ),
        (
            "deploy",
            {"infer_backend": "vllm", "sglang_tp_size": 2},
            {"vllm_tensor_parallel_size": 1},
            ["--sglang_tp_size: no effect without --infer_backend sglang"],
        ),
    ],
)  # fmt: skip
def test_vllm_runs_in_their_place(
    command: str, settings: dict[str, Any], effect: dict[str, Any], said: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    args: Any = make_arguments(command, model="m", **settings)
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == len(said)
    assert all(line.startswith(start) for line, start in zip(lines, said, strict=True))
    caplog.clear()
    for seen in (args, serving_settings(args)):  # what engines are planned with
        assert seen.infer_backend == "vllm"
        here = {name: value for name, value in effect.items() if hasattr(seen, name)}
        assert {name: getattr(seen, name) for name in here} == here
    assert (args._resolved().infer_backend, caplog.text) == ("vllm", "")


def test_a_stream_does_not_end_by_the_stopping_strategy(caplog: pytest.LogCaptureFixture) -> None:
    mixed = {"model": "m", "dataset": ["a", "b"], "interleave_prob": [0.5, 0.5], "stopping_strategy": "all_exhausted"}
    make_arguments("sft", **mixed)
    assert not caplog.text
    make_arguments("sft", **mixed, streaming=True, max_steps=3)
    assert "--stopping_strategy: no effect with --streaming true" in caplog.text

"""Which settings decide a run's answers and scores: a run begun by another version goes on only if the set is the same.

The names are those of version 0.1.0 before they stood at the flags; a new flag that decides answers joins them
where it is given (`_LATER` of ``arguments/base.py``), or it would end the resuming of runs that were begun without it.
"""

from __future__ import annotations

import pytest

from rayswift.arguments import deciding_settings, make_arguments

SHARED = (
    "adapters add_non_thinking_prefix agent_template attn_impl enable_thinking external_plugins infer_backend "
    "load_args load_data_args logprobs loss_scale max_length max_new_tokens merge_lora model model_kwargs "
    "model_revision model_type new_special_tokens num_beams padding_side repetition_penalty response_prefix seed "
    "stop_words system task_type temperature template template_backend top_k top_logprobs top_p "
    "torch_dtype truncation_strategy trust_remote_code use_chat_template use_hf "
)
DATASET = (
    "base_url cached_dataset columns custom_dataset_info data_seed dataset dataset_shuffle download_mode interleave_by "
    "interleave_prob model_author model_name remove_unused_columns shuffle_buffer_size split_dataset_ratio "
    "stopping_strategy streaming val_dataset val_dataset_shuffle "
)
ANSWERS = {
    "infer": SHARED + DATASET + "val_dataset_sample",
    "sample": SHARED + DATASET + "cache_files data_range engine_kwargs num_return_sequences num_sampling_batch_size "
    "num_sampling_batches sampler_engine sampler_type",
    "eval": SHARED + "eval_backend eval_base eval_dataset eval_dataset_args eval_generation_config eval_limit eval_url "
    "extra_eval_args local_dataset models served_model_name",
}  # fmt: skip
SETTINGS = {
    "infer": {"model": "m", "val_dataset": ["d"]},
    "sample": {"model": "m", "dataset": ["d"]},
    "eval": {"model": "m", "eval_dataset": ["arc"]},
}


@pytest.mark.parametrize("command", list(ANSWERS))
def test_the_flags_that_decide_answers(command: str) -> None:
    args = make_arguments(command, **SETTINGS[command])
    deciding = deciding_settings(args)
    assert sorted(deciding) == sorted(ANSWERS[command].split())
    assert deciding == {name: getattr(args, name) for name in deciding}


def test_a_later_flag_decides_where_it_is_given() -> None:
    dated = deciding_settings(make_arguments("infer", **SETTINGS["infer"], template_date="2026-01-02"))
    assert dated.pop("template_date") is not None
    assert dated == deciding_settings(make_arguments("infer", **SETTINGS["infer"]))


def test_the_flags_that_decide_scores() -> None:
    scores = deciding_settings(make_arguments("sample", **SETTINGS["sample"]), "scores")
    assert sorted(scores) == ["judge_base_url", "judge_max_tokens", "judge_model", "orm_model", "prm_model"]
    assert deciding_settings(make_arguments("infer", **SETTINGS["infer"]), "scores") == {}

"""The engine on the real small model: batches, streams, stopping, sampling, log probabilities, bad prompts."""

from __future__ import annotations

import math
import warnings
from contextlib import closing
from dataclasses import replace

import pytest
import torch

from rayswift.errors import UserError
from rayswift.generate.transformers import TransformersEngine
from rayswift.generate.types import SamplingParams

GREEDY = SamplingParams(max_new_tokens=12, temperature=0)
FRANCE = [{"role": "user", "content": "What is the capital of France?"}]
COUNT = [{"role": "user", "content": "Count from one to ten in words."}]


def test_greedy_answer_of_a_batch_stops_at_the_template_end(engine: TransformersEngine) -> None:
    first, second = engine.generate([FRANCE, COUNT], GREEDY)
    assert first.text == "The capital of France is Paris."
    assert first.num_generated_tokens == 8  # the end mark counts
    assert first.num_prompt_tokens == len(engine.encoder.encode_prompt(FRANCE))
    assert second.num_generated_tokens == 12
    assert second.text
    assert (first.error, first.logprobs) == (None, None)


def test_stream_gives_the_same_text_in_pieces(engine: TransformersEngine) -> None:
    pieces = list(engine.stream(FRANCE, GREEDY))
    assert "".join(pieces) == "The capital of France is Paris."
    assert len(pieces) > 4
    assert engine.last_stream.num_generated_tokens == 8


def test_a_closed_stream_stops_the_model(engine: TransformersEngine) -> None:
    params = replace(GREEDY, max_new_tokens=4000)
    with closing(engine.stream(COUNT, params)) as pieces:
        next(pieces)
    assert engine.last_stream.num_generated_tokens < 10  # closing waits for the model, which did not go on


@pytest.mark.parametrize("word", ["France", "of Fran"])
def test_stop_words_end_the_answer_before_them(engine: TransformersEngine, word: str) -> None:
    params = replace(GREEDY, stop_words=(word,))
    expected = "The capital of France is Paris.".partition(word)[0]
    assert engine.generate([FRANCE], params)[0].text == expected
    assert "".join(engine.stream(FRANCE, params)) == expected


def test_sampling_repeats_with_the_seed_and_differs_without(engine: TransformersEngine) -> None:
    params = SamplingParams(max_new_tokens=12, temperature=1.5)
    torch.manual_seed(1)
    first = engine.generate([COUNT], params)[0].text
    torch.manual_seed(1)
    assert engine.generate([COUNT], params)[0].text == first
    assert engine.generate([COUNT], params)[0].text != first


def test_a_tiny_top_k_makes_sampling_greedy(engine: TransformersEngine) -> None:
    params = replace(GREEDY, temperature=2.0, top_k=1)
    assert engine.generate([FRANCE], params)[0].text == "The capital of France is Paris."


def test_generation_config_of_the_model_holds_unless_a_flag_says_otherwise(engine: TransformersEngine) -> None:
    own = engine.model.generation_config
    before = (own.do_sample, own.temperature, own.top_k, own.top_p)
    try:
        own.do_sample, own.temperature, own.top_k, own.top_p = True, 0.7, 20, 0.8
        config = engine.generation_config(SamplingParams(), 10)
        assert (config.do_sample, config.temperature, config.top_k, config.top_p) == (True, 0.7, 20, 0.8)
        assert config.max_new_tokens == engine.context_length - 10
        config = engine.generation_config(SamplingParams(temperature=0.1, top_k=-1), 10)
        assert (config.do_sample, config.temperature, config.top_k, config.top_p) == (True, 0.1, 0, 0.8)
        assert engine.generation_config(GREEDY, 10).do_sample is False
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert engine.generate([FRANCE], GREEDY)[0].text == "The capital of France is Paris."
    finally:
        own.do_sample, own.temperature, own.top_k, own.top_p = before


def test_logprobs_are_those_of_the_tokens_in_the_answer(engine: TransformersEngine) -> None:
    params = replace(GREEDY, logprobs=True, top_logprobs=2)
    answer = engine.generate([COUNT, FRANCE], params)[1]
    assert answer.logprobs is not None
    content = answer.logprobs["content"]
    assert "".join(item["token"] for item in content) == answer.text
    prompt = engine.encoder.encode_prompt(FRANCE)
    reply = [item["token"] for item in content]
    ids = prompt + [engine.encoder.tokenizer.encode(token)[0] for token in reply]
    with torch.no_grad():
        logits = engine.model(torch.tensor([ids])).logits[0].float().log_softmax(-1)
    for offset, item in enumerate(content):
        expected = logits[len(prompt) + offset - 1, ids[len(prompt) + offset]].item()
        assert math.isclose(item["logprob"], expected, abs_tol=0.1)  # bf16, another batch shape
        assert item["top_logprobs"][0]["token"] == item["token"]  # greedy
        assert len(item["top_logprobs"]) == 2


def test_beam_search_answers_and_streams_in_one_piece(engine: TransformersEngine) -> None:
    params = replace(GREEDY, num_beams=2)
    assert list(engine.stream(FRANCE, params)) == ["The capital of France is Paris."]
    with pytest.raises(UserError, match="--num_beams"):
        replace(params, logprobs=True)


def test_a_prompt_that_does_not_fit_is_an_error_of_its_own_row(engine: TransformersEngine) -> None:
    small = replace(engine, context_length=60)
    long = [{"role": "user", "content": "word " * 100}]
    unusable = [{"role": "user", "content": "q"}, {"role": "system", "content": "late"}]
    answers = small.generate([long, FRANCE, unusable], GREEDY)
    assert [answer.error is None for answer in answers] == [False, True, False]
    assert "the context holds 60" in (answers[0].error or "")
    assert answers[1].text == "The capital of France is Paris."
    with pytest.raises(UserError, match="the context holds 60"):
        list(small.stream(long, GREEDY))


def test_a_failing_batch_is_split_until_the_guilty_row_is_alone(engine: TransformersEngine) -> None:
    def refuse_long_batches(module: torch.nn.Module, args: tuple, kwargs: dict) -> None:
        ids = kwargs["input_ids"]
        if ids.shape[1] > 100:
            raise RuntimeError("out of memory")

    long = [{"role": "user", "content": "word " * 200}]
    hook = engine.model.register_forward_pre_hook(refuse_long_batches, with_kwargs=True)
    try:
        answers = engine.generate([FRANCE, long, FRANCE], GREEDY)
    finally:
        hook.remove()
    assert [answer.text for answer in answers] == [
        "The capital of France is Paris.",
        "",
        "The capital of France is Paris.",
    ]
    assert answers[1].error == "out of memory"
    assert answers[1].num_prompt_tokens > 200


def test_a_failure_of_the_model_reaches_the_reader_of_the_stream(engine: TransformersEngine) -> None:
    def fail(module: torch.nn.Module, args: tuple, kwargs: dict) -> None:
        raise RuntimeError("broken")

    hook = engine.model.register_forward_pre_hook(fail, with_kwargs=True)
    try:
        with pytest.raises(RuntimeError, match="broken"):
            list(engine.stream(FRANCE, GREEDY))
    finally:
        hook.remove()

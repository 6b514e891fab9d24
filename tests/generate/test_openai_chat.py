"""Tool calls through an endpoint: rows go out in OpenAI's form, and calls come back as a row's text."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from fake_endpoint import fake_endpoint

from rayswift.arguments import make_arguments
from rayswift.data.tokens.encoder import Encoder
from rayswift.errors import UserError
from rayswift.generate.endpoint import EndpointEngine
from rayswift.generate.openai_chat import sent_messages, sent_tools
from rayswift.generate.types import SamplingParams
from rayswift.inference.command import infer
from rayswift.sampling import sample
from rayswift.sampling.judge import Judge

FUNCTION = {"name": "weather", "description": "Weather", "parameters": {"type": "object", "properties": {}}}
CALL = {"id": "x", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Rom\\u00e9"}'}}
TEXT = '<tool_call>\n{"name": "weather", "arguments": {"city": "Romé"}}\n</tool_call>'
OPENAI = [{"type": "function", "function": FUNCTION}]
ASKED = [{"role": "user", "content": "Weather?"}]


@pytest.mark.parametrize(
    "tools", [OPENAI, [FUNCTION], json.dumps([FUNCTION]), [json.dumps(FUNCTION)], [{"function": FUNCTION}]]
)
def test_tools_of_every_spelling_go_out_as_openai_writes_them(tools: Any) -> None:
    assert sent_tools(tools) == OPENAI


def test_calls_and_results_of_tools_go_out_as_openai_writes_them() -> None:
    call = {"name": "weather", "arguments": {"city": "Rome"}}
    messages = [
        {"role": "system", "content": "s", "loss": False},
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": "Let me see.", "reasoning_content": "Hm.", "loss": True, "loss_scale": 2.0},
        {"role": "tool_call", "content": json.dumps(call), "loss": True},
        {"role": "tool_call", "content": json.dumps({"name": "time", "arguments": '{"zone": 1}'})},
        {"role": "tool_response", "content": "sunny"},
        {"role": "tool", "content": "noon"},
        {"role": "tool_call", "content": "{'name': 'weather', 'arguments': {}}"},
        {"role": "tool", "content": "rain"},
    ]
    assert sent_messages(messages) == [
        {"role": "system", "content": "s"},
        {"role": "user", "content": "q"},
        {
            "role": "assistant", "content": "Let me see.", "reasoning_content": "Hm.",
            "tool_calls": [
                {"id": "call_3", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Rome"}'}},
                {"id": "call_4", "type": "function", "function": {"name": "time", "arguments": '{"zone": 1}'}},
            ],
        },
        {"role": "tool", "tool_call_id": "call_3", "content": "sunny"},
        {"role": "tool", "tool_call_id": "call_4", "content": "noon"},
        {
            "role": "assistant", "content": "",
            "tool_calls": [{"id": "call_7", "type": "function", "function": {"name": "weather", "arguments": "{}"}}],
        },
        {"role": "tool", "tool_call_id": "call_7", "content": "rain"},
    ]  # fmt: skip
    with pytest.raises(UserError, match="tool_call is not"):
        sent_messages([{"role": "tool_call", "content": "[1]"}])


def said_in_pieces() -> list[dict[str, Any]]:
    """A call as servers stream it, after a word."""
    first = {"index": 0, "id": "x", "type": "function", "function": {"name": "weather", "arguments": ""}}
    rest = [{"index": 0, "function": {"arguments": piece}} for piece in ('{"city": ', '"Romé"}')]
    return [
        {"content": "I look."},
        *({"tool_calls": [part]} for part in (first, *rest)),
        {"finish_reason": "tool_calls"},
    ]


@pytest.mark.parametrize(
    ("said", "text", "error"),
    [
        ([{"content": "I look."}, {"tool_calls": [CALL], "finish_reason": "tool_calls"}], f"I look.\n{TEXT}", None),
        ([{"tool_calls": [CALL, CALL]}], f"{TEXT}\n{TEXT}", None),
        ([{"function_call": CALL["function"]}], TEXT, None),
        ([{"content": [{"type": "text", "text": "Sun"}]}], "Sun", None),
        ([{"tool_calls": [{**CALL, "function": {"name": "f", "arguments": "{broken"}}]}], "", "call of f are no JSON"),
        ([{"content": ""}], "", r"the answer is empty \(finish_reason stop\)"),
        ([{"content": " \n"}], "", "the answer is empty"),
        ([{"reasoning": "Hm", "finish_reason": "length"}], "", "while it was thinking; raise --max_new_tokens"),
        ([{"refusal": "I cannot."}], "", "the model refuses: I cannot."),
    ],
)
def test_an_answer_is_its_text_with_its_calls_and_an_empty_one_is_an_error(
    said: list[dict[str, Any]], text: str, error: str | None
) -> None:
    with fake_endpoint(lambda body: said_in_pieces() if body.get("stream") else said) as (base_url, _):
        engine = EndpointEngine.connect(base_url)
        answer = engine.answer(ASKED, SamplingParams())
        assert answer.text == text
        if error is None:
            assert "".join(engine.stream(ASKED, SamplingParams())) == engine.last_stream.text == f"I look.\n{TEXT}"
            return
        import re

        assert re.search(error, answer.error or "")
        for with_thoughts in (True, False):
            (one,) = EndpointEngine(engine.client, "m", with_thoughts=with_thoughts).choices(ASKED, SamplingParams())
            assert re.search(error, one.error or "")
        with pytest.raises(UserError, match=error):
            engine.complete(ASKED, SamplingParams())


def test_a_stream_without_text_and_calls_is_an_error() -> None:
    with fake_endpoint(lambda body: [{"reasoning": "Hm"}, {"finish_reason": "length"}]) as (base_url, _):
        engine = EndpointEngine.connect(base_url)
        with pytest.raises(UserError, match="while it was thinking"):
            list(engine.stream(ASKED, SamplingParams()))
        assert engine.last_stream.error


@pytest.mark.parametrize(
    ("agent", "written"),
    [
        (None, TEXT),
        ("react_en", 'Action: weather\nAction Input: {"city": "Romé"}\nObservation:'),
    ],
)
def test_infer_and_sample_keep_calls_and_write_no_empty_row(
    agent: str | None, written: str, tmp_path: Path, smollm2_dir: str
) -> None:
    rows = [{"messages": [{"role": "user", "content": f"{n}?"}], "tools": json.dumps([FUNCTION])} for n in range(2)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def say(body: dict[str, Any]) -> list[dict[str, Any]]:
        return (
            [{"content": ""}] if body["messages"][-1]["content"] == "1?" else [{"content": None, "tool_calls": [CALL]}]
        )

    with fake_endpoint(say) as (base_url, asked):
        more = {"agent_template": agent} if agent else {}
        found = infer(make_arguments("infer", base_url=base_url, val_dataset=[str(tmp_path / "rows.jsonl")],
                                     result_path=str(tmp_path / "out.jsonl"), **more))  # fmt: skip
        assert found is not None
        assert found[0]["response"].strip() == found[0]["messages"][-1]["content"].strip() == written.strip()
        assert (found[1]["response"], "empty" in found[1]["error"]) == ("", True)
        result = sample(make_arguments(
            "sample", sampler_engine="client", base_url=base_url, dataset=[str(tmp_path / "rows.jsonl")],
            num_return_sequences=2, output_dir=str(tmp_path), output_file="s.jsonl", **more,
        ))  # fmt: skip
        assert all(body["tools"] == OPENAI for body in asked)
    sampled = [json.loads(line) for line in (tmp_path / "s.jsonl").read_text().splitlines()]
    assert [row["messages"][-1]["content"].strip() for row in sampled] == [written.strip()] * 2
    assert (result["answers"], result["rows"]) == (2, 2)
    # Trained, the text is what a row with the call itself trains.
    template = {"agent_template": agent} if agent else {"template": "qwen"}
    encoder = Encoder(smollm2_dir, **template)
    called = [*rows[0]["messages"], {"role": "tool_call", "content": json.dumps(
        {"name": "weather", "arguments": {"city": "Romé"}}, ensure_ascii=False)}]  # fmt: skip
    own, other = encoder.encode_batch([{"messages": called}, {"messages": sampled[0]["messages"]}])
    assert encoder.tokenizer.decode(own.input_ids) == encoder.tokenizer.decode(other.input_ids)


def test_a_judge_that_says_nothing_gives_no_reward() -> None:
    messages = [*ASKED, {"role": "assistant", "content": "Sun."}]
    said: list[dict[str, Any]] = [{"content": "Reward: 0.5"}]
    with fake_endpoint(lambda body: said) as (base_url, _):
        engine = EndpointEngine.connect(base_url)
        judge = Judge(base_url, None, None, 1)
        assert judge.judge(engine, messages, None) == 0.5
        said[:] = [{"reasoning_content": "Reward: 0.5", "finish_reason": "length"}]
        assert judge.judge(engine, messages, None) is None
        said[:] = [{"content": "Good."}]
        assert judge.judge(engine, messages, None) == 0.0

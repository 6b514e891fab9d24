"""Families by name, held against the chat templates that the models' makers publish."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import chat_templates
import pytest
from template_gate import SCENARIOS, TOOLS, flat, save_tokenizer, turns_of

from rayswift.data.tokens.encoder import Encoded, Encoder
from rayswift.data.tokens.template_choice import load_template

TRL = Path(find_spec("trl").submodule_search_locations[0]) / "chat_templates"  # type: ignore[union-attr,index]
#: Family, the model's own chat template (of TRL, or written out), and the model's bos token.
OWN = [
    ("qwen2_5", "qwen2_5", "<s>"),
    ("qwen3", "qwen3", "<s>"),
    ("qwen3_nothinking", "qwen3_instruct_2507", "<s>"),
    ("llama3", "llama3", "<|begin_of_text|>"),
    ("llama3_2", "llama3_1", "<|begin_of_text|>"),
    ("llama3_2", "llama3_2", "<|begin_of_text|>"),
    ("gemma", "gemma", "<bos>"),
    ("deepseek_r1", "deepseek_r1_distill", "<s>"),
    ("glm4", chat_templates.GLM4, "<s>"),
    ("chatglm4", chat_templates.CHATGLM4, "<s>"),
    ("deepseek_v3_1", chat_templates.DEEPSEEK_V3_1, "<s>"),
    ("deepseek", chat_templates.DEEPSEEK_V2, "<s>"),
    ("deepseek_v2_5", chat_templates.DEEPSEEK_V2_5, "<s>"),
    ("llama", chat_templates.LLAMA2_SYSTEM, "<s>"),
    ("phi4", chat_templates.PHI4, "<s>"),
    ("mistral_2501", chat_templates.MISTRAL_2501, "<s>"),
    ("qwen3_coder", chat_templates.QWEN3_CODER, "<s>"),
]
IDS = [f"{family}-{number}" for number, (family, _, _) in enumerate(OWN)]
#: Where the family stands for more than one of the model's names, or the chat template for less than the model takes.
AUTO = {"qwen3_nothinking": "chatml", "gemma": "jinja", "deepseek_v2_5": "deepseek_v2_5"}
#: What a chat template leaves out of earlier turns, or has no place for.
NO_PLACE = {
    ("deepseek_r1", "thoughts sometimes"), ("llama3_2", "text and call"), ("llama3_2", "thoughts and call"),
}  # fmt: skip


def model(template: str, bos: str, directory: Path) -> str:
    source = template if "{" in template else (TRL / f"{template}.jinja").read_text(encoding="utf-8")
    folder = save_tokenizer(source, directory)
    settings = directory / "tokenizer_config.json"
    settings.write_text(json.dumps({**json.loads(settings.read_text(encoding="utf-8")), "bos_token": bos}))
    return folder


def seen(encoder: Encoder, row: dict[str, Any]) -> Any:
    """Ids and labels of what a row's last turn is trained as; None where it is refused."""
    last = encoder.encode_batch([row])[-1]
    return (last.input_ids.tolist(), last.labels.tolist()) if isinstance(last, Encoded) else None


def asked(encoder: Encoder, messages: Any, tools: Any) -> Any:
    try:
        return encoder.encode_prompt(messages, tools)
    except Exception:  # the template has no place for them
        return None


@pytest.mark.parametrize(("family", "template", "bos"), OWN, ids=IDS)
def test_a_named_family_is_what_the_models_own_chat_template_writes(
    family: str, template: str, bos: str, tmp_path: Path
) -> None:
    folder = model(template, bos, tmp_path)
    assert Encoder(folder).template_name == AUTO.get(family, family)
    named, own = (Encoder(folder, loss_scale="last_round", **settings) for settings in
                  ({"template": family}, {"template_backend": "jinja"}))  # fmt: skip
    assert load_template(named).tools_template is None
    compared = 0
    for name, (messages, with_tools) in SCENARIOS.items():
        tools = TOOLS if with_tools else None
        row = {"messages": messages, **({"tools": tools} if tools else {})}
        expected = seen(own, row)
        if expected is None or (family, name) in NO_PLACE:
            continue
        compared += 1
        assert seen(named, row) == expected, name
        turns = turns_of(messages)
        for end in [i for i, turn in enumerate(turns) if turn[0]["role"] in ("assistant", "tool_call")]:
            prompt = asked(own, flat(turns[:end]), tools)
            assert prompt is None or asked(named, flat(turns[:end]), tools) == prompt, (name, end)
    assert compared >= 3


def glm_messages(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Messages as GLM-4's chat templates take calls and results."""
    written = []
    for message in messages:
        if message["role"] == "tool_call":
            call = json.loads(message["content"])
            arguments = json.dumps(call["arguments"])
            written.append({"role": "assistant", "metadata": call["name"], "content": arguments})
        else:
            written.append(
                {**message, "role": "observation" if message["role"] == "tool_response" else message["role"]}
            )
    return written


@pytest.mark.parametrize("family", ["glm4", "chatglm4"])
def test_glm4_writes_tools_calls_and_results_as_its_chat_templates_do(family: str, tmp_path: Path) -> None:
    folder = model({"glm4": chat_templates.GLM4, "chatglm4": chat_templates.CHATGLM4}[family], "<s>", tmp_path)
    encoder = Encoder(folder, template=family)
    asked = SCENARIOS["text and call"][0]
    for messages in (asked, [{"role": "system", "content": "Be brief now."}, *asked]):
        (sample,) = encoder.encode_batch([{"messages": messages, "tools": TOOLS}])
        assert isinstance(sample, Encoded)
        given: dict[str, Any] = {"tools": TOOLS}
        own = glm_messages(messages)
        if family == "chatglm4":  # its chat template finds the tools in a system message
            given, system = {}, own.pop(0) if own[0]["role"] == "system" else {"role": "system", "content": ""}
            own = [{**system, "tools": TOOLS}, *own]
        text = encoder.tokenizer.apply_chat_template(own, tokenize=False, **given)
        assert encoder.tokenizer.decode(sample.input_ids) == f"{text}<|user|>"


@pytest.mark.parametrize(
    ("family", "said", "between"),
    [
        ("qwen3", "Let me look.", "\n"),
        ("qwen3", "<think>\nA thought\n</think>", "\n\n"),
        ("qwen3_thinking", "<think>\nA thought\n</think>\n\n", ""),
        ("qwen3", "<think>\nA thought\n</think>\n\nLet me look.", "\n"),
        ("qwen2_5", "<think>\nA thought\n</think>\n\n", "\n"),  # to it, this is text
        ("qwen3_coder", "Let me look.\n", "\n"),
        ("glm4", "Let me look.", "<|assistant|>"),
        ("deepseek_v3_1", "Let me look.", ""),
    ],
)
def test_what_stands_between_words_and_calls(family: str, said: str, between: str, every_family: str) -> None:
    call = SCENARIOS["call"][0][1]
    messages = [{"role": "user", "content": "q"}, {"role": "assistant", "content": said}, call]
    (sample,) = Encoder(every_family, template=family).encode_batch([{"messages": messages}])
    assert isinstance(sample, Encoded)
    begins = {"glm4": "get_weather", "deepseek_v3_1": "<｜tool▁calls▁begin｜>"}.get(family, "<tool_call>")
    assert said + between + begins in Encoder(every_family).tokenizer.decode(sample.input_ids)


def test_a_model_with_other_tools_is_no_family(tmp_path: Path) -> None:
    """Layout alone does not make a family: with tools DeepSeek-V4 is unlike V3.1, as this one is unlike ChatML."""
    plain = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    prompt = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    assert Encoder(save_tokenizer(plain + prompt, tmp_path / "plain")).template_name == "chatml"
    calls = (
        "{% if tools %}<|im_start|>tools\n{{ tools | tojson }}<|im_end|>\n{% endif %}{% for m in messages %}"
        "<|im_start|>{{ m.role }}\n{{ m.content }}"
        "{% for c in m.tool_calls or [] %}<|call|>{{ c.function | tojson }}{% endfor %}"
        "<|im_end|>\n{% endfor %}"
    )
    assert Encoder(save_tokenizer(calls + prompt, tmp_path / "calls")).template_name == "jinja"

"""Ollama's prompts are those of serving: the Modelfile's template by Go's rules, over whole conversations."""

from __future__ import annotations

from typing import Any

import pytest
from go_template import GoError, go_json, ollama_render, render
from ollama_conversations import CLOCK, MODES, ROUNDS, TOOL_CONVERSATIONS, WEATHER, WITH_TOOLS, Message, says

from rayswift.data.chat import agents
from rayswift.data.chat.families import load_templates
from rayswift.data.tokens.encoder import Encoder
from rayswift.exporting.ollama_template import ollama_template
from rayswift.serve.replica.trained_template import chat_prompt_ids


def openai(message: Message) -> Message:
    """An Ollama message as a chat request has it."""
    calls = [{"type": "function", "function": call} for call in message.get("tool_calls", ())]
    found = {"role": message["role"], "content": message["content"]}
    return (
        found
        | ({"tool_calls": calls} if calls else {})
        | ({"reasoning": message["thinking"]} if "thinking" in message else {})
    )


def served(encoder: Encoder, messages: list[Message], tools: Any = None, **thinking: Any) -> str:
    """The prompt of the deployment for the same conversation."""
    request = {"messages": [openai(message) for message in messages], "tools": tools, **thinking}
    ids = chat_prompt_ids(encoder, request)
    assert ids is not None
    return encoder.tokenizer.decode(ids, skip_special_tokens=False)


@pytest.mark.parametrize("family", sorted(load_templates()))
def test_several_rounds_are_laid_out_as_by_the_deployment(family: str, byte_level_model: str) -> None:
    encoder = Encoder(byte_level_model, template=family)
    default, template = ollama_template(encoder)
    for ollama, request in MODES:
        for count in (1, 3, 5):
            for system in (None, "Be kind."):
                rounds = [*([] if system is None else [says("system", system)]), *ROUNDS[:count]]
                own = [says("system", default), *rounds] if default and system is None else rounds
                if system and not load_templates()[family].system_prefix:
                    continue
                assert ollama_render(template, own, **ollama) == served(encoder, rounds, **request)


def go_like(value: Any, indent: Any = None) -> str:
    """JSON as Ollama writes it; of a call the outer spaces are the Modelfile's own."""
    if isinstance(value, dict) and list(value) == ["name", "arguments"]:
        return f'{{"name": "{value["name"]}", "arguments": {go_json(value["arguments"])}}}'
    return go_json(value)


@pytest.mark.parametrize("conversation", TOOL_CONVERSATIONS)
@pytest.mark.parametrize("family", WITH_TOOLS)
def test_tools_calls_and_results_are_laid_out_as_by_the_deployment(
    family: str, conversation: str, byte_level_model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(agents, "_json", go_like)
    encoder, messages = Encoder(byte_level_model, template=family), TOOL_CONVERSATIONS[conversation]
    if not encoder.thinks:  # Ollama gives no thoughts to a template that has no place for them
        messages = [{key: value for key, value in message.items() if key != "thinking"} for message in messages]
    default, template = ollama_template(encoder)
    for ollama, request in MODES:
        for system in (None, "Be kind."):
            asked = [*([] if system is None else [says("system", system)]), *messages]
            own = [says("system", default), *asked] if default and system is None else asked
            tools = [WEATHER, CLOCK]
            assert ollama_render(template, own, tools, **ollama) == served(encoder, asked, tools, **request)


def test_a_chat_template_of_the_models_own_is_laid_out_too(byte_level_model: str) -> None:
    encoder = Encoder(byte_level_model, template_backend="jinja")
    default, template = ollama_template(encoder)
    assert default == ""
    for rounds in (ROUNDS[:1], ROUNDS[:3], [says("system", "Be kind."), *ROUNDS]):
        assert ollama_render(template, rounds) == served(encoder, rounds)


# The renderer itself, as Go's documentation has it -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("template", "text"),
    [
        ("a {{- 3 -}} b", "a3b"),
        ("a {{ .S }} b", "a x b"),
        ('{{ "{{" }}', "{{"),
        ("{{ if .S }}yes{{ else }}no{{ end }}{{ if .None }}yes{{ else if eq .S \"x\" }}x{{ end }}", "yesx"),
        ("{{ range $i, $m := .L }}{{ if $i }},{{ end }}{{ $m.A }}{{ .A }}{{ $.S }}{{ else }}none{{ end }}", "11x,22x"),
        ("{{ range .None }}x{{ else }}none{{ end }}", "none"),
        ("{{ $n := 0 }}{{ range .L }}{{ $n = .A }}{{ end }}{{ $n }}", "2"),
        ("{{ $n := 0 }}{{ range .L }}{{ $n := .A }}{{ end }}{{ $n }}", "0"),
        ("{{ if and .S (not .None) (gt (len .L) 1) }}{{ len (slice .L 1) }}{{ end }}", "1"),
        ("{{ (index .L 1).A }}{{ or .None .S }}{{ json .L }}", '2x[{"A":1},{"A":2}]'),
        ("{{ true }}{{ ne .S \"y\" }}", "truetrue"),
        (".5 {{/* a comment */}}", None),
        ("{{ .Missing }}", None),
        ("{{ if .S }}", None),
        ("{{ $x }}", None),
        ("{{ nofunction .S }}", None),
    ],
)  # fmt: skip
def test_the_renderer_follows_gos_rules(template: str, text: str | None) -> None:
    data = {"S": "x", "None": [], "L": [{"A": 1}, {"A": 2}]}
    if text is None:
        with pytest.raises(GoError):
            render(template, data)
    else:
        assert render(template, data) == text

"""Conversations as Ollama has them, and what asks for thoughts there and at a deployment."""

from __future__ import annotations

from typing import Any

from rayswift.data.chat.families import load_templates

WEATHER = {
    "type": "function",
    "function": {
        "name": "weather", "description": "Weather of a city",
        "parameters": {"type": "object", "required": ["city"], "properties": {"city": {"type": "string"}}},
    },
}  # fmt: skip
CLOCK = {
    "type": "function",
    "function": {
        "name": "clock", "description": "The time",
        "parameters": {"type": "object", "properties": {"zone": {"type": "string", "description": "such as UTC"}}},
    },
}  # fmt: skip
Message = dict[str, Any]


def says(role: str, content: str, **more: Any) -> Message:
    return {"role": role, "content": content, **more}


ROUNDS = [says("user", "Hi there"), says("assistant", "Hello!\n"), says("user", " And  now? {{ .System }}"),
          says("assistant", "Bye."), says("user", "Once more")]  # fmt: skip
CALL, TIME = {"name": "weather", "arguments": {"city": "北京"}}, {"name": "clock", "arguments": {"zone": "UTC"}}
LOOP = [
    says("user", "How is it?"),
    says("assistant", "", tool_calls=[CALL]),
    says("tool", "sunny"),
    says("assistant", "Wait.", tool_calls=[CALL, TIME]),
    says("tool", "rain"),
    says("tool", "noon"),
]
TOOL_CONVERSATIONS = {
    "asked": LOOP[:1],
    "one result": LOOP[:3],
    "two loops": LOOP,
    "ended": [*LOOP, says("assistant", "Rain at noon."), says("user", "Thanks")],
    "later": [*ROUNDS[:2], *LOOP],
    "thought": [LOOP[0], {**LOOP[1], "thinking": "I ask."}, LOOP[2], {**LOOP[3], "thinking": "Again."}, *LOOP[4:]],
    "thought before": [*LOOP[:3], says("assistant", "Sunny.", thinking="So."), says("user", "Thanks")],
}
WITH_TOOLS = [name for name in load_templates() if load_templates()[name].agent in
              ("hermes", "llama3", "glm4", "chatglm4", "deepseek_v3_1")]  # fmt: skip

MODES: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({}, {}),
    ({"Think": True, "IsThinkSet": True}, {"chat_template_kwargs": {"enable_thinking": True}}),
    ({"Think": False, "IsThinkSet": True}, {"chat_template_kwargs": {"enable_thinking": False}}),
]

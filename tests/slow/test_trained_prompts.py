"""What was trained is what is served: real deployments of both engines are asked for the token ids of their prompts.

One command serves a random model with each engine. Each family of templates is an adapter (its ``args.json`` names the
template), so that one engine answers for all of them; the system text is a flag of the server.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from serving import Deployment, deployed
from tiny_models import llama

from rayswift.arguments import make_arguments
from rayswift.data.chat.families import load_templates
from rayswift.data.rows.messages import read_messages
from rayswift.data.tokens.encoder import Encoder

pytestmark = pytest.mark.slow

ENGINES = ("vllm", "transformers")
#: Adapter → its template settings. `dummy` has no place for the server's system text.
SETTINGS: dict[str, dict[str, Any]] = {
    **{name: {"template": name} for name in load_templates() if name != "dummy"},
    "react": {"template": "llama3", "agent_template": "react_en"},
    "plain": {"use_chat_template": False},
}
SYSTEM = "Run. <|im_end|>"
U, A, S = "user", "assistant", "system"
WEATHER: dict[str, Any] = {
    "type": "function",
    "function": {
        "strict": True,
        "name": "weather",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
        "description": "Weather of a city",
    },
}
CALL = {"id": "call_1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "北京"}'}}
TYPED = [{"role": U, "content": "a <|im_end|> b </s> <|eot_id|> [INST] <|im_start|>system <tool_call>"}]
LOOP: list[dict[str, Any]] = [
    {"role": U, "content": "How is it in Beijing?"},
    {"role": A, "content": None, "tool_calls": [CALL]},
    {"role": "tool", "tool_call_id": "call_1", "content": "sunny"},
]
LATE = [
    {"role": "developer", "content": "One."},
    {"role": U, "content": [{"type": "text", "text": "What is 2+2?"}, {"type": "text", "text": "Answer"}]},
    {"role": S, "content": "Two."},
    {"role": U, "content": "now"},
]
#: Name → what is asked, and what the encoder is asked for it: messages, tools, settings.
CASES: dict[str, tuple[dict[str, Any], tuple[list[dict[str, Any]], Any, dict[str, Any]]]] = {
    "typed special tokens": ({"messages": TYPED}, (TYPED, None, {})),
    "instructions anywhere": (
        {"messages": LATE},
        ([{"role": S, "content": "One.\nTwo."}, {"role": U, "content": "What is 2+2?\nAnswer\nnow"}], None, {}),
    ),
    "instructions alone": ({"messages": LATE[:1]}, ([{"role": S, "content": "One."}], None, {})),
    "tools": ({"messages": TYPED, "tools": [WEATHER]}, (TYPED, [WEATHER], {})),
    "a tool's answer": ({"messages": LOOP, "tools": [WEATHER]}, (LOOP, [WEATHER], {})),
    "without thinking": (
        {"messages": TYPED, "chat_template_kwargs": {"enable_thinking": False, "date_string": "today"}},
        (TYPED, None, {"enable_thinking": False}),
    ),
    "with thinking": ({"messages": TYPED, "reasoning_effort": "high"}, (TYPED, None, {"enable_thinking": True})),
    "continued": (
        {
            "messages": [*TYPED, {"role": A, "content": "The ans"}],
            "continue_final_message": True,
            "add_generation_prompt": False,
        },
        ([*TYPED, {"role": A, "content": "The ans"}], None, {}),
    ),
}


@pytest.fixture(scope="module")
def model(every_family: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model with the tokenizer of every family, and an adapter for each."""
    from peft import LoraConfig, get_peft_model

    folder = tmp_path_factory.mktemp("served") / "tiny"
    size = len(Encoder(every_family).tokenizer)
    base = llama(
        vocab_size=size + -size % 64, max_position_embeddings=2048, hidden_size=128, intermediate_size=128,
        bos_token_id=None, eos_token_id=None, pad_token_id=None,
    )  # fmt: skip
    base.save_pretrained(folder)
    for file in Path(every_family).iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    adapter = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", r=8, target_modules=["q_proj"]))
    for name, settings in SETTINGS.items():
        adapter.save_pretrained(folder.parent / "adapters" / name)
        saved = make_arguments("sft", model=str(folder), dataset=["x.jsonl"], **settings)
        saved.save(folder.parent / "adapters" / name / "args.json")
    return folder


@pytest.fixture(scope="module")
def server(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    models = {name: {"model": str(model), "infer_backend": name, "use_gpu": False} for name in ENGINES}
    flags = ["--models", json.dumps(models), "--adapter_root", str(model.parent / "adapters")]
    flags += ["--system", SYSTEM, "--max_adapters", str(len(SETTINGS))]
    with deployed(str(model), tmp_path_factory.mktemp("log"), *flags) as running:
        yield running


@pytest.mark.parametrize("engine", ENGINES)
def test_prompts_have_the_ids_of_the_encoder(server: Deployment, model: Path, engine: str) -> None:
    def ask(path: str, body: dict[str, Any]) -> dict[str, Any]:
        status, text = server.request("POST", path, body)
        assert status == 200, (status, text, body)
        events = [line for line in text.decode().split("\n") if line.startswith("data: {")]
        return dict(json.loads(events[-1].removeprefix("data: ") if body.get("stream") else text))

    def wrong(name: str) -> list[str]:
        """What an adapter gets wrong."""
        found = []
        encoder = Encoder(str(model), system=SYSTEM, **SETTINGS[name])
        for number, (case, (asked, (messages, tools, settings))) in enumerate(CASES.items()):
            if tools and not encoder.takes_tools:
                continue
            own = Encoder(encoder.model_dir, system=SYSTEM, **SETTINGS[name], **settings)
            expected = own.encode_prompt(read_messages(messages).messages, tools)
            body = {"model": f"{engine}:{name}", **asked}
            counts = [ask("/tokenize", body)["tokens"] == expected]
            if engine == "vllm" or not tools:  # the other reads no tool calls, and refuses to be asked for them
                streamed = {"stream": True, "stream_options": {"include_usage": True}} if number % 2 else {}
                answer = ask("/v1/chat/completions", {**body, **streamed, "max_tokens": 1})
                counts.append(answer["usage"]["prompt_tokens"] == len(expected))
            if not all(counts):
                found.append(f"{name}, {case}: {counts}")
        return found

    with ThreadPoolExecutor(4) as pool:
        assert [line for lines in pool.map(wrong, SETTINGS) for line in lines] == []


def test_what_has_no_trained_layout_is_named_once_in_the_log(server: Deployment) -> None:
    body = {"model": "vllm", "messages": TYPED, "chat_template_kwargs": {"documents": [{"text": "d"}]}}
    for _ in range(2):
        status, text = server.request("POST", "/tokenize", body)
        assert status == 400 and b"chat template" in text, text  # this model has none of its own
    lines = [line for _, text in server.texts_of_logs() for line in text.split("\n") if "no trained layout" in line]
    assert len(lines) == 1 and "documents" in lines[0], lines

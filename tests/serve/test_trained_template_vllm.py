"""vLLM takes the prompts of training, whatever its server adds to a request: its own code and defaults, no engine."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route, Router

from rayswift.data.chat.families import load_templates
from rayswift.data.rows.messages import read_messages
from rayswift.data.tokens.encoder import Encoder
from rayswift.serve.replica import conversion, messages, responses, trained_template

U, A, S = "user", "assistant", "system"
#: Fields in an order that vLLM's classes do not keep, and one that they do not know.
WEATHER: dict[str, Any] = {
    "function": {
        "strict": True,
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
        "name": "weather",
        "description": "Weather of a city",
    },
    "type": "function",
}
ASK = [{"role": U, "content": "q"}]
LOOP: list[dict[str, Any]] = [
    {"role": U, "content": "How is it in Beijing? <|im_end|>"},
    {
        "role": A,
        "content": None,
        "tool_calls": [
            {"id": "call_1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "北京"}'}}
        ],
    },
    {"role": "tool", "tool_call_id": "call_1", "content": [{"type": "text", "text": "sunny"}]},
]


PATHS = ("/v1/chat/completions", "/tokenize", "/v1/responses", "/v1/messages")


class Server:
    """vLLM's reading of requests between its server's defaults and the engine; a route for chats, one for token ids."""

    def __init__(self, encoders: dict[str, Encoder]) -> None:
        from vllm.entrypoints.launchers.cli_args import make_arg_parser, resolve_default_chat_template_kwargs
        from vllm.renderers.online_renderer import OnlineRenderer
        from vllm.utils.argparse_utils import FlexibleArgumentParser

        flags = ["--enable-auto-tool-choice", "--tool-call-parser", "hermes", "--reasoning-parser", "qwen3"]
        args = make_arg_parser(FlexibleArgumentParser()).parse_args(flags)
        self.defaults = resolve_default_chat_template_kwargs(args)
        self.own: list[tuple[list[Any], Any]] = []  # what vLLM would have rendered with its own chat template
        self.requests: list[Any] = []
        config = SimpleNamespace(
            model="none", max_model_len=4096, multimodal_config=None, enable_prompt_embeds=False,
            hf_config=SimpleNamespace(model_type="llama"), try_get_generation_config=dict,
        )  # fmt: skip
        renderer = SimpleNamespace(
            tokenizer=encoders[""].tokenizer, get_tokenizer=lambda: encoders[""].tokenizer, get_eos_token_id=lambda: 0,
            render_messages_async=self._own_rendering, render_chat_async=self._render_chat,
        )  # fmt: skip
        self.online = OnlineRenderer(
            config, renderer, request_logger=None, chat_template=None,
            chat_template_content_format=args.chat_template_content_format, enable_auto_tools=True,
            tool_parser=args.tool_call_parser, reasoning_parser=args.structured_outputs_config.reasoning_parser,
            default_chat_template_kwargs=self.defaults,
        )  # fmt: skip
        trained_template.use_trained_templates(self.online, lambda name: encoders.get(name or ""))
        routes = [Route(path, self._answer, methods=["POST"]) for path in PATHS]
        self.app = trained_template.keeping_tools(Router(routes))

    async def _own_rendering(self, messages: list[Any], params: Any) -> tuple[Any, Any]:
        self.own.append((messages, params))
        return messages, {"prompt_token_ids": []}

    async def _render_chat(self, conversations: list[Any], params: Any, *_: Any, **__: Any) -> tuple[Any, ...]:
        rendered = [await self.online.renderer.render_messages_async(one, params) for one in conversations]
        return tuple(zip(*rendered, strict=True))

    async def _answer(self, http: Request) -> Response:
        from vllm.entrypoints.anthropic.protocol import AnthropicMessagesRequest
        from vllm.entrypoints.anthropic.serving import AnthropicServingMessages
        from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
        from vllm.entrypoints.openai.responses.protocol import ResponsesRequest
        from vllm.entrypoints.serve.tokenize.protocol import TokenizeChatRequest

        if http.url.path == "/tokenize":
            tokens = TokenizeChatRequest.model_validate(await http.json())
            _, (prompt,) = await self.online.preprocess_chat(
                tokens, tokens.messages, default_template=None, default_template_content_format="auto",
                default_template_kwargs=self.defaults, tool_dicts=[tool.model_dump() for tool in tokens.tools or ()],
            )  # fmt: skip
        elif http.url.path == "/v1/responses":
            result = await self.online.render_responses(ResponsesRequest.model_validate(await http.json()))
            prompt = result.engine_input
        elif http.url.path == "/v1/messages":
            asked = AnthropicMessagesRequest.model_validate({"max_tokens": 4, **await http.json()})
            request = AnthropicServingMessages.to_chat_completion_request(asked, merge_inline_system=True)
            _, (prompt,) = await self.online.render_chat(request)
        else:
            request = ChatCompletionRequest.model_validate(await http.json())
            self.requests.append(request)
            conversation, (prompt,) = await self.online.render_chat(request)
            assert isinstance(conversation[-1]["content"], str | list | None)
        return JSONResponse(prompt["prompt_token_ids"])

    async def post(self, path: str, body: dict[str, Any]) -> list[int]:
        """The prompt of a request."""
        transport = httpx.ASGITransport(self.app)
        async with httpx.AsyncClient(transport=transport, base_url="http://vllm") as client:
            response = await client.post(path, content=json.dumps(body))
            assert response.status_code == 200, response.text
            return list(response.json())

    def ids(self, **body: Any) -> list[int]:
        """The prompt of a chat request; that of `/tokenize` is the same."""
        chat, tokens = (asyncio.run(self.post(path, body)) for path in PATHS[:2])
        assert chat == tokens
        return chat


@pytest.fixture(scope="module")
def vllm_server(every_family: str) -> Callable[..., Server]:
    """Makes a server whose own model has these settings; the families are served under their names."""
    families = {name: Encoder(every_family, template=name) for name in load_templates()}
    server = Server({"": families["chatml"], **families})  # imports vLLM
    assert "cohere_format" in server.defaults, "vLLM adds something else by itself now"

    def make(**settings: Any) -> Server:
        return Server({"": Encoder(every_family, **settings), **families}) if settings else server

    return make


@pytest.mark.parametrize("family", ["chatml", "qwen3", "llama3", "deepseek_v3_1", "glm4", "chatglm4", "qwen3_coder"])
def test_a_request_to_vllm_has_the_ids_of_training(family: str, vllm_server: Callable[..., Server]) -> None:
    server, encoder = vllm_server(), Encoder(vllm_server().online.renderer.tokenizer.name_or_path, template=family)
    loop = read_messages([*LOOP[:-1], {**LOOP[-1], "content": "sunny"}]).messages
    assert server.ids(model=family, messages=ASK) == encoder.encode_prompt(ASK)
    asked = {"model": family, "messages": LOOP, "tools": [WEATHER]}
    assert server.ids(**asked) == encoder.encode_prompt(loop, [WEATHER]) != encoder.encode_prompt(loop)
    assert server.ids(**asked, tool_choice="none") == encoder.encode_prompt(loop)
    told = {"chat_template_kwargs": {"enable_thinking": False, "date_string": "today"}}
    quiet = Encoder(encoder.model_dir, template=family, enable_thinking=False)
    assert server.ids(model=family, messages=ASK, **told) == quiet.encode_prompt(ASK)
    assert server.ids(model=family, messages=ASK, reasoning_effort="none") == quiet.encode_prompt(ASK)
    assert not server.own, "vLLM's own chat template was asked"


#: The same conversation as Responses and as Messages write it.
ITEMS: list[dict[str, Any]] = [
    {"role": U, "content": LOOP[0]["content"]},
    {"type": "function_call", "call_id": "call_1", "name": "weather", "arguments": '{"city": "北京"}'},
    {"type": "function_call_output", "call_id": "call_1", "output": "sunny"},
]
BLOCKS: list[dict[str, Any]] = [
    {"role": U, "content": [{"type": "text", "text": LOOP[0]["content"]}]},
    {"role": A, "content": [{"type": "tool_use", "id": "call_1", "name": "weather", "input": {"city": "北京"}}]},
    {"role": U, "content": [{"type": "tool_result", "tool_use_id": "call_1", "content": "sunny"}]},
]


@pytest.mark.parametrize("family", ["chatml", "qwen3", "llama3", "glm4"])
@pytest.mark.parametrize("interface", ["responses", "messages"])
def test_the_other_interfaces_have_the_ids_of_training_with_both_engines(
    interface: str, family: str, vllm_server: Callable[..., Server]
) -> None:
    server, encoder = vllm_server(), Encoder(vllm_server().online.renderer.tokenizer.name_or_path, template=family)
    fields = WEATHER["function"]
    if interface == "responses":
        tool = {**fields, "type": "function"}
        body: dict[str, Any] = {"input": ITEMS, "instructions": "Be brief.", "tools": [tool], "tool_choice": "auto"}
        chat = conversion.chat_request(responses.ResponsesRequest(**body))
    else:
        tool = {("input_schema" if name == "parameters" else name): value for name, value in fields.items()}
        body = {"messages": BLOCKS, "system": "Be brief.", "tools": [tool]}
        chat = conversion.chat_request(messages.MessagesRequest(max_tokens=4, **body))
    system = {"role": S, "content": "Be brief."}
    told = read_messages([system, *LOOP[:-1], {**LOOP[-1], "content": "sunny"}]).messages
    expected = encoder.encode_prompt(told, [{"type": "function", "function": fields}])
    assert asyncio.run(server.post(f"/v1/{interface}", {"model": family, **body})) == expected
    asked = {name: value for name, value in chat if value is not None}
    assert trained_template.chat_prompt_ids(encoder, asked) == expected
    assert not server.own, "vLLM's own chat template was asked"


def test_the_flags_of_the_server_hold(vllm_server: Callable[..., Server], every_family: str) -> None:
    settings: dict[str, Any] = {"template": "qwen3", "system": "Run.", "agent_template": "react_en"}
    server = vllm_server(**settings, enable_thinking=False)
    encoder = Encoder(every_family, **settings, enable_thinking=False)
    assert server.ids(messages=ASK, tools=[WEATHER], stop="X") == encoder.encode_prompt(ASK, [WEATHER])
    request = server.requests[-1]
    assert request.stop == ["X", "Observation:"]
    assert request.stop_token_ids == encoder.eos_token_ids
    # vLLM's parsers of thoughts look there.
    assert server.online.effective_chat_template_kwargs(request)["enable_thinking"] is False
    assert server.ids(messages=ASK, reasoning_effort="high") == Encoder(every_family, **settings).encode_prompt(ASK)
    assert server.online.effective_chat_template_kwargs(server.requests[-1])["enable_thinking"] is True


def test_what_only_the_engine_can_render_keeps_the_system_text_and_is_said_once(
    vllm_server: Callable[..., Server], caplog: pytest.LogCaptureFixture
) -> None:
    trained_template._say_engine_renders.cache_clear()
    server, documents = vllm_server(template="chatml", system="Run.", enable_thinking=False), [{"text": "d"}]
    with caplog.at_level(logging.WARNING, "rayswift"):
        for _ in range(2):
            server.ids(messages=ASK, chat_template_kwargs={"documents": documents})
    assert [record.getMessage().partition(":")[0] for record in caplog.records] == ["documents"]
    messages, params = server.own[-1]
    assert messages == [{"role": S, "content": "Run."}, *ASK]
    assert params.chat_template_kwargs["enable_thinking"] is False
    server.ids(messages=[{"role": S, "content": "Mine."}, *ASK], chat_template_kwargs={"documents": documents})
    assert [message["content"] for message in server.own[-1][0]] == ["Mine.", "q"]


@pytest.mark.slow  # starts what an engine is configured with
def test_vllm_still_checks_lengths_and_renders_for_others(smollm2_dir: str) -> None:
    from transformers import AutoTokenizer
    from vllm.engine.arg_utils import EngineArgs
    from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
    from vllm.exceptions import VLLMValidationError
    from vllm.renderers.online_renderer import OnlineRenderer
    from vllm.renderers.registry import renderer_from_config

    config = EngineArgs(model=smollm2_dir, max_model_len=256, enforce_eager=True).create_engine_config()
    online = OnlineRenderer(
        config.model_config, renderer_from_config(config), request_logger=None, chat_template=None,
        chat_template_content_format="auto", default_chat_template_kwargs={"cohere_format": "cmd4"},
    )  # fmt: skip
    encoder = Encoder(smollm2_dir)
    trained_template.use_trained_templates(online, {"base": encoder}.get)

    def rendered(**fields: Any) -> Any:
        request = ChatCompletionRequest.model_validate({"messages": ASK, **fields})
        conversation, (prompt,) = asyncio.run(online.render_chat(request))
        assert conversation[-1]["content"] == request.messages[-1]["content"]
        return prompt["prompt_token_ids"]

    special = [{"role": U, "content": "a <|im_end|> b"}]
    assert rendered(model="base", messages=special) == encoder.encode_prompt(special)
    assert rendered(model="base", messages=special).count(2) == 2  # the system turn and the user's
    long = [{"role": U, "content": "word " * 400}]
    with pytest.raises(VLLMValidationError, match="256"):
        rendered(model="base", messages=long)
    cut = rendered(model="base", messages=long, truncate_prompt_tokens=20, truncation_side="left")
    assert cut == encoder.encode_prompt(long)[-20:]
    with pytest.raises(ValueError, match="no content"):
        rendered(model="base", messages=[*long, {"role": A}])
    tokenizer = AutoTokenizer.from_pretrained(smollm2_dir)
    own = tokenizer.apply_chat_template(special, add_generation_prompt=True)["input_ids"]
    assert rendered(model="nobody", messages=special) == own

"""vLLM in a replica: `ray.serve.llm`'s server starts the engine; its OpenAI app gets the trained template and resuming.

Imported in replicas only: it loads vLLM.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import AsyncIterator
from functools import partial
from typing import Any, cast

from ray.serve.llm import LLMConfig
from ray.serve.llm.deployment import LLMServer
from vllm.lora.request import LoRARequest
from vllm.outputs import CompletionOutput, RequestOutput
from vllm.platforms import current_platform
from vllm.sampling_params import SamplingParams
from vllm.v1.engine.exceptions import EngineDeadError

from rayswift import private
from rayswift.data.tokens.encoder import Encoder
from rayswift.errors import one_line
from rayswift.generate.logprobs import token_bytes, token_names
from rayswift.serve.lease import TokenNotes, current_notes
from rayswift.serve.replica.trained_template import keeping_tools, use_trained_templates

logger = logging.getLogger("rayswift.serve.replica.vllm")

#: Seconds that requests of clients who have left need to be out of the engine, which would load the adapter again.
UNLOAD_SECONDS = 1.0
#: Seconds between looks at the engine.
WATCH_SECONDS = 0.25


class VllmServing:
    """One vLLM engine and its OpenAI app. ``encoders``: served name or adapter name → how its prompts are laid out."""

    def __init__(self, llm_config: dict[str, Any], encoders: dict[str, Encoder]) -> None:
        private.without_vllm_report()
        self._server: Any = LLMServer.sync_init(LLMConfig(**llm_config))
        self.encoders = encoders
        self.app: Any = None
        self._number = 0

    async def start(self) -> None:
        """Start the engine and build its app."""
        await self._server.start()
        client = private.engine_client(self._server)
        client.generate = resuming(client.generate, client)
        private.name_adapters(self._server, served_name)
        self.app, online_renderer = await private.openai_app(self._server)
        if online_renderer is not None:
            private.correct_token_bytes(self.app, partial(token_bytes, client.renderer.tokenizer))
            private.name_completion_tokens(self.app, partial(token_names, client.renderer.tokenizer))
            use_trained_templates(online_renderer, lambda name: self.encoders.get(name or ""))
            self.app = keeping_tools(self.app)
        elif self.encoders[""].task_type != "causal_lm":
            from rayswift.serve.replica.vllm_pooling import VllmReader

            name = next(name for name, one in self.encoders.items() if name and one is self.encoders[""])
            adapters = partial(private.adapters_by_name, self._server)
            self.app = VllmReader(client, self.encoders, name, adapters).app
        self._watch = asyncio.ensure_future(self._end_with_engine(client))

    @property
    def context_length(self) -> int:
        """Tokens that a prompt and its answer may have together."""
        return int(private.engine_client(self._server).model_config.max_model_len)

    def metrics(self) -> str:
        """vLLM's metrics as Prometheus text."""
        from prometheus_client import generate_latest

        return generate_latest().decode()

    async def check_health(self) -> None:
        """Raises when the engine is dead."""
        await self._server.check_health()

    async def _end_with_engine(self, client: Any) -> None:
        """A replica whose engine died ends at once: its connections break and the gateway asks another one.

        Serve would notice at its next health check, seconds later, and until then every request would fail.
        """
        while not client.errored:
            await asyncio.sleep(WATCH_SECONDS)
        logger.error("the engine died; this replica ends")
        os._exit(1)

    async def load_adapter(self, name: str, folder: str) -> LoRARequest:
        """As `adapter_book.Engine`.

        Each load has a name of its own: vLLM takes adapters of one name for the same in a batch and in the prefix
        cache, and one that is called like a kind of content (``text``) for a default of the base model's requests.
        """
        self._number += 1
        adapter = LoRARequest(f"{name}#{self._number}", self._number, folder)
        try:
            if not await private.engine_client(self._server).add_lora(adapter):
                raise ValueError("it was not loaded")
        except EngineDeadError:
            raise
        except Exception as error:
            raise ValueError(one_line(error)) from error
        return adapter

    def answer_as(self, name: str, handle: LoRARequest | None) -> None:
        """As `adapter_book.Engine`."""
        adapters = private.adapters_by_name(self._server)
        if handle is None:
            adapters.pop(name, None)
        else:
            adapters[name] = handle

    async def unload_adapter(self, handle: LoRARequest) -> None:
        """As `adapter_book.Engine`."""
        await asyncio.sleep(UNLOAD_SECONDS)
        await private.engine_client(self._server).remove_lora(handle.lora_int_id)


def served_name(adapter: LoRARequest) -> str:
    """The name of an adapter for clients."""
    return adapter.lora_name.rpartition("#")[0]


def resuming(generate: Any, client: Any) -> Any:
    """vLLM's ``generate`` that notes token ids and goes on after ids of another replica.

    Callers see one whole answer: the first output of a resumed request holds the earlier tokens.
    """

    def generating(prompt: Any, sampling_params: Any, request_id: str, **options: Any) -> AsyncIterator[RequestOutput]:
        notes = current_notes.get()
        if not isinstance(sampling_params, SamplingParams):
            return cast("AsyncIterator[RequestOutput]", generate(prompt, sampling_params, request_id, **options))
        if sampling_params.prompt_logprobs is not None and client.vllm_config.lora_config and current_platform.is_cpu():
            # vLLM's LoRA for CPUs ends the whole engine on them when requests share a batch (punica_cpu, 0.32).
            raise ValueError("log probabilities of the prompt (echo, prompt_logprobs) need a server without adapters")
        if notes is not None and notes.resume:
            return _after(notes, generate, client, prompt, sampling_params, request_id, options)
        outputs = generate(prompt, sampling_params, request_id, **options)
        return outputs if notes is None else _noting(notes, outputs)

    return generating


async def _noting(notes: TokenNotes, outputs: AsyncIterator[RequestOutput]) -> AsyncIterator[RequestOutput]:
    async for output in outputs:
        if output.outputs:
            notes.add(list(output.outputs[0].token_ids))
        yield output


async def _after(
    notes: TokenNotes,
    generate: Any,
    client: Any,
    prompt: Any,
    params: SamplingParams,
    request_id: str,
    options: dict[str, Any],
) -> AsyncIterator[RequestOutput]:
    """Outputs of a request whose first tokens came from another replica."""
    earlier, own_prompt = notes.resume, list(prompt["prompt_token_ids"])
    text = client.renderer.tokenizer.decode(earlier, skip_special_tokens=params.skip_special_tokens)
    room = None if params.max_tokens is None else params.max_tokens - len(earlier)
    done = room is not None and room <= 0
    first = CompletionOutput(0, text, list(earlier), None, None, finish_reason="length" if done else None)
    notes.add(list(earlier))
    yield RequestOutput(request_id, None, own_prompt, None, [first], finished=done, num_cached_tokens=0)
    if done:
        return
    params.max_tokens = room
    params.min_tokens = max(0, params.min_tokens - len(earlier))
    longer = {**prompt, "prompt_token_ids": own_prompt + list(earlier)}
    longer.pop("prompt", None)
    async for output in generate(longer, params, request_id, **options):
        output.prompt_token_ids = own_prompt
        notes.add(list(output.outputs[0].token_ids))
        yield output

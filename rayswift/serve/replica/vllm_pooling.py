"""A trained model of vectors, classes or scores in vLLM, behind the same app as with Transformers: vLLM's own app would
read texts without the layout that they had in training. Imported in replicas only: it loads vLLM."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Callable
from typing import Any

from vllm.pooling_params import PoolingParams

from rayswift.data.tokens.encoder import Encoder
from rayswift.serve.replica.pooling import TextReader, make_app


class VllmReader(TextReader):
    """Texts to an engine as token ids.

    Args:
        client: vLLM's ``AsyncLLM``.
        encoders: served name or adapter name → how its texts are laid out.
        served_model_name: what clients call the model itself.
        adapters: gives the adapters that are loaded, by name.
    """

    def __init__(
        self,
        client: Any,
        encoders: dict[str, Encoder],
        served_model_name: str,
        adapters: Callable[[], dict[str, Any]],
    ) -> None:
        config, encoder = client.model_config.hf_config, encoders[""]
        super().__init__(encoder, served_model_name, encoder.task_type, config.to_dict())
        self._client, self._encoders, self._adapters = client, encoders, adapters
        self.app = make_app(self)

    @property
    def context_length(self) -> int:
        """As :class:`TextReader`."""
        return int(self._client.model_config.max_model_len)

    def names(self) -> list[str]:
        """The model and its adapters."""
        return [self.name, *self._adapters()]

    def encoder_of(self, name: str | None) -> Encoder:
        """As trained with the adapter that answers."""
        return self._encoders.get(name or self.name, self.encoder)

    async def values(self, rows: list[dict[str, list[int]]], name: str | None) -> list[Any]:
        """As :class:`TextReader`."""
        adapter = self._adapters().get(name or self.name)
        params = PoolingParams(task="embed" if self.makes_vectors else "classify")
        return list(await asyncio.gather(*(self._value(row["input_ids"], params, adapter) for row in rows)))

    async def _value(self, ids: list[int], params: PoolingParams, adapter: Any) -> Any:
        last = None
        async for output in self._client.encode(
            {"prompt_token_ids": [int(one) for one in ids]}, params, f"pool-{uuid.uuid4().hex}", lora_request=adapter
        ):
            last = output
        assert last is not None
        return last.outputs.data.float().cpu()

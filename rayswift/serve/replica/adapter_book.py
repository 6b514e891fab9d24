"""The adapters of a replica and their states; nobody else has the engine load, switch or unload one.

::

    absent ──► loading ──► ready ──► serving ──► leaving ──► absent
                  │          └───────────────────────▲
                  └──► absent (refused)

- *absent → loading*: a request asks for a key (`AdapterBook.using`), or a gateway has it prepared (`prepare`). While
  ``limit`` names are loaded it waits for one that nobody uses; of those the longest unused leaves. A newer version of a
  name needs no room of its own.
- *loading → ready*: the engine has the weights, and no name leads to them. The load goes on when its asker leaves.
- *ready → serving*: the first request with this key, unless a newer version serves already. In one step the engine
  answers with it under its name, prompts are laid out as it was trained, and what served the name before is leaving.
- *→ leaving*: a newer version serves; a client unloads it (`forget`); it was the longest unused. No request begins with
  it any more, but those that have come (its *users*) are answered; a leaving one without a successor keeps its name so
  long.
- *leaving → absent*: its last user has gone, and the engine unloads it.

A request with an older key than the one that serves is answered by the newer one: its gateway asked before a client
replaced the adapter. Which key a name stands for is kept by one place for all gateways (`gateway.shared.GatewayState`);
the cache of Serve's multiplexing only remembers which replica to ask first.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from enum import Enum, auto
from typing import TYPE_CHECKING, Any, Protocol

from rayswift.serve.replica.adapters import AdapterKey, AdapterRefused

if TYPE_CHECKING:
    from rayswift.data.tokens.encoder import Encoder

logger = logging.getLogger("rayswift.serve.replica.adapter_book")


class State(Enum):
    """Where an adapter stands."""

    ABSENT = auto()
    LOADING = auto()
    READY = auto()
    SERVING = auto()
    LEAVING = auto()


class Engine(Protocol):
    """An engine's side: it does as it is told, and knows its adapters by handles of its own."""

    async def load_adapter(self, name: str, folder: str) -> Any:
        """Load the weights in ``folder`` beside all others; their handle. Raises ValueError with the reason."""

    def answer_as(self, name: str, handle: Any) -> None:
        """Answer requests that come from now on for the model ``name`` with an adapter; None: with none any more."""

    async def unload_adapter(self, handle: Any) -> None:
        """Give the weights up."""


@dataclass(eq=False)
class _Adapter:
    key: AdapterKey
    state: State = State.ABSENT
    users: int = 0
    handle: Any = None
    encoder: Encoder | None = None
    loading: asyncio.Future[None] | None = None


class AdapterBook:
    """The adapters of one engine.

    Args:
        engine: what loads and answers.
        fetch: from a key to the adapter's folder and encoder. Raises AdapterRefused.
        encoders: name → how prompts are laid out; those of adapters are kept here.
        limit: names that are loaded at once.
    """

    def __init__(
        self,
        engine: Engine,
        fetch: Callable[[AdapterKey], Awaitable[tuple[str, Encoder]]],
        encoders: dict[str, Encoder],
        limit: int,
    ) -> None:
        self._engine, self._fetch, self._encoders, self._limit = engine, fetch, encoders, limit
        self._adapters: dict[AdapterKey, _Adapter] = {}  # all but leaving ones, the longest unused first
        self._answering: dict[str, _Adapter] = {}  # name → what the engine answers with: serving, or leaving
        self._changed = asyncio.Event()
        self._unloading: set[asyncio.Future[None]] = set()

    async def prepare(self, key: AdapterKey) -> None:
        """Load an adapter without letting it answer. Raises AdapterRefused."""
        self._release(await self._hold(key))

    @asynccontextmanager
    async def using(self, key: AdapterKey) -> AsyncIterator[None]:
        """While this lasts the engine answers under the key's name with its adapter or a newer one.

        Raises AdapterRefused.
        """
        adapter = self._newest(key)
        if adapter is not None:
            self._touch(adapter)
        else:
            held = await self._hold(key)
            adapter = self._newest(key)
            if adapter is None:
                adapter = held
                self._let_answer(adapter)
            else:  # came meanwhile
                self._touch(adapter)
                self._release(held)
        try:
            yield
        finally:
            self._release(adapter)

    def forget(self, name: str, version: int) -> bool:
        """Unload the adapters of a name up to this version; whether there were any."""
        found = [one for one in self._adapters.values() if one.key.name == name and one.key.version <= version]
        for adapter in found:
            self._leave(adapter)
        return bool(found)

    # --- moves --------------------------------------------------------------------------------------------------

    def _newest(self, key: AdapterKey) -> _Adapter | None:
        """What answers requests with this key; None when its own adapter has to be loaded."""
        now = self._answering.get(key.name)
        if now is None or now.key.version < key.version:
            return None
        return now if now.key.version > key.version or now.state is State.SERVING else None

    def _touch(self, adapter: _Adapter) -> None:
        adapter.users += 1
        if self._adapters.get(adapter.key) is adapter:  # the latest used comes last
            self._adapters[adapter.key] = self._adapters.pop(adapter.key)

    async def _hold(self, key: AdapterKey) -> _Adapter:
        """The adapter of a key, loaded, with one user more."""
        adapter = self._adapters.get(key)
        if adapter is None:
            adapter = self._adapters[key] = _Adapter(key, users=1)  # its own load is a user too
            adapter.loading = asyncio.ensure_future(self._load(adapter))
            adapter.loading.add_done_callback(lambda done: done.cancelled() or done.exception())
        self._touch(adapter)
        try:
            assert adapter.loading is not None
            await asyncio.shield(adapter.loading)
        except BaseException:
            self._release(adapter)
            raise
        return adapter

    async def _load(self, adapter: _Adapter) -> None:
        name = adapter.key.name
        try:
            while not self._has_room(adapter):
                self._changed.clear()
                await self._changed.wait()
            if adapter.state is State.ABSENT:
                adapter.state = State.LOADING
            folder, adapter.encoder = await self._fetch(adapter.key)
            try:
                adapter.handle = await self._engine.load_adapter(name, folder)
            except ValueError as error:
                raise AdapterRefused(422, f"adapter {name}: the engine refuses it ({error})") from None
            if adapter.state is State.LOADING:
                adapter.state = State.READY
            older = [one for one in self._adapters.values() if one.key.name == name and one.state is State.READY]
            for one in older:
                if one.key.version < adapter.key.version and not one.users:
                    self._leave(one)  # was prepared, and its gateway never said that it counts
        finally:
            if adapter.handle is None:
                adapter.state = State.ABSENT
                if self._adapters.get(adapter.key) is adapter:
                    del self._adapters[adapter.key]
            self._release(adapter)

    def _has_room(self, adapter: _Adapter) -> bool:
        """Whether another may be loaded; makes room where it can."""
        held = [one for one in self._adapters.values() if one.state is not State.ABSENT]
        names = {one.key.name for one in held}
        if adapter.key.name in names or len(names) < self._limit:
            return True
        used = {one.key.name for one in held if one.users}
        unused = next((one.key.name for one in held if one.key.name not in used), None)
        for one in held:
            if one.key.name == unused:
                self._leave(one)
        return unused is not None

    def _let_answer(self, adapter: _Adapter) -> None:
        name, before = adapter.key.name, self._answering.get(adapter.key.name)
        assert adapter.encoder is not None
        self._answering[name], self._encoders[name] = adapter, adapter.encoder
        self._engine.answer_as(name, adapter.handle)
        if adapter.state is State.READY:  # unloaded while it was loading: it answers who had asked
            adapter.state = State.SERVING
        if before is not None and before is not adapter:
            self._leave(before)

    def _leave(self, adapter: _Adapter) -> None:
        if self._adapters.get(adapter.key) is adapter:
            del self._adapters[adapter.key]
        adapter.state = State.LEAVING
        self._end_if_unused(adapter)

    def _release(self, adapter: _Adapter) -> None:
        adapter.users -= 1
        self._end_if_unused(adapter)

    def _end_if_unused(self, adapter: _Adapter) -> None:
        if adapter.users:
            return
        self._changed.set()
        if adapter.state is not State.LEAVING:
            return
        name, adapter.state = adapter.key.name, State.ABSENT
        if self._answering.get(name) is adapter:
            del self._answering[name]
            self._encoders.pop(name, None)
            self._engine.answer_as(name, None)
        if adapter.handle is not None:
            unloading = asyncio.ensure_future(self._unload(adapter))
            self._unloading.add(unloading)
            unloading.add_done_callback(self._unloading.discard)

    async def _unload(self, adapter: _Adapter) -> None:
        try:
            await self._engine.unload_adapter(adapter.handle)
        except Exception:
            logger.exception("adapter %s could not be unloaded", adapter.key.name)

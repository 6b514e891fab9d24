"""Adapters at run time: every order of load, unload, replace, evict and chat, at two gateways and two replicas.

The gateways, what they share and the books of the replicas are the real ones; so are both engines' adapter code, down
to vLLM's registry of models and to PEFT's modules. The weights of an adapter are one number, which is its answer.
"""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
import json
from collections.abc import Awaitable, Callable, Iterable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, note, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from rayswift import private
from rayswift.generate.continuous_batching import BASE
from rayswift.serve.gateway.adapters import AdapterRegistry
from rayswift.serve.gateway.app import Gateway, ServedModel
from rayswift.serve.gateway.shared import Counters, GatewayState, SharedState
from rayswift.serve.openai_errors import ApiError
from rayswift.serve.replica import transformers as transformers_replica
from rayswift.serve.replica.adapter_book import AdapterBook, State
from rayswift.serve.replica.adapters import AdapterKey, AdapterRefused
from rayswift.serve.replica.transformers import TransformersServing

MODELS, LIMIT = ("m", "other"), 2
FOLDERS = ("one", "two", "broken")
BASE_ANSWER = 0.0


def write(folder: Path, answer: float) -> None:
    """An adapter of the model below; a negative answer does not fit it."""
    folder.mkdir(exist_ok=True)
    config = {"peft_type": "LORA", "r": 1, "lora_alpha": 1, "target_modules": ["q"]}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    width = 2 if answer >= 0 else 3
    save_file(
        {
            "base_model.model.q.lora_A.weight": np.eye(1, width, dtype=np.float32),
            "base_model.model.q.lora_B.weight": np.full((1, 1), answer, np.float32),
        },
        folder / "adapter_model.safetensors",
    )


def answer_in(folder: Path) -> float:
    return float(load_file(folder / "adapter_model.safetensors")["base_model.model.q.lora_B.weight"][0, 0])


# --- both engines -----------------------------------------------------------------------------------------------


class Peft:
    """The Transformers engine's side: a model of one layer, real PEFT, the runner's own thread."""

    def __init__(self) -> None:
        class Model(torch.nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.q = torch.nn.Linear(2, 1, bias=False)
                torch.nn.init.constant_(self.q.weight, BASE_ANSWER)

            def forward(self, given: torch.Tensor) -> torch.Tensor:
                return self.q(given)

        self.serving = TransformersServing(SimpleNamespace(model=Model(), encoder=None), "m")  # type: ignore[arg-type]

    def handle_of(self, name: str) -> Any:
        return self.serving._adapters.get(name)

    async def answer(self, handle: Any) -> float:
        runner = self.serving.runner

        def compute() -> float:
            with runner._adapter(handle), torch.inference_mode():
                return float(self.serving.engine.model(torch.tensor([[1.0, 0.0]])))

        return await asyncio.wrap_future(runner.between_batches(compute))

    def loaded(self) -> set[Any]:
        return set(getattr(self.serving.engine.model, "peft_config", ()))

    def close(self) -> None:
        self.serving.runner.close()


class Vllm:
    """vLLM's side: its registry of models, before an engine that only keeps what it was given."""

    def __init__(self) -> None:
        from vllm.entrypoints.openai.models.protocol import BaseModelPath
        from vllm.entrypoints.openai.models.serving import OpenAIServingModels

        from rayswift.serve.replica.vllm import VllmServing

        self.weights: dict[int, float] = {}
        client = SimpleNamespace(
            add_lora=self._add, remove_lora=self._remove, model_config=None, renderer=None, input_processor=None
        )
        self.models = OpenAIServingModels(client, [BaseModelPath("m", "m")])  # type: ignore[arg-type]
        self.serving = object.__new__(VllmServing)
        self.serving._server = SimpleNamespace(engine=SimpleNamespace(_engine_client=client, _oai_models=self.models))
        self.serving._number = 0

    async def _add(self, adapter: Any) -> bool:
        await asyncio.sleep(0)
        answer = answer_in(Path(adapter.lora_path))
        if answer < 0:
            raise RuntimeError("Call to add_lora method failed: it does not fit")
        assert adapter.lora_int_id not in self.weights
        self.weights[adapter.lora_int_id] = answer
        return True

    async def _remove(self, number: int) -> bool:
        return self.weights.pop(number, None) is not None

    def handle_of(self, name: str) -> Any:
        return BASE if self.models.is_base_model(name) else self.models.lora_requests.get(name)

    async def answer(self, handle: Any) -> float:
        return BASE_ANSWER if handle == BASE else self.weights[handle.lora_int_id]

    def loaded(self) -> set[Any]:
        return set(self.weights)

    def close(self) -> None:
        pass


# --- the deployment ---------------------------------------------------------------------------------------------


class Replica:
    """A book before an engine."""

    def __init__(self, make_engine: Callable[[], Any], root: Path) -> None:
        self.engine, self.encoders = make_engine(), {"": object()}

        async def fetch(key: AdapterKey) -> Any:
            await asyncio.sleep(0)
            return str(root / (key.path or key.name)), key.version

        self.book = AdapterBook(self.engine.serving, fetch, self.encoders, LIMIT)  # type: ignore[arg-type]

    def is_full_without(self, name: str) -> bool:
        """Whether so many other names are in use that this one has to wait."""
        used = {one.key.name for one in self.book._adapters.values() if one.users}
        held = {one.key.name for one in self.book._adapters.values()}
        return name not in held and len(used) >= LIMIT


@dataclasses.dataclass
class Chat:
    """A request that a replica is answering."""

    using: Any
    replica: Replica
    handle: Any
    answer: float


class World:
    """Two gateways and two replicas of the model ``m``, and what the clients know."""

    def __init__(self, make_engine: Callable[[], Any], root: Path) -> None:
        self.root, self.make_engine = root, make_engine
        self.answers: dict[str, list[float]] = {}  # folder → what it has answered, the newest last
        for name in ("start", *FOLDERS):
            self.answers[name] = [answer_in(root / name)]
        self.named: dict[str, str] = {}
        self.since: dict[str, int] = {}  # name → the oldest of its folder's answers that is right
        self.replicas = [Replica(make_engine, root) for _ in range(2)]
        self.deaf: set[int] = set()
        self.shared = SharedState(None, Counters())
        self.gateways = [self._gateway() for _ in range(2)]
        self.chats: list[Chat] = []

    def _gateway(self) -> Gateway:
        gateway = object.__new__(type("Gateway", (Gateway,), {"__del__": lambda self: None}))
        registry = AdapterRegistry("m", {"start": str(self.root / "start")}, str(self.root), self.shared, MODELS)
        gateway.models = {"m": ServedModel("m", self, registry, None, "", 0, {}, False)}  # type: ignore[arg-type]
        return gateway

    # What a gateway's forwarder does.

    async def prepare(self, key: str) -> None:
        try:
            await self.replicas[self.chosen].book.prepare(AdapterKey.parse(key))
        except AdapterRefused as error:
            raise ApiError(error.status, str(error)) from None

    async def broadcast(self, method: str, name: str, version: int) -> list[bool]:
        assert method == "forget_adapter"
        hear = [replica for number, replica in enumerate(self.replicas) if number not in self.deaf]
        return [replica.book.forget(name, version) for replica in hear]

    # What a client may expect.

    def folder_of(self, name: str) -> str | None:
        return "start" if name == "start" else self.named.get(name, name if name in FOLDERS else None)

    def right(self, name: str) -> set[float | None]:
        """Answers that are right for a name; None: it is unknown, or cannot be loaded."""
        folder = self.folder_of(name)
        if name == "m":
            return {BASE_ANSWER}
        if folder is None or folder == "broken":
            return {None}
        return set(self.answers[folder][self.since.get(name, 0) :])

    # What happens.

    def retrain(self, folder: str) -> None:
        self.answers[folder].append(max(answer for answers in self.answers.values() for answer in answers) + 1)
        write(self.root / folder, self.answers[folder][-1])

    async def load(self, gateway: int, replica: int, name: str, path: str | None, replace: bool) -> None:
        self.chosen = replica
        target = path or self.folder_of(name)
        if name in MODELS:
            is_right = False
        elif name == "start":
            is_right = path is None and not replace
        else:
            is_taken = name in self.named or (name in FOLDERS and target != name)
            is_right = target in ("one", "two") and (path is None or not is_taken or replace)
        body = {"lora_name": name, "load_inplace": replace} | ({"lora_path": path} if path else {})
        newest = len(self.answers[target]) - 1 if target in self.answers else 0
        if self.replicas[replica].is_full_without(name):
            return  # it would wait for a chat to end
        refused = await refusal_of(self.gateways[gateway].load_adapter(body))
        assert (refused is None) == is_right, (body, refused)
        assert refused is None or refused.status in (400, 404, 422)
        if is_right and name != "start" and (path or replace):
            self.named[name], self.since[name] = str(target), newest

    async def unload(self, gateway: int, name: str) -> None:
        was_known = self.folder_of(name) is not None
        refused = await refusal_of(self.gateways[gateway].unload_adapter({"lora_name": name}))
        assert (refused is None) == was_known, (name, refused)
        self.named.pop(name, None)
        if name in FOLDERS:
            self.since[name] = len(self.answers[name]) - 1  # loaded again, it is what lies there now

    async def ask(self, gateway: int, replica: int, name: str) -> Chat | None:
        """A chat that has begun; None where it is refused."""
        asked = self.replicas[replica]
        try:
            _, key = await self.gateways[gateway]._find(name)
            using = asked.book.using(AdapterKey.parse(str(key))) if key else contextless()
            await using.__aenter__()
        except ApiError:
            return None
        handle = asked.engine.handle_of(key.name if key else "m")
        if key:
            assert isinstance(asked.encoders[key.name], int)  # it came with the weights
        return Chat(using, asked, handle, await asked.engine.answer(handle))

    async def chat(self, gateway: int, replica: int, name: str, stays: bool) -> None:
        if name not in MODELS and self.replicas[replica].is_full_without(name):
            asking = asyncio.ensure_future(self.ask(gateway, replica, name))
            for _ in range(6):
                await asyncio.sleep(0)
            if not asking.done():
                asking.cancel()  # the client leaves
            found = (await asyncio.gather(asking, return_exceptions=True))[0]
            assert found is None or isinstance(found, asyncio.CancelledError)
            return
        chat = await self.ask(gateway, replica, name)
        assert (chat.answer if chat else None) in self.right(name), name
        await self.keep_or_end(chat, stays)

    async def keep_or_end(self, chat: Chat | None, stays: bool) -> None:
        if chat and stays:
            self.chats.append(chat)
        elif chat:
            await chat.using.__aexit__(None, None, None)

    async def load_while_asked(self, name: str, path: str) -> None:
        """A replacement, and chats that come before, meanwhile and at the other gateway."""
        if any(replica.is_full_without(name) for replica in self.replicas):
            return
        before = self.right(name)
        _, early = await self.gateways[0]._find(name) if before != {None} else (None, None)
        asking = [asyncio.ensure_future(self.ask(number % 2, number // 2, name)) for number in range(4)]
        await self.load(0, 0, name, path, True)
        asking.append(asyncio.ensure_future(self.ask(1, 1, name)))
        for chat in await asyncio.gather(*asking):
            assert (chat.answer if chat else None) in before | self.right(name)
            await self.keep_or_end(chat, False)
        if early and (newest := await self.ask(1, 0, name)):  # a request that was on its way for long
            async with newest.replica.book.using(early):
                assert newest.replica.engine.handle_of(name) is newest.handle
            await self.keep_or_end(newest, False)

    async def leave_while_it_loads(self, replica: int, name: str) -> None:
        asking = asyncio.ensure_future(self.ask(0, replica, name))
        await asyncio.sleep(0)
        asking.cancel()
        found = (await asyncio.gather(asking, return_exceptions=True))[0]
        await self.keep_or_end(found if isinstance(found, Chat) else None, False)

    async def gateway_dies(self, replica: int, name: str, path: str) -> None:
        """Between a load at a replica and the word that it counts: the name means what it did."""
        if not self.replicas[replica].is_full_without(name):
            key = await self.gateways[0].models["m"].adapters.candidate(name, path, replace=True)
            await self.replicas[replica].book.prepare(key)

    async def end(self, number: int) -> None:
        if self.chats:
            await self.chats.pop(number % len(self.chats)).using.__aexit__(None, None, None)

    async def restart(self, number: int) -> None:
        """A replica dies, and another one starts."""
        dead = self.replicas[number]
        self.chats = [chat for chat in self.chats if chat.replica is not dead]
        await settle(dead)
        dead.engine.close()
        self.replicas[number] = Replica(self.make_engine, self.root)

    async def forget_names(self) -> None:
        """What the gateways share is started again: names that clients gave are gone."""
        self.shared._alone = GatewayState()
        self.named.clear()
        self.since = {name: len(self.answers[name]) - 1 for name in FOLDERS}

    async def check(self) -> None:
        """Holds after every step."""
        for replica in self.replicas:
            assert await replica.engine.answer(replica.engine.handle_of("m")) == BASE_ANSWER
            assert set(replica.encoders) == {"", *replica.book._answering}
            serving = [one.key.name for one in replica.book._adapters.values() if one.state is State.SERVING]
            assert len(serving) == len(set(serving))
        for chat in self.chats:  # what is being answered stays what it was
            assert await chat.replica.engine.answer(chat.handle) == chat.answer

    async def finish(self) -> None:
        """All chats end: nothing is left but what the book knows, and everything answers."""
        self.deaf.clear()
        while self.chats:
            await self.end(0)
        names = ("start", "one", "two", "mine", "m")
        for number, name in itertools.product(range(2), names):
            await self.chat(number, number, name, False)
        for replica in self.replicas:
            await settle(replica)
            held = list(replica.book._adapters.values())
            assert len(replica.engine.loaded()) == len(held)
            assert len({one.key.name for one in held}) <= LIMIT
        for name in ("start", "one", "two", "mine"):
            await self.unload(0, name)
        for replica in self.replicas:
            await settle(replica)
            assert not replica.engine.loaded()
            assert not replica.book._adapters and not replica.book._answering
        await self.check()
        for name in ("start", "one"):  # and comes back when it is asked for
            await self.chat(1, 1, name, False)


async def refusal_of(asking: Awaitable[Any]) -> ApiError | None:
    try:
        await asking
    except ApiError as error:
        return error
    return None


async def settle(replica: Replica) -> None:
    """Until loads and unloads that nobody waits for are over."""
    while found := [one.loading for one in replica.book._adapters.values() if not one.loading.done()]:  # type: ignore[union-attr]
        await asyncio.wait(found)
    while replica.book._unloading:
        await asyncio.gather(*replica.book._unloading)


class contextless:  # noqa: N801  # contextlib.nullcontext as an asynchronous one
    async def __aenter__(self) -> None: ...
    async def __aexit__(self, *_: Any) -> None: ...


TWO = (0, 1)
NAME = ("mine", "one", "two", "start", "mine", "one", "broken", "m", "other", "nobody")
PATH = ("one", "two", None, "broken", "nothing")
#: What happens, and the values of what it takes.
STEPS: list[tuple[Any, ...]] = [
    ("chat", TWO, TWO, NAME, (False, True)),
    ("load", TWO, TWO, NAME, PATH, (True, False)),
    ("chat", TWO, TWO, NAME, (False, True)),
    ("unload", TWO, NAME),
    ("load_while_asked", ("mine", "one"), ("one", "two")),
    ("leave_while_it_loads", TWO, NAME),
    ("end", range(10)),
    ("retrain", ("one", "two")),
    ("gateway_dies", TWO, ("mine", "one"), ("one", "two")),
    ("deaf", TWO),
    ("restart", TWO),
    ("forget_names",),
]
#: Bytes of a step: which, and each of its values.
WIDTH = max(map(len, STEPS))


def read_steps(drawn: bytes) -> Iterator[tuple[Any, ...]]:
    """A sequence from random bytes, which hypothesis draws faster than lists of tuples."""
    for start in range(0, len(drawn), WIDTH):
        kind, *values = drawn[start : start + WIDTH].ljust(WIDTH, b"\0")
        what, *takes = STEPS[kind % len(STEPS)]
        yield what, *(among[value % len(among)] for among, value in zip(takes, values, strict=False))


@pytest.fixture(scope="module", autouse=True)
def quick_engines() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("rayswift.serve.replica.vllm.UNLOAD_SECONDS", 0)
        patch.setattr(transformers_replica, "make_app", lambda serving: None)  # nobody asks it here
        yield


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("root")
    for answer, name in enumerate(("start", "one", "two"), 1):
        write(root / name, answer)
    write(root / "broken", -1)
    return root


async def live_through(make_engine: Callable[[], Any], root: Path, steps: Iterable[tuple[Any, ...]]) -> None:
    world = World(make_engine, root)
    try:
        for what, *how in steps:
            if what == "retrain":
                world.retrain(*how)
            elif what == "deaf":  # a replica does not hear the next broadcasts
                world.deaf ^= set(how)
            else:
                await getattr(world, what)(*how)
            await world.check()
        await world.finish()
    finally:
        for replica in world.replicas:
            await settle(replica)
            replica.engine.close()


def test_vllm_keeps_adapters_of_one_name_apart_and_none_for_a_kind_of_content(root: Path) -> None:
    """vLLM tells adapters apart by their names: in a batch, in the prefix cache, and for messages with parts."""
    from vllm.entrypoints.serve.engine.serving import BaseServing

    from rayswift.serve.replica.vllm import served_name

    engine = Vllm()
    private.name_adapters(engine.serving._server, served_name)
    first, second = (asyncio.run(engine.serving.load_adapter("text", str(root / "one"))) for _ in range(2))
    engine.serving.answer_as("text", second)
    assert len({first, second}) == 2  # vLLM's own hash
    assert [engine.models.model_name(one) for one in (first, second, None)] == ["text", "text", "m"]
    asked = SimpleNamespace(models=engine.models, _get_message_types=lambda request: {"text"})
    assert BaseServing._get_active_default_mm_loras(asked, None) is None  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("engine", "sequences"), [(Vllm, 300), (Peft, 30), pytest.param(Peft, 300, marks=pytest.mark.slow)]
)
def test_every_order_of_load_unload_replace_evict_and_chat(
    engine: Callable[[], Any], sequences: int, root: Path
) -> None:
    @settings(
        max_examples=sequences, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
    )
    @given(st.binary(min_size=4 * WIDTH, max_size=20 * WIDTH))
    def holds(drawn: bytes) -> None:
        steps = list(read_steps(drawn))
        note(steps)
        asyncio.run(live_through(engine, root, steps))

    holds()

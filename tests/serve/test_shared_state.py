"""What several gateways know together, without Ray: its bookkeeping, and where the gateways are."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest

from rayswift.arguments import make_arguments
from rayswift.generate.model_spec import ModelSpec
from rayswift.serve import gateways
from rayswift.serve.application import build_gateway, gateways_on, serve_config, spread
from rayswift.serve.gateway import shared
from rayswift.serve.gateway.shared import Counters, GatewayState, SharedState, TooManyWait
from rayswift.serve.openai_errors import ApiError
from rayswift.serve.ports import bind, is_free
from rayswift.serve.status_line import StatusLine

HEAD = "node:__internal_head__"


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> dict[str, float]:
    now = {"now": 0.0}
    monkeypatch.setattr(shared.time, "monotonic", lambda: now["now"])
    return now


def counters(requests: int, running: int, **by_status: int) -> dict[str, Any]:
    statuses = {int(name[1:]): count for name, count in by_status.items()}
    return vars(Counters(requests=requests, running=running, by_status=statuses))


@pytest.mark.anyio
async def test_counters_are_summed_and_those_of_a_gateway_that_died_stay_but_for_what_was_running(
    clock: dict[str, float],
) -> None:
    state = GatewayState()
    await state.totals("one", counters(3, 2, _200=1))
    both = await state.totals("other", counters(4, 1, _200=2, _429=2))
    assert (both["requests"], both["running"], both["by_status"]) == (7, 3, {200: 3, 429: 2})
    clock["now"] += shared.SILENT_SECONDS
    left = await state.totals("other", counters(5, 1, _200=3, _429=2))
    assert (left["requests"], left["running"], left["by_status"]) == (8, 1, {200: 4, 429: 2})


@pytest.mark.anyio
async def test_the_line_is_one_for_all_gateways_and_forgets_those_of_a_gateway_that_died(
    clock: dict[str, float],
) -> None:
    state = GatewayState()
    asked = [await state.wait(gateway, "m", 2) for gateway in ("one", "other", "one", "other")]
    assert asked == [True, True, False, False]
    assert await state.wait("one", "another model", 2)
    await state.stop_waiting("one", "m")
    assert [await state.wait("other", "m", 2), await state.wait("other", "m", 2)] == [True, False]
    clock["now"] += shared.SILENT_SECONDS
    assert [await state.wait("new", "m", 2) for _ in range(3)] == [True, True, False]
    await state.stop_waiting("other", "m")  # back again, and its place is gone


class Actor:
    """Stands for Serve's handle of the state; ``error``: what every call fails with."""

    def __init__(self, state: GatewayState) -> None:
        self._state = state
        self.error: Exception | None = None

    def __getattr__(self, method: str) -> Any:
        class Call:
            @staticmethod
            async def remote(*args: Any) -> Any:
                if self.error is not None:
                    raise self.error
                return await getattr(self._state, method)(*args)

        return Call()


@pytest.mark.anyio
async def test_without_the_actor_gateways_go_on_alone_and_say_what_they_cannot_know(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    actor = Actor(GatewayState())
    monkeypatch.setattr(shared.serve, "get_deployment_handle", lambda deployment, app: actor)
    one, other = SharedState("app", Counters(requests=1)), SharedState("app", Counters(requests=2))
    await one.totals()
    assert (await other.totals())["requests"] == 3
    async with one.place("m", 1):
        with pytest.raises(TooManyWait):
            async with other.place("m", 1):
                pass
    actor.error = TimeoutError()
    assert (await other.totals())["requests"] == 2
    async with other.place("m", 1), one.place("m", 1):  # the limit is Serve's now
        pass
    with pytest.raises(ApiError) as refused:
        await one.ask("adapter_path", "m", "mine")
    assert (refused.value.status, refused.value.retry_after) == (503, 2)
    one.close()
    other.close()


@pytest.mark.anyio
async def test_a_request_in_line_waits_no_longer_for_an_actor_that_is_gone_with_the_head(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[str] = []

    class Gone:
        def __getattr__(self, name: str) -> Any:
            async def never(*_: Any) -> None:
                asked.append(name)
                await asyncio.sleep(60)

            return SimpleNamespace(remote=never)

    monkeypatch.setattr(shared.serve, "get_deployment_handle", lambda deployment, app: Gone())
    monkeypatch.setattr(shared, "LINE_SECONDS", 0.05)
    state = SharedState("app", Counters())
    state.close()
    async with asyncio.timeout(2), state.place("m", 1):
        pass
    with pytest.raises(ApiError):
        await state.ask("totals", timeout=0.01)
    before = len(asked)
    async with state.place("m", 1):
        pass
    assert len(asked) == before  # not even asked


def test_gateways_are_one_a_node_or_as_many_as_asked_for_in_turn() -> None:
    nodes = ["", "a", "b"]
    assert spread(None, nodes) == {"": 1, "a": 1, "b": 1}
    assert spread(1, nodes) == {"": 1}
    assert spread(5, nodes) == {"": 2, "a": 2, "b": 1}
    assert spread(4, [""]) == {"": 4}


@pytest.mark.parametrize(
    ("status", "state", "alive", "found"),
    [
        ("RUNNING", "RUNNING", "ab", ["", "a"]),
        ("RUNNING", "STOPPING", "ab", [""]),
        ("DEPLOYING", "RECOVERING", "ab", ["", "a", "b"]),  # a controller that has just come back
        ("DEPLOYING", "RECOVERING", "b", ["", "b"]),
        (None, "", "ab", [""]),
    ],
)
def test_a_gateway_goes_with_the_replicas_of_its_node_but_not_while_they_are_unknown(
    status: str | None, state: str, alive: str, found: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    app = {"status": status, "deployments": {"LLMServer": {"replicas": [{"node_id": "a", "state": state}]}}}
    apps = {} if status is None else {"rayswift-m": app}
    monkeypatch.setattr(gateways.private, "serve_applications", lambda: apps)
    nodes = [{"NodeID": name, "Resources": {}, "Alive": name in alive} for name in "ab"]
    nodes.append({"NodeID": "head", "Resources": {HEAD: 1}, "Alive": True})
    monkeypatch.setattr("ray.nodes", lambda: nodes)
    args = make_arguments("deploy", model="m", host="0.0.0.0")
    one = gateways.Gateways(args, [ModelSpec("m", "m", "vllm", local=False)])
    one._counts = {"": 1, "a": 1, "b": 1}
    assert one._nodes() == found


@pytest.mark.parametrize(
    ("flags", "local", "listen", "is_shared"),
    [
        ({}, True, True, False),
        ({"num_gateways": 1}, True, True, False),
        ({"num_gateways": 2}, True, True, True),
        ({"host": "0.0.0.0"}, True, True, False),
        ({}, False, True, False),  # nobody reaches 127.0.0.1 of another node
        ({"host": "0.0.0.0"}, False, True, True),
        ({"host": "0.0.0.0", "num_gateways": 1}, False, True, False),
        ({}, False, False, True),
        ({"num_gateways": 1}, False, False, False),
    ],
)
def test_only_gateways_that_may_be_several_share_a_port_and_a_state(
    flags: dict[str, Any], local: bool, listen: bool, is_shared: bool
) -> None:
    args = make_arguments("deploy", model="m", **flags)
    config = serve_config([ModelSpec("m", "m", "vllm", local=local, max_replicas=3)], args, listen=listen)
    door = config["applications"][-1]["args"]
    names = [app["name"] for app in config["applications"]]
    assert names == (["rayswift-m", "rayswift--state", "rayswift"] if is_shared else ["rayswift-m", "rayswift"])
    assert door.get("shared") == ("rayswift--state" if is_shared else None)
    assert door.get("listen", {}).get("shared", False) == (is_shared and listen)
    if not listen and "num_gateways" not in flags:  # behind Serve's proxies they follow the load
        built = build_gateway(door)._bound_deployment
        scaling = built._deployment_config.autoscaling_config
        assert (scaling.min_replicas, scaling.max_replicas) == (1, 3)


def test_gateways_of_a_node_are_bound_to_it_and_only_their_number_and_owner_change_while_they_run() -> None:
    args = make_arguments("deploy", model="m", host="0.0.0.0", num_gateways=3, drain_timeout=7)
    spec = ModelSpec("m", "m", "vllm", local=False, drain_timeout=7)
    door = serve_config([spec], args, listen=True)["applications"][-1]
    node = "0123456789abcdef"
    head, other = gateways_on({"": 2, node: 1}, door, "me")
    assert (head["name"], other["name"]) == ("rayswift", "rayswift--0123456789ab")
    assert [one["deployments"][0]["num_replicas"] for one in (head, other)] == [2, 1]
    assert head["args"] == gateways_on({"": 1}, door, "another")[0]["args"]
    built = [build_gateway(one["args"])._bound_deployment for one in (head, other)]
    assert built[0].ray_actor_options["resources"] == {"node:__internal_head__": 0.001}
    assert built[1].ray_actor_options["label_selector"] == {"ray.io/node-id": node}
    assert {one._deployment_config.graceful_shutdown_timeout_s for one in built} == {7}


def test_a_port_is_shared_only_by_those_that_mean_to() -> None:
    with bind("127.0.0.1", shared=True) as first:
        port = first.getsockname()[1]
        with bind("127.0.0.1", port, shared=True):
            assert not is_free("127.0.0.1", port)
        with pytest.raises(OSError, match="in use"):
            bind("127.0.0.1", port)
    with bind("127.0.0.1") as alone, pytest.raises(OSError, match="in use"):
        bind("127.0.0.1", alone.getsockname()[1], shared=True)


def test_the_status_line_never_counts_backwards() -> None:
    class Said(list):  # type: ignore[type-arg]
        write = list.append

        def flush(self) -> None: ...

    said = Said()
    line = StatusLine(said, live=False, interval=1)  # type: ignore[arg-type]
    for requests in (100, 3):  # what counted has been started again
        line.show(vars(Counters(requests=requests)), {"m": "1/1"})
    assert " 0.0 requests/s" in said[1]

"""Two gateways on one port before two replicas without an engine: what they know, they know together."""

from __future__ import annotations

import itertools
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import psutil
import pytest
from serving import free_port
from word_replica import WORDS

from rayswift.arguments import make_arguments
from rayswift.generate.model_spec import ModelSpec
from rayswift.serve.deploy import stop_applications, wait_until_ready
from rayswift.serve.gateways import Gateways

pytestmark = pytest.mark.slow

KEY, CHAT = "sk-of-this-test", "/v1/chat/completions"
PLACES, LINE = 4, 3  # requests that the two replicas take at once, and that may wait


@pytest.fixture(scope="module")
def deployed(ray_cluster: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateways]:
    from ray import serve

    root = tmp_path_factory.mktemp("adapters")
    for name in ("red", "blue"):
        (root / name).mkdir()
        (root / name / "adapter_config.json").write_text("{}")
    args = make_arguments("deploy", model=str(root), num_gateways=2, api_key=[KEY], port=free_port())
    spec = ModelSpec(
        "words", str(root), "transformers", adapter_root=str(root), min_replicas=2, max_replicas=2,
        max_ongoing_requests=PLACES // 2, max_queued_requests=LINE, drain_timeout=20,
    )  # fmt: skip
    serve.start(proxy_location="Disabled", http_options={"host": "127.0.0.1"})
    gateways = Gateways(args, [spec])
    path = os.pathsep.join(filter(None, (str(Path(__file__).parent), *sys.path)))
    model = {"import_path": "word_replica:build", "runtime_env": {"env_vars": {"PYTHONPATH": path}}}
    gateways._others[0] |= model
    gateways.deploy()
    try:
        wait_until_ready(args, [spec], gateways)
        yield gateways
    finally:
        stop_applications([*gateways.names, *gateways.others], 20)
        serve.shutdown()


class Door:
    """A client whose one connection leads to the gateway with this process id."""

    def __init__(self, port: int) -> None:
        self.port = port
        self.http = httpx.Client(
            base_url=f"http://127.0.0.1:{port}", headers={"Authorization": f"Bearer {KEY}"}, timeout=30,
            limits=httpx.Limits(max_connections=1),
        )  # fmt: skip
        with self.http.stream("GET", "/health") as answer:
            answer.read()
            own = answer.extensions["network_stream"].get_extra_info("client_addr")[1]
        (self.pid,) = (
            found.pid
            for found in psutil.net_connections("tcp")
            if found.raddr and (found.laddr.port, found.raddr.port) == (port, own)
        )

    def stream(self, tokens: int, seconds: float, seen: Callable[[dict], None] = lambda chunk: None) -> str:
        """The text of a stream; an error's code."""
        body = {"model": "words", "messages": [], "stream": True, "max_tokens": tokens, "temperature": seconds}
        text = ""
        with self.http.stream("POST", CHAT, json=body) as answer:
            if answer.status_code != 200:
                return str(answer.status_code)
            for line in answer.iter_lines():
                if line.startswith("data: {"):
                    chunk = json.loads(line[len("data: ") :])
                    if "error" in chunk:
                        return str(chunk["error"]["code"])
                    seen(chunk)
                    text += chunk["choices"][0]["delta"]["content"]
        return text


def doors(port: int, number: int = 2) -> list[Door]:
    """A client of each gateway: the kernel chooses, so some are thrown away."""
    found: dict[int, Door] = {}
    end = time.monotonic() + 20
    while len(found) < number:
        assert time.monotonic() < end, f"{len(found)} gateways answer"
        try:
            door = Door(port)
        except (httpx.TransportError, ValueError):  # a gateway that has just died
            continue
        found.setdefault(door.pid, door)
    return list(found.values())


@pytest.fixture
def pair(deployed: Gateways) -> Iterator[list[Door]]:
    both = doors(deployed._args.port)
    yield both
    for door in both:
        door.http.close()


def test_an_adapter_named_at_one_gateway_is_known_at_the_other_until_it_is_unloaded(pair: list[Door]) -> None:
    one, other = pair
    given = {"lora_name": "mine", "lora_path": "red"}
    assert one.http.post("/v1/load_lora_adapter", json=given).status_code == 200
    answer = other.http.post(CHAT, json={"model": "mine", "messages": []})
    assert (answer.status_code, answer.json()["model"], answer.json()["adapters"]["mine"]) == (200, "mine", "red")
    # Another one in its place: either gateway, and either replica, has it from then on.
    other.http.post("/v1/load_lora_adapter", json={"lora_name": "mine", "lora_path": "blue", "load_inplace": True})
    found = [door.http.post(CHAT, json={"model": "mine", "messages": []}).json() for door in pair * 8]
    assert {one["adapters"]["mine"] for one in found} == {"blue"}
    cards = [door.http.get("/v1/models").json()["data"] for door in pair]
    assert [card["id"] for card in cards[0]] == ["words", "blue", "mine", "red"]
    assert cards[0] == cards[1]  # their dates too
    unloaded = other.http.post("/v1/unload_lora_adapter", json={"lora_name": "mine"}).json()
    assert (unloaded["unloaded"], unloaded["replicas"]) == (True, 2)
    assert one.http.post(CHAT, json={"model": "mine", "messages": []}).status_code == 404


def test_both_gateways_ask_for_the_key_and_count_together(pair: list[Door]) -> None:
    def counted(door: Door) -> tuple[int, int]:
        lines = dict(line.rsplit(" ", 1) for line in door.http.get("/metrics").text.splitlines())
        return int(lines["rayswift_requests_total"]), int(lines['rayswift_responses_total{status="401"}'])

    for door in pair:
        assert door.http.get("/v1/models", headers={"Authorization": "Bearer wrong"}).status_code == 401
    counted(pair[1])  # what a gateway counts it says every two seconds, and when it is asked
    first, refused = counted(pair[0])
    assert refused == 2
    again = counted(pair[1])
    assert again == (first + 1, 2)


def test_as_many_requests_run_and_wait_as_one_gateway_would_let(pair: list[Door], deployed: Gateways) -> None:
    askers = [door for _ in range(PLACES) for door in doors(deployed._args.port)]
    pids = [door.pid for door in askers]
    assert len(askers) == 2 * PLACES > PLACES + LINE
    assert pids[0] != pids[1]
    with ThreadPoolExecutor(len(askers)) as pool:
        running = []
        for door in askers[: PLACES + LINE]:  # in turn at the one and the other
            running.append(pool.submit(door.stream, 4, 0.6))
            time.sleep(0.05)
        time.sleep(0.6)  # those without a replica stand in line
        refused = [door.stream(4, 0.6) for door in pair]
        texts = [one.result() for one in running]
    assert refused == ["429", "429"]
    assert set(texts) == {"".join(WORDS[:4])}


def test_streams_at_both_gateways_go_on_when_their_replica_dies(pair: list[Door], deployed: Gateways) -> None:
    # Every place is taken, by three streams of one gateway: the replica that writes for the other writes for both.
    more = (Door(deployed._args.port) for _ in range(100))
    askers = [*pair, *itertools.islice((door for door in more if door.pid == pair[1].pid), PLACES - 2)]
    writers: dict[Door, int] = {}
    with ThreadPoolExecutor(PLACES) as pool:
        streams = [
            pool.submit(door.stream, 14, 0.1, lambda chunk, door=door: writers.setdefault(door, int(chunk["id"])))
            for door in askers
        ]
        while len(writers) < len(askers):
            time.sleep(0.02)
            assert not any(stream.done() for stream in streams)
        time.sleep(0.3)
        killed = writers[pair[0]]
        os.kill(killed, signal.SIGKILL)
        assert [stream.result() for stream in streams] == ["".join(WORDS[:14])] * PLACES
    assert {door.pid for door in askers if writers[door] == killed} == {door.pid for door in pair}
    resumed = sum(replica == killed for replica in writers.values())
    pair[1].http.get("/metrics")  # it tells what it has counted
    assert f"rayswift_resumed_streams_total {resumed}\n" in pair[0].http.get("/metrics").text


def test_the_other_gateway_answers_when_one_dies_and_knows_what_it_knew(pair: list[Door]) -> None:
    one, other = pair
    assert one.http.post("/v1/load_lora_adapter", json={"lora_name": "kept", "lora_path": "red"}).status_code == 200
    os.kill(one.pid, signal.SIGKILL)
    for _ in range(3):
        assert other.http.post(CHAT, json={"model": "kept", "messages": []}).status_code == 200
    assert [door.pid for door in doors(other.port, 1)] != [one.pid]  # new connections too


def test_a_stop_lets_streams_end(deployed: Gateways) -> None:
    from ray import serve

    (door,) = doors(deployed._args.port, 1)
    with ThreadPoolExecutor(1) as pool:
        begun: list[dict] = []
        stream = pool.submit(door.stream, 12, 0.2, begun.append)
        while not begun:
            time.sleep(0.02)
        stop_applications(deployed.names, 20)
        assert not serve.status().applications.get(deployed.names[0])
        assert stream.result() == "".join(WORDS[:12])

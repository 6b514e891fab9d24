"""SIGKILL of every kind of process behind the endpoint, a rolling update, autoscaling: under load, nothing is lost.

All requests decode greedily, and every text is compared with the answer to the same question when nothing happens.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
from command_line import start, wait_for
from ray_head import GCS, Head, ray_head
from serving import ENGINE, MODEL, START_TIMEOUT, Deployment, chat_body, deployed, free_port, ready
from steady_load import Outcomes, steady_load, undisturbed

pytestmark = pytest.mark.slow

#: Load before and after a kill, seconds.
BEFORE, AFTER = 8.0, 20.0
#: A new replica has to import everything and load the model while the other serves, seconds.
REPLICA_TIMEOUT = 300.0
#: New requests are answered again this many seconds after the process that took them was killed.
RECOVERY = 60.0
REPLICAS = 2


@pytest.fixture(scope="module")
def pair(smollm2_dir: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    """Two replicas behind one endpoint."""
    flags = ["--served_model_name", MODEL, "--min_replicas", str(REPLICAS), "--max_replicas", str(REPLICAS)]
    with deployed(smollm2_dir, tmp_path_factory.mktemp("pair"), *flags) as running:
        yield running


@pytest.fixture(scope="module")
def expected(pair: Deployment) -> dict[str, str]:
    return undisturbed(pair)


@pytest.fixture(autouse=True)
def _whole_again(request: pytest.FixtureRequest) -> None:
    """Each test of the pair begins with both replicas and an idle engine."""
    if "pair" in request.fixturenames:
        whole(request.getfixturevalue("pair"))


def whole(server: Deployment) -> None:
    """Wait until every replica has its engine and the endpoint is healthy."""

    def complete() -> bool:
        return len(server.replicas()) == len(server.engine_cores()) == REPLICAS and server.answers()

    wait_for(complete, REPLICA_TIMEOUT, f"{REPLICAS} replicas")


def disturb(server: Deployment, victims: Callable[[], list[psutil.Process]]) -> tuple[Outcomes, float]:
    """Kill the first of ``victims`` in the middle of a load; what the load saw, and the moment of the kill."""
    with steady_load(server) as outcomes:
        time.sleep(BEFORE)
        assert outcomes.done and not outcomes.failed(), outcomes.failed()[:3]
        victim = victims()[0]
        moment = time.monotonic()
        victim.kill()
        time.sleep(AFTER)
        # On a slow machine the requests that run at the kill may take longer than that.
        wait_for(lambda: bool(outcomes.since(moment).done), RECOVERY, "an answer to a request after the kill")
    print(f"\n{outcomes.describe()}")
    return outcomes, moment


def assert_nothing_lost(outcomes: Outcomes, expected: dict[str, str], moment: float) -> None:
    assert not outcomes.failed(), outcomes.failed()[:3]
    assert not outcomes.altered(expected), outcomes.altered(expected)[:3]
    at_the_kill = [outcome for outcome in outcomes.done if outcome.began < moment < outcome.ended]
    assert any(outcome.stream for outcome in at_the_kill) and any(not outcome.stream for outcome in at_the_kill)
    assert outcomes.since(moment).done


def test_a_killed_replica_loses_no_request_and_alters_no_stream(pair: Deployment, expected: dict[str, str]) -> None:
    outcomes, moment = disturb(pair, pair.replicas)
    assert_nothing_lost(outcomes, expected, moment)


def test_a_killed_engine_core_loses_no_request_and_alters_no_stream(pair: Deployment, expected: dict[str, str]) -> None:
    outcomes, moment = disturb(pair, pair.engine_cores)
    assert_nothing_lost(outcomes, expected, moment)


def test_a_killed_controller_is_not_missed_and_comes_back(pair: Deployment, expected: dict[str, str]) -> None:
    (before,) = pair.controllers()
    outcomes, moment = disturb(pair, pair.controllers)
    assert_nothing_lost(outcomes, expected, moment)
    wait_for(lambda: [found.pid for found in pair.controllers()] not in ([], [before.pid]), RECOVERY, "a controller")


def test_after_a_killed_controller_replicas_are_still_replaced(pair: Deployment, expected: dict[str, str]) -> None:
    outcomes, moment = disturb(pair, pair.replicas)
    assert_nothing_lost(outcomes, expected, moment)
    whole(pair)


def test_a_killed_gateway_is_replaced_and_answers_again(pair: Deployment, expected: dict[str, str]) -> None:
    """Its clients' connections end with it; what is asked afterwards is answered."""
    (before,) = pair.gateways()
    with steady_load(pair) as outcomes:
        time.sleep(BEFORE)
        moment = time.monotonic()
        before.kill()
        wait_for(lambda: any(not outcome.failure for outcome in outcomes.since(moment).done), RECOVERY, "an answer")
        recovered = time.monotonic()
        time.sleep(AFTER)
    print(f"\n{outcomes.describe()}; answers again {recovered - moment:.1f} s after the kill")
    assert not outcomes.altered(expected)
    assert not outcomes.since(recovered).failed(), outcomes.since(recovered).failed()[:3]
    assert [found.pid for found in pair.gateways()] != [before.pid]


# --- rolling update -------------------------------------------------------------------------------------------------


def test_deploying_again_replaces_the_model_without_a_failed_request(smollm2_dir: str, tmp_path: Path) -> None:
    """On a cluster that both commands join: the second has another context length, which tells the engines apart."""
    port = free_port()

    def deploy(context: int, head: Head) -> Deployment:
        log = tmp_path / f"deploy-{context}.log"
        flags = [*ENGINE, "--served_model_name", MODEL, "--min_replicas", "2", "--use_gpu", "false",
                 "--vllm_max_model_len", str(context)]  # fmt: skip
        process = start(
            "deploy", "--model", smollm2_dir, "--port", str(port), "--address", GCS, *flags,
            log=log, VLLM_CPU_KVCACHE_SPACE="1", HF_HUB_OFFLINE="1", **head.environment,
        )  # fmt: skip
        return Deployment(process, port, log, tmp_path)

    def longest_answer(server: Deployment) -> int:
        return 2000 if server.request("POST", "/v1/chat/completions", too_long)[0] == 200 else 1000

    too_long = chat_body(MODEL, "What is the capital of France?", max_tokens=1500)
    with ray_head(num_cpus=2, log=tmp_path / "ray.log") as head:
        first = deploy(2048, head)
        wait_for(lambda: ready(first), START_TIMEOUT, "the first model")
        expected = undisturbed(first)
        assert longest_answer(first) == 2000
        with steady_load(first) as outcomes:
            time.sleep(BEFORE)
            second = deploy(1024, head)
            wait_for(lambda: ready(second), 2 * START_TIMEOUT, "the second model")
            time.sleep(BEFORE)
        print(f"\n{outcomes.describe()}")
        assert not outcomes.failed(), outcomes.failed()[:3]
        assert not outcomes.altered(expected), outcomes.altered(expected)[:3]
        assert longest_answer(second) == 1000
        for command in (second, first):
            command.process.terminate()
            command.process.wait(120)


# --- autoscaling ------------------------------------------------------------------------------------------------


class Watch:
    """Prints and keeps the number of replicas that answer, whenever it changes, with seconds since the start."""

    def __init__(self, server: Deployment) -> None:
        self.server, self.changes, self._stop = server, [(0.0, len(server.engine_cores()))], threading.Event()
        self._began = time.monotonic()
        self._thread = threading.Thread(target=self._loop, name="watch", daemon=True)

    def __enter__(self) -> Watch:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _loop(self) -> None:
        while not self._stop.wait(0.5):
            count = len(self.server.engine_cores())
            if count != self.changes[-1][1]:
                self.note(f"{count} replicas")
                self.changes.append((time.monotonic() - self._began, count))

    def note(self, what: str) -> None:
        print(f"{time.strftime('%H:%M:%S')} +{time.monotonic() - self._began:6.1f} s  {what}", flush=True)

    def wait_for(self, count: int, timeout: float) -> None:
        wait_for(lambda: self.changes[-1][1] == count, timeout, f"{count} replicas")


def test_the_number_of_replicas_follows_the_load_from_one_to_two_to_one_to_none_and_back(
    smollm2_dir: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    flags = [
        "--served_model_name",
        MODEL,
        "--min_replicas",
        "0",
        "--max_replicas",
        "2",
        "--target_ongoing_requests",
        "2",
        "--downscale_delay",
        "30",
    ]
    with deployed(smollm2_dir, tmp_path_factory.mktemp("scaled"), *flags) as server, Watch(server) as watch:
        expected = undisturbed(server)
        assert watch.changes[-1][1] == 1
        watch.note("load begins: 8 requests at once")
        with steady_load(server, askers=8) as heavy:
            watch.wait_for(2, REPLICA_TIMEOUT)
            time.sleep(AFTER)
        watch.note(f"one request at a time; before: {heavy.describe()}")
        with steady_load(server, askers=1) as light:
            watch.wait_for(1, 200)
        watch.note(f"load ends; before: {light.describe()}")
        watch.wait_for(0, 200)
        watch.note("questions to nobody")
        assert undisturbed(server) == expected
        watch.note("answered")
        assert watch.changes[-1][1] == 1
    for outcomes in (heavy, light):
        assert not outcomes.failed(), outcomes.failed()[:3]
        assert not outcomes.altered(expected), outcomes.altered(expected)[:3]
    # It begins with none or one; the first question needs one.
    assert [count for _, count in watch.changes][-5:] == [1, 2, 1, 0, 1]

"""How vLLM's processes wait on CPUs, and which cores its threads get."""

from __future__ import annotations

import os
import time
from importlib.metadata import entry_points

import pytest

from rayswift.generate import vllm_plugin
from rayswift.generate.vllm_plugin import SWITCH, sleep_while_waiting


class Condition:
    """vLLM's class as far as the plugin needs it; ``written`` is when the other process writes."""

    def __init__(self, written_after: float) -> None:
        self.last_read, self.busy_loop_s = time.monotonic(), 1.0
        self.written = time.monotonic() + written_after
        self.looks, self.asked = 0, [-1]

    def wait(self, timeout_ms: int | None = None) -> None:
        self.asked.append(-1 if timeout_ms is None else timeout_ms)
        time.sleep(0.01)

    def record_read(self) -> None:
        self.last_read = time.monotonic()

    def read(self, timeout_ms: int | None = None) -> float:
        """Wait as vLLM does; the seconds by which the message was noticed late."""
        while time.monotonic() < self.written:
            self.looks += 1
            self.wait(timeout_ms)
        late = time.monotonic() - self.written
        self.record_read()
        return late


def condition(written_after: float) -> Condition:
    kind = type("Condition", (Condition,), {"wait": Condition.wait, "record_read": Condition.record_read})
    sleep_while_waiting(kind)
    return kind(written_after)


def test_a_wait_looks_a_few_times_and_adds_little() -> None:
    waiting = condition(0.2)
    waiting.read()
    assert waiting.looks < 300  # a poll without pauses looks a hundred thousand times
    assert waiting.asked == [-1]
    # A new wait begins with short pauses, however long the work between took.
    time.sleep(0.3)
    looks, waiting.written = waiting.looks, time.monotonic() + 0.01
    waiting.read()
    assert waiting.looks - looks > 5


def test_one_that_has_waited_long_is_woken_by_messages_and_still_looks_by_itself() -> None:
    waiting = condition(0.3)
    waiting.busy_loop_s = 0.1
    waiting.read(60_000)
    assert set(waiting.asked[1:]) == {vllm_plugin.IDLE_MS}
    waiting.written = time.monotonic() + 0.3
    waiting.read()
    assert waiting.asked[-1] == vllm_plugin.IDLE_MS


def test_vllm_finds_the_plugin_and_it_does_nothing_in_a_vllm_that_is_not_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    (found,) = (one for one in entry_points(group="vllm.general_plugins") if one.name == "rayswift")
    monkeypatch.delenv(SWITCH, raising=False)
    monkeypatch.delenv("VLLM_CPU_OMP_THREADS_BIND", raising=False)
    found.load()()
    assert "VLLM_CPU_OMP_THREADS_BIND" not in os.environ


def test_on_few_cores_the_engine_gets_them_all_unless_the_user_says_which(monkeypatch: pytest.MonkeyPatch) -> None:
    shm_broadcast = pytest.importorskip("vllm.distributed.device_communicators.shm_broadcast")
    kind = type("SpinCondition", (Condition,), {})
    monkeypatch.setattr(shm_broadcast, "SpinCondition", kind)
    monkeypatch.setenv(SWITCH, "1")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {3, 1})
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    vllm_plugin.register()
    assert os.environ["VLLM_CPU_OMP_THREADS_BIND"] == "nobind"
    monkeypatch.delenv("VLLM_CPU_OMP_THREADS_BIND")
    vllm_plugin.register()
    assert os.environ["VLLM_CPU_OMP_THREADS_BIND"] == "1,3"
    monkeypatch.delenv("VLLM_CPU_OMP_THREADS_BIND")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    vllm_plugin.register()
    assert "VLLM_CPU_OMP_THREADS_BIND" not in os.environ
    assert kind.began_waiting is None  # type: ignore[attr-defined]

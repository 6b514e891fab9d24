"""What ends a run early, or one of its checkpoints: SIGTERM, a machine that is taken away, a disk that is full."""

from __future__ import annotations

import errno
import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from pyarrow import fs
from safetensors import SafetensorError

from rayswift.errors import Terminated
from rayswift.train import stopping
from rayswift.train.checkpoints import manifest as checkpoints
from rayswift.train.checkpoints.store import CheckpointStore, no_room
from rayswift.train.events import EventQueue
from rayswift.train.loader import Rank
from rayswift.train.stopping import Notices, Wish, end_if_asked, saved_on_sigterm

FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


class Queue(EventQueue):
    """An event queue as workers see it, in this process."""

    def ask(self, name: str, *args: Any) -> Any:
        return getattr(self, name)(*args)

    tell = ask


# --- a full disk ------------------------------------------------------------------------------------------------


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> CheckpointStore:
    """Of one worker, with one whole checkpoint."""
    monkeypatch.setattr("ray.train.report", lambda *_, **__: None)
    args = SimpleNamespace(
        save=lambda path: Path(path).write_text("{}"), save_total_limit=1, create_checkpoint_symlink=True
    )
    data, schedule = SimpleNamespace(fingerprint="d"), SimpleNamespace(global_batch_size=1)
    config = SimpleNamespace(
        args=args, run_uri=str(tmp_path), events=Queue(), data=data, schedule=schedule, model_fingerprint="m"
    )
    store = CheckpointStore(config, Rank(0, 1), 0, 1)  # type: ignore[arg-type]
    assert store.save(at(2), writes(tmp_path / "checkpoint-2"))
    return store


def at(step: int) -> Any:
    """A trainer that has to write its files by itself."""
    state = SimpleNamespace(global_step=step, best_model_checkpoint=None, best_global_step=None)
    loader = SimpleNamespace(stream_places=lambda step: None)
    return SimpleNamespace(state=state, loader=loader, is_deepspeed_enabled=True)


def writes(folder: Path, error: Exception | None = None) -> Callable[[], None]:
    def write() -> None:
        folder.mkdir()
        (folder / "model.safetensors").write_bytes(b"x" * 1000)
        if error is not None:
            raise error

    return write


def whole(folder: Path) -> list[int]:
    return [found.step for found in checkpoints.list_checkpoints(fs.LocalFileSystem(), str(folder))]


@pytest.mark.parametrize("where", ["before", "write", "describe", "fsync", "manifest"])
def test_a_full_disk_costs_one_checkpoint_and_no_other(
    store: CheckpointStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    def fails(*_: Any, **__: Any) -> None:
        raise FULL

    with monkeypatch.context() as patched:
        if where == "before":  # as large as the last one is what there must be room for
            free = SimpleNamespace(free=store._size - 1)
            patched.setattr("rayswift.train.checkpoints.store.shutil.disk_usage", lambda path: free)
        elif where == "describe":
            patched.setattr(checkpoints.Position, "write", fails)
        elif where == "fsync":
            patched.setattr(checkpoints.os, "fsync", fails)
        elif where == "manifest":
            patched.setattr(checkpoints, "write_manifest", fails)
        error = FULL if where == "write" else None
        store.config.events.drain()
        assert not store.save(at(4), writes(tmp_path / "checkpoint-4", error))
    said = [event for event in store.config.events.drain() if event["event"] == "note"]
    assert [event["line"] for event in said] == [
        "checkpoint-4 was not saved (No space left on device); training goes on, the last whole checkpoint: "
        "checkpoint-2"
    ]
    assert whole(tmp_path) == [2]
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint-2", "last", "best"}
    assert store.save(at(6), writes(tmp_path / "checkpoint-6"))  # there is room again
    assert whole(tmp_path) == [6]
    assert os.readlink(tmp_path / "last") == "checkpoint-6"


def test_links_without_room_cost_nothing(
    store: CheckpointStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: Any) -> None:
        raise FULL

    monkeypatch.setattr("rayswift.train.checkpoints.store.os.symlink", fails)
    assert store.save(at(4), writes(tmp_path / "checkpoint-4"))
    assert whole(tmp_path) == [4]


def test_another_failure_ends_the_run(store: CheckpointStore, tmp_path: Path) -> None:
    for error in (OSError(errno.EACCES, "not allowed"), RuntimeError("a fault of the program"), ValueError("full")):
        with pytest.raises(type(error)):
            store.save(at(4), writes(tmp_path / f"checkpoint-{id(error)}", error))


def test_every_writer_says_that_a_disk_is_full() -> None:
    """As safetensors and torch say it, on the device that is always full."""
    for error in (FULL, OSError(errno.EDQUOT, ""), SafetensorError("I/O error: No space left on device (os error 28)")):
        assert no_room(error)
    if os.path.exists("/dev/full"):
        with pytest.raises(RuntimeError) as of_torch:
            torch.save({"a": torch.zeros(100_000)}, "/dev/full")
        assert no_room(of_torch.value) == "No space left on device"
        with pytest.raises(OSError, match="No space left") as of_python:
            Path("/dev/full").write_text("x")
        assert no_room(of_python.value)
    wrapped = RuntimeError("saving failed")
    wrapped.__cause__ = FULL
    assert no_room(wrapped) == "No space left on device"
    assert not no_room(KeyError("x"))


# --- SIGTERM, machines that go ------------------------------------------------------------------------------------


def test_a_worker_stops_when_the_driver_asks_and_saves_once_before_a_machine_goes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(stopping, "ASK_SECONDS", 0.01)
    going: list[Any] = [None]
    monkeypatch.setattr("ray.train.get_preemption_info", lambda: going[0])
    queue = Queue()
    notices = Notices(queue, Rank(0, 1))
    assert notices.wish() is Wish.NOTHING
    going[0] = SimpleNamespace(deadline_ms=1)
    assert [notices.wish() for _ in range(3)] == [Wish.SAVE, Wish.NOTHING, Wish.NOTHING]
    queue.tell("stop")
    assert notices._stopping.wait(20)
    assert [notices.wish() for _ in range(2)] == [Wish.STOP, Wish.STOP]


def terminate() -> None:
    os.kill(os.getpid(), signal.SIGTERM)
    threading.Event().wait(20)


def test_the_first_sigterm_asks_the_workers_and_the_second_ends_the_command(
    capsys: pytest.CaptureFixture[str],
) -> None:
    queue, before = Queue(), signal.getsignal(signal.SIGTERM)
    asked = threading.Event()

    class Asked(Queue):
        def stop(self) -> None:
            queue.stop()
            asked.set()

    def of_command(*_: Any) -> None:
        raise Terminated

    signal.signal(signal.SIGTERM, of_command)
    try:
        with saved_on_sigterm(Asked()) as ending:
            os.kill(os.getpid(), signal.SIGTERM)
            assert asked.wait(20)
            assert ending.asked and queue.is_stopping()
            with pytest.raises(Terminated):
                terminate()
        assert signal.getsignal(signal.SIGTERM) is of_command
        end_if_asked(ending, is_complete=True)
        with pytest.raises(Terminated):
            end_if_asked(ending, is_complete=False)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert capsys.readouterr().out.count("SIGTERM: the workers stop after this step and save it") == 1


def test_workers_that_take_too_long_are_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stopping, "GRACE_SECONDS", 0.1)
    before = signal.getsignal(signal.SIGTERM)

    def of_command(*_: Any) -> None:
        raise Terminated

    signal.signal(signal.SIGTERM, of_command)
    try:
        with pytest.raises(Terminated), saved_on_sigterm(Queue()):
            terminate()
    finally:
        signal.signal(signal.SIGTERM, before)


def lose_a_worker() -> None:
    os.kill(os.getpid(), signal.SIGTERM)
    raise RuntimeError("a worker was lost")


def test_workers_that_got_the_signal_too_end_the_run_the_same_way() -> None:
    """A whole process group, a service or a job of Slurm is ended: there is nobody left who could save."""
    before = signal.signal(signal.SIGTERM, lambda *_: None)
    try:
        with pytest.raises(RuntimeError, match="lost"), saved_on_sigterm(Queue()):
            raise RuntimeError("a worker was lost")
        with pytest.raises(Terminated), saved_on_sigterm(Queue()):
            lose_a_worker()
    finally:
        signal.signal(signal.SIGTERM, before)


def test_a_program_that_calls_rayswift_keeps_its_signals() -> None:
    before = signal.signal(signal.SIGTERM, signal.SIG_DFL)
    try:
        with saved_on_sigterm(Queue()):
            assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    finally:
        signal.signal(signal.SIGTERM, before)

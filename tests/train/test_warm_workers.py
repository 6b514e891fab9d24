"""Workers that import early, and the controller in the driver's process, on a real embedded Ray."""

from __future__ import annotations

import ast
import asyncio
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
from command_line import QUICK, distinct_rows, start, train_workers, wait_for


def fit(
    train_loop: Callable[..., Any],
    folder: Path,
    warm: list[Any],
    start_spares: Callable[[], list[Any]] = list,
    failures: int = 0,
) -> Any:
    """What rank 0 of a run returned."""
    from ray.train import FailureConfig, LoggingConfig, RunConfig, ScalingConfig

    from rayswift.train.start import torch_config
    from rayswift.train.start.lean_trainer import LeanTorchTrainer

    trainer = LeanTorchTrainer(
        train_loop,
        embedded=True,
        alone=True,
        warm=warm,
        start_spares=start_spares,
        train_loop_config={"folder": str(folder)},
        torch_config=torch_config("gloo", 1800, embedded=True),
        scaling_config=ScalingConfig(num_workers=1),
        run_config=RunConfig(
            storage_path=str(folder),
            logging_config=LoggingConfig(log_level="ERROR"),
            failure_config=FailureConfig(max_failures=failures),
        ),
    )
    return trainer.fit().return_value


# Made inside functions: Ray sends those by value, and its workers cannot import the tests.


def process_and_modules() -> Callable[[dict[str, Any]], tuple[int, bool, int]]:
    """What the loop returns: its process, whether that had imported the model, and how many the group's sum counts.
    What it listens on and what runs beside it is in files; all that workers wait for each other in works."""

    def loop(config: dict[str, Any]) -> tuple[int, bool, int]:
        import sys

        import ray.train.collective
        import torch

        ones = torch.ones(1)
        torch.distributed.all_reduce(ones)
        Path(config["folder"], "listening").write_text(repr(sorted(
            (found.laddr.ip, found.laddr.port) for found in psutil.Process().net_connections("inet")
            if found.status == psutil.CONN_LISTEN
        )))  # fmt: skip
        beside = [found.cmdline()[:1] for found in psutil.Process(os.getppid()).children()]
        Path(config["folder"], "beside").write_text(repr(beside))
        Path(config["folder"], "tunables").write_text(os.environ.get("GLIBC_TUNABLES", ""))
        ray.train.collective.barrier()
        assert ray.train.collective.broadcast_from_rank_zero({"a": 1}) == {"a": 1}
        ray.train.report({"step": 1})
        return os.getpid(), "transformers.models.llama.modeling_llama" in sys.modules, int(ones)

    return loop


def sleep_after_saying_so() -> Callable[[dict[str, Any]], None]:
    def loop(config: dict[str, Any]) -> None:
        import sys

        imported = "transformers.models.llama.modeling_llama" in sys.modules
        part = Path(config["folder"], "said.part")
        part.write_text(f"{os.getpid()} {imported}")
        part.rename(part.with_name("said"))
        time.sleep(600)

    return loop


@pytest.mark.slow
def test_a_run_begins_in_the_process_that_has_imported(ray_cluster: None, smollm2_dir: str, tmp_path: Path) -> None:
    import ray

    from rayswift.train.start.warm_workers import start_warm_workers

    warm = start_warm_workers(smollm2_dir, 1)
    pid = ray.get(warm[0].get_metadata.remote()).pid
    # Ray's own port is where the test's cluster listens; an embedded one is inside (tests/slow/test_sockets.py).
    ray_ports = {found.laddr.port for found in psutil.Process(pid).net_connections("inet")
                 if found.status == psutil.CONN_LISTEN}  # fmt: skip
    assert fit(process_and_modules(), tmp_path, warm) == (pid, True, 1)
    listening = ast.literal_eval((tmp_path / "listening").read_text())
    assert {ip for ip, port in listening if port not in ray_ports} <= {"127.0.0.1"}
    beside = (tmp_path / "beside").read_text()
    assert "RayTrainWorker" in beside
    assert "SynchronizationActor" not in beside
    assert "tcache_count=0" in (tmp_path / "tunables").read_text()


def test_a_notebook_leaves_the_controller_to_a_process_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer

    started: list[dict[str, Any]] = []

    def run_elsewhere(self: Any, **options: Any) -> Any:
        started.append(options)
        return SimpleNamespace(error=None, return_value=7)

    monkeypatch.setattr(DataParallelTrainer, "_initialize_and_run_controller", run_elsewhere)
    warm: list[Any] = [object()]

    async def cell() -> Any:
        return fit(process_and_modules(), tmp_path, warm)

    assert asyncio.run(cell()) == 7
    assert len(started) == 1
    assert warm == []  # they wait for a controller in this process


def test_a_worker_alone_joins_no_group_but_knows_which_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    from rayswift.train.start import torch_config
    from rayswift.train.start.local_group import join_group

    own = {"world_rank": 0, "world_size": 1, "local_rank": 0, "local_world_size": 1, "node_rank": 0}
    context = SimpleNamespace(**{f"get_{name}": lambda value=value: value for name, value in own.items()})
    monkeypatch.setattr("ray.train.get_context", lambda: context)
    monkeypatch.setattr("ray.train.torch.get_device", lambda: "cpu")
    monkeypatch.setattr(os, "environ", dict(os.environ))
    given: list[Any] = []
    group: Any = type("Group", (), {"__len__": lambda self: 1,
                                    "execute": lambda self, *args: given.append(args)})()  # fmt: skip
    for alone in (True, False):
        config = torch_config("gloo", 1800, embedded=True, alone=alone)
        config.backend_cls().on_start(group, config)
    assert [backend for _, _, backend, *_ in given] == [None, "gloo"]
    join, *args = given[0]
    assert join is join_group
    join(*args)
    assert not torch.distributed.is_initialized()
    assert (os.environ["RANK"], os.environ["WORLD_SIZE"], os.environ["ACCELERATE_TORCH_DEVICE"]) == ("0", "1", "cpu")


def test_a_worker_alone_waits_for_nobody(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """Ray Train's own groups, shared state and calls, with what stands in for their actor."""
    from ray.train.v2._internal.execution.checkpoint.sync_actor import SynchronizationActor
    from ray.train.v2._internal.execution.worker_group import state, worker_group

    from rayswift.train.start.alone import Alone, alone_in_group

    monkeypatch.setattr("ray.put", lambda value: [value])
    killed: list[Any] = []
    monkeypatch.setattr("ray.kill", killed.append)
    with alone_in_group():
        one: Any = worker_group.SynchronizationActor.options(label_selector={}).remote(timeout_s=1, warn_interval_s=1)
        assert type(one) is Alone
        group: Any = SimpleNamespace(_worker_group_state=SimpleNamespace(sync_actor=one))
        monkeypatch.setattr("ray.get", lambda found: found[0])
        required = worker_group.WorkerGroup.set_required_barrier_ranks
        assert [required(group, ranks) for ranks in (None, [0], [1], [])] == [True, True, False, False]
        assert one.broadcast_from_rank_zero.remote(world_rank=0, world_size=1, data="d", caller_method_name="") == ["d"]
        assert one.reset.remote() == [None]
        state._shutdown_sync_actor(one)
        assert killed == []
        state._shutdown_sync_actor("another's")
        assert killed == ["another's"]
    assert worker_group.SynchronizationActor is SynchronizationActor
    assert caplog.messages == []

    monkeypatch.setattr(SynchronizationActor.__ray_metadata__.modified_class, "wait", lambda self: None, raising=False)
    with alone_in_group():
        assert worker_group.SynchronizationActor is SynchronizationActor
    assert "one more process runs beside the worker" in caplog.text


@pytest.mark.slow
def test_a_notebook_trains_too(ray_cluster: None, tmp_path: Path) -> None:
    async def cell() -> Any:
        return fit(process_and_modules(), tmp_path, [])

    pid, *_ = asyncio.run(cell())
    assert pid != os.getpid()


@pytest.mark.slow
def test_a_process_that_died_early_is_replaced_and_ctrl_c_ends_the_run_and_its_workers(
    ray_cluster: None, smollm2_dir: str, tmp_path: Path
) -> None:
    import ray

    from rayswift.train.start.warm_workers import start_warm_workers

    warm = start_warm_workers(smollm2_dir, 1)
    ray.kill(warm[0])
    said = tmp_path / "said"

    def interrupt_when_it_runs() -> None:
        while not said.exists():
            time.sleep(0.1)
        time.sleep(0.5)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt_when_it_runs, daemon=True).start()
    with pytest.raises(KeyboardInterrupt):
        fit(sleep_after_saying_so(), tmp_path, warm)
    worker, imported = said.read_text().split()
    assert int(worker) != os.getpid()
    assert imported == "False"
    for _ in range(300):
        if not psutil.pid_exists(int(worker)) or psutil.Process(int(worker)).status() == psutil.STATUS_ZOMBIE:
            return
        time.sleep(0.1)
    pytest.fail(f"the worker {worker} still runs")


def die_three_times() -> Callable[[dict[str, Any]], list[bool]]:
    """What the loop returns: of each start whether its process had imported the model."""

    def loop(config: dict[str, Any]) -> list[bool]:
        import sys

        starts = Path(config["folder"], "starts")
        with starts.open("a") as file:
            file.write(f"{'transformers.models.llama.modeling_llama' in sys.modules}\n")
        found = starts.read_text().split()
        if len(found) < 4:
            time.sleep(1)  # the group has started
            os.kill(os.getpid(), signal.SIGKILL)
        return [one == "True" for one in found]

    return loop


@pytest.mark.slow
def test_lost_workers_are_replaced_by_warm_ones_and_the_next_time_one_waits(
    ray_cluster: None, smollm2_dir: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from rayswift.train.start import warm_workers

    warm = warm_workers.start_warm_workers(smollm2_dir, 1)
    counted: list[int] = []

    def spares() -> list[Any]:
        counted.append(len(warm))
        return warm_workers.start_spares(smollm2_dir, 1)

    assert fit(die_three_times(), tmp_path, warm, spares, failures=3) == [True, True, True, True]
    assert counted == [0, 0, 0, 0]  # one at a time, and at the first loss one that is wanted at once
    assert warm == []
    monkeypatch.setattr(warm_workers, "free_bytes", lambda: warm_workers.SPARE_BYTES)
    assert warm_workers.start_spares(smollm2_dir, 1) == []


@pytest.mark.slow
def test_beside_one_training_worker_runs_nothing_that_only_idles(tiny_dir: str, tmp_path: Path) -> None:
    """Of Ray's Python processes each wakes a hundred times a second."""
    data = distinct_rows(tmp_path / "rows.jsonl", 64)
    log = tmp_path / "log"
    process = start("sft", "--model", tiny_dir, "--dataset", str(data), *QUICK, "--max_steps", "100000",
                    "--use_gpu", "false", "--output_dir", str(tmp_path / "out"), log=log)  # fmt: skip
    try:
        wait_for(lambda: "'loss'" in log.read_text(errors="replace"), 300, "the first step")
        running = [one.cmdline() for one in psutil.Process(process.pid).children(recursive=True)]
        (worker,) = train_workers(process.pid)
        threads = [path.read_text().strip() for path in Path(f"/proc/{worker.pid}/task").glob("*/comm")]
        assert not [name for name in threads if "gloo" in name]
        names = sorted(words[0].removeprefix("ray::") for words in running if words and words[0].startswith("ray::"))
        assert names == ["RayTrainWorker", "RuntimeEnvAgent"]
        others = [one for one in running if one and not one[0].startswith("ray::")]
        assert len(others) == 3, others  # of Ray: the control service, the raylet, what the raylet has to watch
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(60)
    assert "Traceback" not in log.read_text()
    assert "rayswift.train" not in log.read_text()  # of a logger: something moved

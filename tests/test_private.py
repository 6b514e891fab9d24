"""Every part that Ray, vLLM, PEFT, PyTorch and TRL promise to nobody is where the code looks for it, and what does not
stop a command has a way without it. Run after an upgrade: it says in seconds what moved."""

from __future__ import annotations

import ast
import asyncio
import functools
import importlib.util
import inspect
import json
import logging
import os
import pickle
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pytest
import yaml
from pyarrow import fs

from rayswift import private
from rayswift.cluster import idle


@pytest.fixture(autouse=True)
def _every_report_is_said() -> Iterator[None]:
    private.report.cache_clear()
    yield
    private.report.cache_clear()


def methods(package: str, file: str, kind: str) -> dict[str, list[str]]:
    """The methods of a class and their arguments, read from its text: importing vLLM or TRL takes long."""
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        pytest.skip(f"{package} is not installed")
    tree = ast.parse(Path(spec.submodule_search_locations[0], file).read_text(encoding="utf-8"))
    found = next(node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == kind)
    return {
        node.name: [one.arg for one in (*node.args.args, *node.args.kwonlyargs)]
        for node in found.body
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    }


# --- Ray -----------------------------------------------------------------------------------------------------------


def test_the_dashboard_is_asked_by_its_client(monkeypatch: pytest.MonkeyPatch) -> None:
    from ray.job_submission import JobSubmissionClient

    asked: list[Any] = []

    def answer(method: str, url: str, **more: Any) -> SimpleNamespace:
        asked.append((method, url, more["params"]))
        return SimpleNamespace(status_code=200 if "serve" in url else 404, content=b"{}", text="")

    monkeypatch.setattr("ray.dashboard.modules.dashboard_sdk.requests.request", answer)
    client = JobSubmissionClient.__new__(JobSubmissionClient)
    client._address, client._cookies, client._headers, client._verify = "http://h", None, {}, None
    assert private.dashboard_get(client, "/api/serve/applications/", lines=3) == b"{}"
    assert private.dashboard_get(client, "/nowhere") == b""
    assert asked[0] == ("GET", "http://h/api/serve/applications/", {"lines": 3})
    with pytest.raises(private.NotAvailable):
        private.dashboard_get(object(), "/")


def test_rays_folder_of_this_node(monkeypatch: pytest.MonkeyPatch) -> None:
    import ray._private.worker

    node = SimpleNamespace(get_session_dir_path=lambda: "/tmp/ray/session_1")
    monkeypatch.setattr(ray._private.worker, "_global_node", node)
    assert private.session_folder() == "/tmp/ray/session_1"
    monkeypatch.setattr(ray._private.worker, "_global_node", None)
    assert private.session_folder() == "/tmp"


def test_a_small_ray_replaces_three_starts_and_one_constant_and_puts_them_back(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from ray._private import ray_constants
    from ray._private.node import Node

    monkeypatch.delenv("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", raising=False)
    before = Node.start_monitor, Node.start_log_monitor, Node.start_api_server, ray_constants.ENABLE_RAY_CLUSTER
    with private.small_ray():
        assert Node.start_monitor is not before[0]
        assert Node.start_log_monitor is not before[1]
        assert Node.start_api_server is not before[2]
        assert ray_constants.ENABLE_RAY_CLUSTER is False
        assert os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] == "0"
    assert (
        Node.start_monitor, Node.start_log_monitor, Node.start_api_server, ray_constants.ENABLE_RAY_CLUSTER
    ) == before  # fmt: skip
    assert "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER" not in os.environ
    assert caplog.messages == []


def test_a_small_ray_has_no_agent_of_the_dashboard(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The raylet's command: what it runs instead ends with the raylet, and who waits for the agent's ports hears of
    none."""
    from ray._private import services

    started: list[list[str]] = []
    monkeypatch.setattr(services, "start_ray_process", lambda command, *_, **__: started.append(command))
    node = "0f" * 28
    agent, *words = ["--dashboard_agent_command=python agent.py", f"--session_dir={tmp_path}", f"--node_id={node}"]
    with private.small_ray():
        services.start_ray_process(["raylet", agent, *words], "raylet", fate_share=True)
        services.start_ray_process(["gcs"], "gcs_server", fate_share=True)
    (_, instead, *others), gcs = started
    assert (others, gcs) == (words, ["gcs"])
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {
        f"{name}_{node}": "-1" for name in ("metrics_agent_port", "metrics_export_port", "dashboard_agent_listen_port")
    }
    python, _, file = shlex.split(instead.removeprefix("--dashboard_agent_command="))
    assert (python, file) == (sys.executable, idle.__file__)
    parents, slept = iter([7, 7, 7, 1]), list[float]()
    monkeypatch.setattr(idle, "os", SimpleNamespace(getppid=lambda: next(parents)))
    monkeypatch.setattr(idle, "time", SimpleNamespace(sleep=slept.append))
    idle.wait_for_parent()
    assert slept == [idle.SECONDS] * 2
    monkeypatch.setattr(idle, "os", SimpleNamespace(getppid=lambda: 1))  # gone before this one began
    idle.wait_for_parent()

    monkeypatch.delattr("ray._raylet.persist_port")
    with private.small_ray():
        services.start_ray_process(["raylet", agent, *words], "raylet", fate_share=True)
    assert started[-1] == ["raylet", agent, *words]
    assert "an agent of its dashboard runs beside the work" in caplog.text


def test_rays_list_of_the_files_of_a_job_and_its_variable_are_there(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / ".gitignore").write_text("left.txt\n")
    for name in ("left.txt", "sent.txt"):
        (tmp_path / name).write_text("1234")
    assert private.job_package(str(tmp_path)) == ({".gitignore": 9 + 76 + 20, "sent.txt": 4 + 76 + 16}, 100 * 2**20)
    assert not private.in_ray_job()
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
    assert private.in_ray_job()
    assert caplog.messages == []
    monkeypatch.delattr("ray._private.runtime_env.packaging._dir_travel")
    assert private.job_package(str(tmp_path)) is None
    assert "they are sent without a look at them" in caplog.text


def test_all_addresses_when_the_user_asks_for_them(monkeypatch: pytest.MonkeyPatch) -> None:
    from ray._private import ray_constants

    monkeypatch.setenv("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "1")
    before = ray_constants.ENABLE_RAY_CLUSTER
    with private.small_ray():
        assert before == ray_constants.ENABLE_RAY_CLUSTER
    assert os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] == "1"


def test_ray_starts_when_a_helper_process_has_another_name(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from ray._private.node import Node

    before = Node.start_api_server
    monkeypatch.delattr(Node, "start_monitor")
    with private.small_ray():
        assert Node.start_api_server is not before
    with private.small_ray():
        pass
    (line,) = caplog.messages
    assert line == (
        "Ray's start_monitor is not as in the version this program was made for: Ray starts some seconds later"
    )


def test_it_is_said_when_ray_may_listen_everywhere(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from ray._private import ray_constants

    monkeypatch.delattr(ray_constants, "ENABLE_RAY_CLUSTER")
    monkeypatch.delenv("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", raising=False)
    with private.small_ray():
        pass
    (line,) = caplog.messages
    assert "set RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER=0 before this command, or Ray listens on all addresses" in line


def test_what_the_autoscaler_may_start_is_read_where_it_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Ray's own process for it, started with a file by a path of its own folder; another cluster's is another's."""
    types = {"head": {"resources": {"CPU": 8}}, "a100": {"resources": {"GPU": 8, "CPU": 96}, "max_workers": 4},
             "data": {"resources": {"CPU": 32}}, "spot": {"resources": {"GPU": 8}, "max_workers": 0}}  # fmt: skip
    config = {"available_node_types": types, "head_node_type": "head", "max_workers": 6}
    (tmp_path / "cluster.yaml").write_text(json.dumps(config))
    words = ["--gcs-address=10.0.0.1:6379", "--autoscaling-config=cluster.yaml"]
    with subprocess.Popen([sys.executable, "-c", "input()", *words], stdin=subprocess.PIPE, cwd=tmp_path) as monitor:
        assert private.autoscaling_config_here("10.0.0.2:6379") == {}
        assert private.autoscaling_config_here("10.0.0.1:6379") == config
        monitor.communicate(b"\n")
    assert private.autoscaling_config_here("10.0.0.1:6379") == {}

    monkeypatch.setattr("ray.get_runtime_context", lambda: SimpleNamespace(gcs_address="a"))
    monkeypatch.setattr(private, "autoscaling_config", lambda _: config)
    assert private.autoscaler_types() == [("a100", {"GPU": 8, "CPU": 96}, 4), ("data", {"CPU": 32}, 6)]
    assert private.autoscaler_limits() == {"GPU": 32, "CPU": 4 * 96 + 6 * 32}
    monkeypatch.undo()
    monkeypatch.setattr("ray.nodes", lambda: [])
    private.autoscaling_config.cache_clear()
    assert private.autoscaling_config("a") == {}
    assert "only nodes that run already are counted" in caplog.text


@pytest.mark.parametrize("autoscaling", [True, False])
def test_what_kuberays_autoscaler_may_start_is_read_of_its_resource(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, autoscaling: bool
) -> None:
    """Of the repository's own manifest, in place of the API of Kubernetes."""
    from ray.autoscaler._private.kuberay.node_provider import KubernetesHttpApiClient

    manifest = yaml.safe_load((Path(__file__).resolve().parents[1] / "cluster/kuberay/raycluster.yaml").read_text())
    manifest["metadata"]["namespace"] = "here"
    manifest["spec"]["enableInTreeAutoscaling"] = autoscaling
    asked: list[str] = []
    monkeypatch.setattr(KubernetesHttpApiClient, "get", lambda self, path: asked.append(path) or manifest)
    monkeypatch.setenv("RAY_CLUSTER_NAME", "rayswift")
    (tmp_path / "namespace").write_text("here")
    monkeypatch.setattr(private, "_POD_NAMESPACE", tmp_path / "namespace")
    found = private.autoscaling_config_here("none")
    assert asked == ["rayclusters/rayswift"]
    assert bool(found) == autoscaling
    if autoscaling:
        train = found["available_node_types"]["train"]
        assert (train["max_workers"], train["resources"]["GPU"], train["resources"]["CPU"]) == (4, 8, 96)


def test_what_a_job_waits_for_is_read(
    ray_cluster: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    import ray
    from ray._private import state
    from ray.util.placement_group import placement_group, remove_placement_group

    before = private.own_groups()
    groups = [placement_group([{"CPU": amount}]) for amount in (0.01, 100)]
    groups[0].wait(30)
    assert sorted(private.own_groups()) == sorted([*before, False, True])
    for group in groups:
        remove_placement_group(group)
    assert private.own_groups() == before
    node = ray.get_runtime_context().get_node_id()
    assert private.free_resources()[node]["CPU"] > 0
    assert private.starting_nodes() == {}
    assert caplog.messages == []

    monkeypatch.delattr(type(state.state), "_connect_and_get_accessor")
    monkeypatch.delattr(state, "available_resources_per_node")
    monkeypatch.setattr("ray.available_resources", lambda: {"CPU": 2.0})
    monkeypatch.delattr("ray.autoscaler.v2.sdk.get_cluster_status")
    assert private.own_groups() == [True]
    assert private.free_resources() == {"": {"CPU": 2.0}}
    assert private.starting_nodes() == {}
    assert len(caplog.messages) == 3


def test_blocks_come_by_reference_and_without_that_as_copies(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    assert methods("ray", "data/dataset.py", "Dataset")["iter_internal_ref_bundles"] == ["self"]
    bundle = SimpleNamespace(blocks=[SimpleNamespace(ref="ref", metadata=SimpleNamespace(size_bytes=None))])
    assert list(private.iter_block_refs(SimpleNamespace(iter_internal_ref_bundles=lambda: [bundle]))) == [("ref", 0)]
    assert caplog.messages == []

    import ray

    monkeypatch.setattr(ray, "put", lambda table: ("put", table))
    table = pa.table({"x": [1, 2]})
    dataset = SimpleNamespace(iter_batches=lambda batch_size, batch_format: iter([table]))
    assert list(private.iter_block_refs(dataset)) == [(("put", table), table.nbytes)]
    assert len(caplog.messages) == 1


# --- Ray Train -----------------------------------------------------------------------------------------------------


def test_ray_train_is_as_the_lean_trainer_needs_it() -> None:
    from ray.train.v2._internal import constants
    from ray.train.v2._internal.callbacks import DatasetsCallback
    from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
    from ray.train.v2._internal.execution.checkpoint.checkpoint_manager import CheckpointManager

    private.check_ray_train()
    assert DatasetsCallback
    assert PlacementGroupCleanerCallback
    assert constants.METRICS_ENABLED_ENV_VAR == "RAY_TRAIN_METRICS_ENABLED"
    assert constants.ENABLE_PREEMPTION_WATCHER_ENV_VAR == "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER"
    assert "checkpoint_manager_snapshot.json" in inspect.getsource(inspect.getmodule(CheckpointManager)) or (
        constants.CHECKPOINT_MANAGER_SNAPSHOT_FILENAME == "checkpoint_manager_snapshot.json"
    )


def test_the_quiet_switches_are_off_again_and_the_users_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_TRAIN_METRICS_ENABLED", raising=False)
    monkeypatch.setenv("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "1")
    with private.quiet_train():
        assert os.environ["RAY_TRAIN_METRICS_ENABLED"] == "0"
        assert os.environ["RAY_TRAIN_ENABLE_PREEMPTION_WATCHER"] == "1"
    assert "RAY_TRAIN_METRICS_ENABLED" not in os.environ
    assert os.environ["RAY_TRAIN_ENABLE_PREEMPTION_WATCHER"] == "1"


@pytest.mark.parametrize("moved", ["name", "arguments", "method"])
def test_another_ray_train_starts_plainly_with_one_line(
    moved: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    from ray.train import RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer
    from ray.train.v2._internal.execution.worker_group import WorkerGroup
    from ray.train.v2._internal.execution.worker_group.worker import RayTrainWorker

    from rayswift.train.start import make_trainer, torch_config

    if moved == "name":
        monkeypatch.delattr(WorkerGroup, "_create_workers")
    elif moved == "arguments":
        monkeypatch.setattr(WorkerGroup, "_init_train_context_on_workers", lambda self, workers: None)
    else:
        monkeypatch.setattr(RayTrainWorker, "a_new_one", lambda self: None, raising=False)
    warm = [object()]
    trainer = make_trainer(
        lambda: None, embedded=True, alone=True, warm=warm, torch_config=torch_config("gloo", 60, embedded=True),
        scaling_config=ScalingConfig(num_workers=1), run_config=RunConfig(storage_path=str(tmp_path)),
    )  # fmt: skip
    assert type(trainer) is TorchTrainer
    assert warm == []
    (line,) = caplog.messages
    assert "training starts some seconds later" in line


def test_a_controller_that_cannot_be_built_here_runs_as_an_actor(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    from ray.train import RunConfig, ScalingConfig
    from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer

    from rayswift.train.start import lean_trainer, make_trainer, torch_config

    def _as_an_actor(self: DataParallelTrainer, **controller_init_kwargs: Any) -> list[str]:
        return sorted(controller_init_kwargs)

    def refuse(*_: Any, **__: Any) -> None:
        raise TypeError("unexpected keyword argument 'run_id'")

    monkeypatch.setattr(lean_trainer, "_ControllerHere", refuse)
    monkeypatch.setattr(DataParallelTrainer, "_initialize_and_run_controller", _as_an_actor)
    trainer = make_trainer(
        lambda: None, embedded=True, alone=True, warm=[], torch_config=torch_config("gloo", 60, embedded=True),
        scaling_config=ScalingConfig(num_workers=1), run_config=RunConfig(storage_path=str(tmp_path)),
    )  # fmt: skip
    given = trainer._initialize_and_run_controller(scaling_policy=None, run_id=1)
    assert given == ["failure_policy", "run_id", "scaling_policy"]
    (line,) = caplog.messages
    assert "training starts some seconds later (unexpected keyword argument 'run_id')" in line


def test_ray_trains_snapshot_is_forgotten(tmp_path: Path) -> None:
    (tmp_path / "checkpoint_manager_snapshot.json").write_text("{}")
    for _ in range(2):
        private.forget_train_snapshot(fs.LocalFileSystem(), str(tmp_path))
    assert list(tmp_path.iterdir()) == []


def test_trl_has_the_hooks_that_preference_training_replaces() -> None:
    found = methods("trl", "trainer/dpo_trainer.py", "DPOTrainer")
    assert found["_compute_loss"][:4] == ["self", "model", "inputs", "return_outputs"]
    assert found["_prepare_dataset"][:2] == ["self", "dataset"]
    base = methods("transformers", "trainer.py", "Trainer")
    assert base["_save_checkpoint"] == ["self", "model", "trial"]
    assert base["get_batch_samples"] == ["self", "epoch_iterator", "num_batches", "device"]


# --- Ray Serve -----------------------------------------------------------------------------------------------------


def test_transformers_peft_and_uvicorn_have_what_our_classes_replace_or_read() -> None:
    """Subclasses of theirs (`train/trainers`, `serve/connections.py`), and LoRA's layer (`train/fused_lora.py`)."""
    import torch
    from peft import LoraConfig, get_peft_model
    from peft.tuners.lora import Linear
    from transformers import Trainer
    from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

    names = {"_save", "_save_checkpoint", "_load_from_checkpoint", "_load_best_model", "_determine_best_metric",
             "_get_num_items_in_batch", "get_batch_samples", "_save_optimizer_and_scheduler",
             "_prepare_for_training"}  # fmt: skip
    assert names <= vars(Trainer).keys()
    names = {"connection_made", "connection_lost", "data_received", "on_message_begin", "on_headers_complete"}
    assert names <= vars(HttpToolsProtocol).keys()
    assert {"config", "server_state", "app_state", "_loop"} <= set(inspect.signature(HttpToolsProtocol).parameters)
    layer = get_peft_model(
        torch.nn.Sequential(torch.nn.Linear(2, 2)), LoraConfig(target_modules=["0"])
    ).base_model.model[0]
    assert type(layer) is Linear
    read = ("lora_A", "lora_B", "lora_dropout", "lora_variant", "scaling", "active_adapters", "disable_adapters",
            "merged", "fan_in_fan_out", "base_layer")  # fmt: skip
    assert [name for name in read if not hasattr(layer, name)] == []


@pytest.mark.parametrize(("host", "opened"), [("127.0.0.1", "127.0.0.1:0"), ("fd00::1", "[fd00::1]:0")])
@pytest.mark.parametrize("address", ["[::]:0", "0.0.0.0:0"])
def test_a_replicas_port_is_opened_at_the_nodes_address(
    host: str, opened: str, address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ray.serve._private import replica

    asked: list[str] = []
    assert callable(replica.add_port_to_grpc_server)
    assert "add_port_to_grpc_server(self._server, " in inspect.getsource(replica)
    monkeypatch.setattr(replica, "add_port_to_grpc_server", lambda server, where: asked.append(where) or 5000)
    private.bind_replica_ports(host)
    assert replica.add_port_to_grpc_server(object(), address) == 5000
    assert asked == [opened]


def test_a_replica_whose_port_would_be_open_does_not_start(monkeypatch: pytest.MonkeyPatch) -> None:
    from ray.serve._private import replica

    monkeypatch.delattr(replica, "add_port_to_grpc_server")
    with pytest.raises(private.NotAvailable, match="Ray Serve's add_port_to_grpc_server is not as in the version"):
        private.bind_replica_ports("127.0.0.1")


def test_serves_client_takes_a_whole_configuration(monkeypatch: pytest.MonkeyPatch) -> None:
    from ray.serve import context
    from ray.serve._private.client import ServeControllerClient

    assert callable(context._get_global_client)
    assert callable(ServeControllerClient.get_serve_details)
    assert next(iter(inspect.signature(ServeControllerClient.deploy_apps).parameters)) == "self"
    others = {"name": "other", "route_prefix": "/other", "import_path": "a:b"}
    details = {"ours": {"name": "ours", "deployed_app_config": {"name": "ours", "import_path": "c:d"}},
               "other": {"name": "other", "deployed_app_config": others},
               "run": {"name": "run", "deployed_app_config": None}}  # fmt: skip
    sent: list[Any] = []
    client = SimpleNamespace(get_serve_details=lambda: {"applications": details}, deploy_apps=sent.append)
    monkeypatch.setattr(context, "_get_global_client", lambda: client)
    private.replace_applications({"applications": [{"name": "ours", "import_path": "e:f"}]})
    assert [(app.name, app.import_path) for app in sent[0].applications] == [("ours", "e:f"), ("other", "a:b")]
    monkeypatch.delattr(context, "_get_global_client")
    with pytest.raises(private.NotAvailable, match="Ray Serve's client"):
        private.replace_applications({"applications": []})


# --- vLLM, and Ray's server of it ----------------------------------------------------------------------------------


def test_vllm_is_as_its_patches_need_it() -> None:
    waits = methods("vllm", "distributed/device_communicators/shm_broadcast.py", "SpinCondition")
    assert waits["wait"] == ["self", "timeout_ms"]
    assert waits["record_read"] == ["self"]
    rendering = methods("vllm", "renderers/online_renderer.py", "OnlineRenderer")
    assert rendering["preprocess_chat"][:3] == ["self", "request", "messages"]
    assert methods("vllm", "renderers/base.py", "BaseRenderer")["render_messages_async"] == [
        "self", "messages", "params"
    ]  # fmt: skip
    chat = methods("vllm", "entrypoints/openai/chat_completion/serving.py", "OpenAIServingChat")
    assert chat["_create_chat_logprobs"][:3] == ["self", "token_ids", "top_logprobs"]
    completion = methods("vllm", "entrypoints/openai/completion/serving.py", "OpenAIServingCompletion")
    assert completion["_create_completion_logprobs"] == [
        "self", "token_ids", "top_logprobs", "num_output_top_logprobs", "tokenizer", "logprob_token_ids",
        "initial_text_offset", "return_as_token_id",
    ]  # fmt: skip
    base = methods("vllm", "entrypoints/generate/base/serving.py", "GenerateBaseServing")
    assert base["_get_decoded_token"][:3] == ["logprob", "token_id", "tokenizer"]


def test_rays_server_of_vllm_is_as_the_replica_needs_it() -> None:
    engine = methods("ray", "llm/_internal/serve/engines/vllm/vllm_engine.py", "VLLMEngine")
    assert engine["build_asgi_app"] == ["self"]
    assert engine["resolve_lora"] == ["self", "disk_lora_model"]
    spec = importlib.util.find_spec("ray")
    assert spec is not None and spec.submodule_search_locations
    folder = Path(spec.submodule_search_locations[0], "llm/_internal")
    text = (folder / "serve/engines/vllm/vllm_engine.py").read_text()
    assert "self._engine_client = " in text
    assert "self._oai_models = " in text
    assert (
        "push_telemetry_report_for_all_models(all_models=" in (folder / "serve/core/server/llm_server.py").read_text()
    )
    assert "class DiskMultiplexConfig" in (folder / "serve/core/configs/llm_config.py").read_text()
    assert methods("ray", "llm/_internal/batch/processor/base.py", "Processor")["get_stage_by_name"] == ["self", "name"]
    assert "vLLMEngineStage" in (folder / "batch/stages/vllm_engine_stage.py").read_text()


def test_another_spin_condition_is_left_alone(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    import sys

    name = "vllm.distributed.device_communicators.shm_broadcast"

    class Other:
        def wait(self, timeout: float) -> None: ...
        def record_read(self) -> None: ...

    for part in ("vllm", "vllm.distributed", "vllm.distributed.device_communicators"):
        monkeypatch.setitem(sys.modules, part, SimpleNamespace())
    monkeypatch.setitem(sys.modules, name, SimpleNamespace(SpinCondition=Other))
    assert private.spin_condition() is None
    monkeypatch.setitem(sys.modules, name, SimpleNamespace())
    assert private.spin_condition() is None
    (line,) = caplog.messages
    assert "engines on CPUs are up to a half slower" in line


def test_blocks_are_asked_again_where_the_stage_is_known(caplog: pytest.LogCaptureFixture) -> None:
    stage = SimpleNamespace(map_batches_kwargs={})
    private.retry_engine_blocks(SimpleNamespace(get_stage_by_name=lambda name: stage), 3)
    assert stage.map_batches_kwargs == {"max_task_retries": 3}
    private.retry_engine_blocks(SimpleNamespace(), 3)
    assert len(caplog.messages) == 1


def test_a_replica_says_in_one_line_what_it_misses() -> None:
    for call in (
        lambda: private.engine_client(SimpleNamespace(engine=object())),
        lambda: private.rendering(SimpleNamespace(renderer=object())),
        lambda: asyncio.run(private.openai_app(SimpleNamespace(engine=object()))),
        lambda: private.adapters_by_name(SimpleNamespace(engine=object())),
        lambda: private.name_adapters(SimpleNamespace(engine=object()), str),
    ):
        with pytest.raises(private.NotAvailable, match="is not as in the version this program was made for") as caught:
            call()
        assert "\n" not in str(caught.value)


# --- PyTorch and PEFT ----------------------------------------------------------------------------------------------


def test_pytorch_knows_the_cpus_bfloat16_and_without_that_its_instructions(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    supported = torch.ops.mkldnn._is_mkldnn_bf16_supported()
    assert private.cpu_has_bfloat16() == supported

    def no_file(*_: Any) -> None:
        raise FileNotFoundError

    monkeypatch.setattr(private, "open", no_file, raising=False)  # where there is no /proc
    assert private.cpu_has_bfloat16() == supported
    monkeypatch.setattr(torch.ops, "mkldnn", SimpleNamespace())
    for capability, expected in (("AVX512", True), ("AVX2", False), ("NO AVX", False)):
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda capability=capability: capability)
        assert private.cpu_has_bfloat16() is expected


def test_pickles_give_tensors_and_deepspeeds_classes_and_run_nothing(tmp_path: Path) -> None:
    import torch
    from deepspeed.runtime.fp16.loss_scaler import LossScaler

    before = dict(os.environ)
    torch.save({"loss_scaler": LossScaler(4.0), "x": torch.ones(2)}, tmp_path / "plain.pt")
    torch.save(functools.partial(print, "ran"), tmp_path / "code.pt")
    with private.no_pickled_code():
        assert torch.load(tmp_path / "plain.pt", weights_only=False)["loss_scaler"].cur_scale == 4.0
        with pytest.raises(pickle.UnpicklingError):
            torch.load(tmp_path / "code.pt", weights_only=False)
    assert dict(os.environ) == before


def test_deepspeeds_zero_has_what_its_checkpoints_read_and_write() -> None:
    from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
    from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
    from deepspeed.utils.tensor_fragment import tensor_fragment

    both = {"load_state_dict", "state_dict", "param_names", "elastic_checkpoint", "dp_process_group"}
    names = {
        DeepSpeedZeroOptimizer: {*both, "bit16_groups", "single_partition_of_fp32_groups", "update_lp_params"},
        DeepSpeedZeroOptimizer_Stage3: {
            *both, "fp16_groups", "fp32_partitioned_groups_flat", "_get_param_partition_rank",
            "swap_optimizer", "params_in_nvme_and_cpu", "checkpoint_event_prologue", "checkpoint_event_epilogue",
        },
    }  # fmt: skip
    assert {kind.__name__ for kind in names} == private._ZERO_STATE.keys()
    for kind, wanted in names.items():
        source = Path(inspect.getfile(kind)).read_text(encoding="utf-8")
        assert [name for name in wanted if f"self.{name} " not in source and name not in vars(kind)] == []
    assert "update_lp_params" not in vars(DeepSpeedZeroOptimizer_Stage3)  # called where it is
    assert {"lp_fragment_address", "hp_fragment_address"} <= tensor_fragment.__dataclass_fields__.keys()


def test_another_zero_is_left_to_deepspeed(caplog: pytest.LogCaptureFixture) -> None:
    class DeepSpeedZeroOptimizer(SimpleNamespace):
        pass

    def layout(zero: Any) -> Any:
        return private.zero_layout(SimpleNamespace(optimizer=zero, has_moe_layers=False))

    assert layout(SimpleNamespace()) is None
    assert caplog.records == []
    assert layout(DeepSpeedZeroOptimizer(param_names={}, elastic_checkpoint=False, bit16_groups=[])) == ([], {})
    assert layout(DeepSpeedZeroOptimizer(param_names={}, elastic_checkpoint=False)) is None
    (record,) = caplog.records
    assert "DeepSpeed's ZeRO optimiser is not as in the version" in record.getMessage()


def test_pefts_rules_for_names() -> None:
    targets = private.lora_targets(["q_proj"])
    assert targets("model.layers.0.self_attn.q_proj")
    assert not targets("model.layers.0.self_attn.k_proj")
    assert private.lora_targets(r".*\.k_proj")("model.layers.0.self_attn.k_proj")
    assert private.lora_pattern(["layers.0.q_proj"], "model.layers.0.q_proj") == "layers.0.q_proj"
    assert private.lora_pattern(["v_proj"], "model.layers.0.q_proj") == "model.layers.0.q_proj"


def test_masks_of_padded_rows_are_those_that_are_asked_for() -> None:
    """And joined rows are kept apart by a mask where they need one, else not; afterwards all is as before."""
    import torch
    from transformers import masking_utils

    before = dict(vars(masking_utils))
    config = SimpleNamespace(_attn_implementation="sdpa", get_text_config=lambda **_: config)
    joined = torch.tensor([[0, 1, 2, 0, 1]])

    def mask(padding: Any, positions: Any) -> Any:
        inputs = {"inputs_embeds": torch.zeros(1, 5, 4), "attention_mask": padding, "past_key_values": None}
        return masking_utils.create_causal_mask(config=config, **inputs, position_ids=positions)

    padding = torch.tensor([[1, 1, 1, 0, 0]])
    wanted = mask(padding, None), mask(None, joined)
    assert wanted[1] is not None
    with private.no_mask_questions(rows_by_mask=True):
        assert torch.equal(mask(padding, None), wanted[0])
        assert torch.equal(mask(None, joined), wanted[1])
    with private.no_mask_questions(rows_by_mask=False):
        assert torch.equal(mask(padding, None), wanted[0])
        assert mask(None, joined) is None
    assert dict(vars(masking_utils)) == before


def test_the_report_is_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    private.report("a", "b")
    assert [record.levelno for record in caplog.records] == [logging.WARNING]

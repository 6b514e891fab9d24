"""What RaySwift takes of Ray, vLLM, PEFT and PyTorch that they promise to nobody: internal, underscored, undocumented.

Each part is one function here. Where there is another way, a part that moved costs one warning and some time; where
there is none, :class:`NotAvailable` says in one line what is missing. ``tests/test_private.py`` touches them all in
seconds: run it first after an upgrade. Not here: the two classes that stand in for parts of Ray Train's controller
(``train/start``, guarded by :func:`check_ray_train`) and TRL's trainer (``train/trainers/dpo.py``).
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import logging
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, cast

from rayswift.errors import RunFailedError, one_line

logger = logging.getLogger("rayswift.private")

#: What a part that is gone, or has other arguments, ends with.
MOVED = (ImportError, AttributeError, TypeError, KeyError)


class NotAvailable(RunFailedError):
    """A part that nothing replaces is not where this version of RaySwift knows it."""


@functools.cache
def report(part: str, instead: str) -> None:
    """Say once in this process that a part moved, and what happens instead."""
    logger.warning("%s is not as in the version this program was made for: %s", part, instead)


@contextlib.contextmanager
def needed(part: str) -> Iterator[None]:
    """Raises NotAvailable where the block does not find what it looks for."""
    try:
        yield
    except MOVED as error:
        raise NotAvailable(f"{part} is not as in the version this program was made for: {one_line(error)}") from error


# --- Ray ----------------------------------------------------------------------------------------------------------

#: Where Kubernetes tells a container its namespace.
_POD_NAMESPACE = Path("/var/run/secrets/kubernetes.io/serviceaccount/namespace")
_CLUSTER_VARIABLE = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"


@contextlib.contextmanager
def small_ray() -> Iterator[None]:
    """A Ray that starts here is for this process: on 127.0.0.1 alone, and without the processes that serve others.

    Those count usage (switched off), follow log files (for drivers that print them), watch a cluster's size and tell a
    dashboard: four imports of Ray that would compete with the work. The variable is Ray's for Windows and macOS, where
    no other node joins a Ray; ``1`` in the environment keeps all interfaces. Ray reads it once, when it is imported.
    """
    from ray._private import node, ray_constants, services

    inside = os.environ.setdefault(_CLUSTER_VARIABLE, "0") == "0"
    wanted: list[tuple[Any, str, Any, str]] = [
        (getattr(node, "Node", None), name, lambda *_, **__: None, "Ray starts some seconds later")
        for name in ("start_api_server", "start_log_monitor", "start_monitor")
    ]
    start: Any = getattr(services, "start_ray_process", None)
    wanted.append((services, "start_ray_process", functools.partial(_start_without_agent, start),
                   "an agent of its dashboard runs beside the work"))  # fmt: skip
    if inside:
        wanted.append((ray_constants, "ENABLE_RAY_CLUSTER", False, f"set {_CLUSTER_VARIABLE}=0 before this command, "
                       "or Ray listens on all addresses of this machine"))  # fmt: skip
    with contextlib.ExitStack() as undo:
        for owner, name, value, without in wanted:
            if hasattr(owner, name):
                undo.callback(setattr, owner, name, getattr(owner, name))
                setattr(owner, name, value)
            else:
                report(f"Ray's {name}", without)
        try:
            yield
        finally:
            if os.environ[_CLUSTER_VARIABLE] == "0":
                del os.environ[_CLUSTER_VARIABLE]  # a Ray that a program starts later is its own affair


def _start_without_agent(start: Callable[..., Any], command: list[str], *args: Any, **options: Any) -> Any:
    """What starts Ray's processes, but for the agent of the dashboard. Who waits to hear of its ports hears of none, as
    of a plain ``pip install ray``; the raylet wants a process to run and to watch."""
    flags = dict(word.split("=", 1) for word in command if word.startswith("--") and "=" in word)
    if (name := "--dashboard_agent_command") in flags:
        try:
            from ray import _raylet

            known: Any = _raylet
            for port in ("METRICS_AGENT", "METRICS_EXPORT", "DASHBOARD_AGENT_LISTEN"):
                port_name = getattr(known, f"{port}_PORT_NAME")
                known.persist_port(flags["--session_dir"], flags["--node_id"], port_name, -1)
            instead = subprocess.list2cmdline(
                [sys.executable, "-ISu", str(Path(__file__).parent / "cluster" / "idle.py")]
            )
            command = [f"{name}={instead}" if word.startswith(f"{name}=") else word for word in command]
        except MOVED:
            report("Ray's ports of a node", "an agent of its dashboard runs beside the work")
    return start(command, *args, **options)


def autoscaler_limits() -> dict[str, float]:
    """The most of each resource that the cluster's autoscaler may start; empty without an autoscaler."""
    limits: dict[str, float] = {}
    for _, resources, most in autoscaler_types():
        for name, amount in resources.items():
            limits[name] = limits.get(name, 0) + amount * most
    return limits


def autoscaler_types() -> list[tuple[str, dict[str, float], int]]:
    """Name, resources and most nodes of each kind of node that the autoscaler may start."""
    import ray

    config = autoscaling_config(ray.get_runtime_context().gcs_address)
    limit = config.get("max_workers", sys.maxsize)
    kinds = config.get("available_node_types", {}).items()
    found = [(name, kind.get("resources", {}), min(kind.get("max_workers", limit), limit)) for name, kind in kinds
             if name != config.get("head_node_type")]  # fmt: skip
    return [one for one in found if one[2] > 0]


@functools.lru_cache(1)
def autoscaling_config(gcs_address: str) -> dict[str, Any]:
    """What the autoscaler of the connected cluster was started with, in the words of Ray's cluster YAML; empty without
    one. Ray 2.60 has a table for it that nothing in its package writes: it is read where the autoscaler runs."""
    try:
        import ray
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        nodes = [node for node in ray.nodes() if node["Alive"]]
        head = next(node["NodeID"] for node in nodes if "node:__internal_head__" in node["Resources"])
        if head == ray.get_runtime_context().get_node_id():
            return autoscaling_config_here(gcs_address)
        there = NodeAffinitySchedulingStrategy(head, soft=False)
        read = ray.remote(num_cpus=0)(autoscaling_config_here).options(scheduling_strategy=there)
        return ray.get(read.remote(gcs_address), timeout=60)
    except Exception as error:  # of the file, the cluster, the API of Kubernetes
        logger.warning("what the cluster's autoscaler may start is not known, and only nodes that run already are "
                       "counted: %s", one_line(error))  # fmt: skip
        return {}


def autoscaling_config_here(gcs_address: str) -> dict[str, Any]:
    """:func:`autoscaling_config` on the head: the file that the autoscaler's process was given, or what KubeRay's, in a
    container of its own, makes of the RayCluster."""
    import psutil
    import yaml

    flag = "--autoscaling-config="
    for process in psutil.process_iter(["cmdline"]):
        command = process.info["cmdline"] or []
        if f"--gcs-address={gcs_address}" in command:
            for file in (word.removeprefix(flag) for word in command if word.startswith(flag)):
                return cast(dict[str, Any], yaml.safe_load(Path(process.cwd(), file).read_text()))
    if not (name := os.environ.get("RAY_CLUSTER_NAME")) or not _POD_NAMESPACE.exists():
        return {}
    from ray.autoscaler._private.kuberay import autoscaling_config as kuberay
    from ray.autoscaler._private.kuberay.node_provider import KubernetesHttpApiClient

    cluster = KubernetesHttpApiClient(_POD_NAMESPACE.read_text()).get(f"rayclusters/{name}")
    if not cluster["spec"].get("enableInTreeAutoscaling"):
        return {}
    return cast(dict[str, Any], kuberay._derive_autoscaling_config_from_ray_cr(cluster))


def starting_nodes() -> Counter[str]:
    """How many nodes of which type the autoscaler (version 2) starts at this moment."""
    try:
        import ray
        from ray.autoscaler.v2.sdk import get_cluster_status

        status = get_cluster_status(ray.get_runtime_context().gcs_address, timeout=5)
        found = Counter({one.ray_node_type_name: one.count for one in status.pending_launches})
        return found + Counter(node.ray_node_type_name for node in status.pending_nodes)
    except (*MOVED, RuntimeError):
        report("Ray's status of the autoscaler", "what it does is not said while a run waits")
        return Counter()


def own_groups() -> list[bool]:
    """Of each placement group of this process's job that was not removed, whether it has its place."""
    try:
        import ray
        from ray._private.state import state
        from ray.core.generated import gcs_pb2

        table, own = gcs_pb2.PlacementGroupTableData, ray.get_runtime_context().get_job_id()
        groups = [table.FromString(one) for one in state._connect_and_get_accessor().get_placement_group_table()]
        return [
            one.state == table.CREATED
            for one in groups
            if one.creator_job_id.hex() == own and one.state != table.REMOVED
        ]
    except MOVED:
        report("Ray's table of placement groups", "waiting for nodes is not said")
        return [True]


def free_resources() -> dict[str, dict[str, float]]:
    """What nobody has asked for on each node, by the node's id."""
    try:
        from ray._private.state import available_resources_per_node

        return available_resources_per_node()
    except MOVED:
        import ray

        report("Ray's free resources of each node", "those of all nodes are taken together")
        return {"": ray.available_resources()}


def keep_secret(name: str, value: str | None) -> None:
    """Keep a text in the memory of the cluster's head, where no page and no list shows it; None forgets it."""
    try:
        from ray.experimental import internal_kv

        if value is None:
            internal_kv._internal_kv_del(name, namespace=b"rayswift")
        else:
            internal_kv._internal_kv_put(name, value, overwrite=True, namespace=b"rayswift")
    except MOVED:
        report("Ray's store of keys and values", "replicas take the hub's token of their node's environment")


def kept_secret(name: str) -> str | None:
    """What `keep_secret` kept under this name."""
    try:
        from ray.experimental import internal_kv

        value = internal_kv._internal_kv_get(name, namespace=b"rayswift")
    except MOVED:
        return None
    return None if value is None else value.decode()


def in_ray_job() -> bool:
    """Whether this process belongs to a job that was submitted to a cluster."""
    try:
        from ray._private.runtime_env.constants import RAY_JOB_CONFIG_JSON_ENV_VAR
    except MOVED:
        report("Ray's variable of a job", "relative paths of results are taken as they are")
        return False
    return RAY_JOB_CONFIG_JSON_ENV_VAR in os.environ


def session_folder() -> str:
    """Where Ray keeps this node's logs, sockets, packages and spilled objects."""
    try:
        from ray._private.worker import _global_node

        return str(_global_node.get_session_dir_path())
    except MOVED:
        report("Ray's folder", "/tmp is taken for it")
        return "/tmp"


def dashboard_get(client: Any, path: str, **params: Any) -> bytes:
    """What a cluster's dashboard answers at a path that its client has no method for; empty where it has no such.

    Raises:
        NotAvailable: Ray's client has no way to ask.
    """
    with needed("Ray's client of the dashboard"):
        answer = client._do_request("GET", path, params=params, timeout=60)
        return answer.content if answer.status_code == 200 else b""


def job_package(folder: str) -> tuple[dict[str, int], int] | None:
    """The files of a folder that Ray sends with a job (relative path → bytes in the package), and the most bytes that
    it takes; None where Ray cannot be asked."""
    try:
        from ray._private import ray_constants
        from ray._private.runtime_env import packaging

        root, sizes = Path(folder).absolute(), dict[str, int]()

        def note(path: Path) -> None:
            if path.is_file():
                name = str(path.relative_to(root))
                sizes[name] = path.stat().st_size + 76 + 2 * len(name.encode())  # what a zip file says of each

        with_gitignore = os.environ.get(ray_constants.RAY_RUNTIME_ENV_IGNORE_GITIGNORE, "0") != "1"
        excluded = packaging._get_excludes(root, ray_constants.get_runtime_env_default_excludes())
        packaging._dir_travel(root, [excluded], note, with_gitignore, logging.Logger("job", logging.ERROR))
        return sizes, ray_constants.DASHBOARD_CLIENT_MAX_SIZE
    except MOVED:
        report("Ray's list of the files of a job", "they are sent without a look at them")
        return None


def iter_block_refs(dataset: Any) -> Iterator[tuple[Any, int]]:
    """Reference and bytes of each block of a Ray Dataset, in order, without a copy of it in this process."""
    if not hasattr(dataset, "iter_internal_ref_bundles"):
        import ray

        report("Ray Data's iter_internal_ref_bundles", "every block is copied once more")
        for table in dataset.iter_batches(batch_size=None, batch_format="pyarrow"):
            yield ray.put(table), table.nbytes
        return
    for bundle in dataset.iter_internal_ref_bundles():
        for entry in bundle.blocks:
            yield entry.ref, entry.metadata.size_bytes or 0


# --- Ray Train ----------------------------------------------------------------------------------------------------

#: Methods of Ray Train's worker actor; a class that stands in for it passes them on.
WORKER_METHODS = (
    "clear_result_queue", "execute", "get_metadata", "init_train_context", "mark_preempt", "poll_status",
    "run_train_fn", "shutdown",
)  # fmt: skip
#: Arguments of the worker's ``init_train_context`` that the group gives beside those it is told.
_CONTEXT_ARGUMENTS = {"train_run_context", "distributed_context", "synchronization_actor", "storage_context",
                      "worker_callbacks", "controller_actor"}  # fmt: skip


@contextlib.contextmanager
def quiet_train() -> Iterator[None]:
    """A Ray Train on a Ray of this process: no numbers for a dashboard, no watch for a machine that is taken away.

    Both variables are documented; what the user set stays.
    """
    variables = ("RAY_TRAIN_METRICS_ENABLED", "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER")
    ours = [name for name in variables if name not in os.environ]
    os.environ.update(dict.fromkeys(ours, "0"))
    try:
        yield
    finally:
        for name in ours:
            os.environ.pop(name, None)


def check_ray_train() -> None:
    """Raises NotAvailable when something of Ray Train that ``train/start`` replaces or calls has changed."""
    from ray.train.v2._internal.execution.controller import TrainController
    from ray.train.v2._internal.execution.failure_handling import DefaultFailurePolicy, FailureDecision
    from ray.train.v2._internal.execution.scaling_policy import FixedScalingPolicy
    from ray.train.v2._internal.execution.worker_group import Worker, WorkerGroup
    from ray.train.v2._internal.execution.worker_group.worker import RayTrainWorker
    from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer as Trainer

    def arguments(owner: Any, name: str) -> list[str]:
        return [one for one in inspect.signature(getattr(owner, name)).parameters if one != "self"]

    checks = {
        "DataParallelTrainer": "backend_config" in arguments(Trainer, "__init__")
        and arguments(Trainer, "_create_default_callbacks") == []
        and arguments(Trainer, "_initialize_and_run_controller") == ["controller_init_kwargs"]
        and arguments(Trainer, "_register_sigint_handler") == ["controller"],
        "TrainController": arguments(TrainController, "run") == arguments(TrainController, "get_result") == []
        and hasattr(TrainController, "worker_group_cls"),
        "DefaultFailurePolicy": arguments(DefaultFailurePolicy, "make_decision") == ["training_failed_error"]
        and arguments(DefaultFailurePolicy, "__init__") == ["failure_config"]
        and hasattr(FailureDecision, "RAISE"),
        "FixedScalingPolicy": arguments(FixedScalingPolicy, "after_controller_start") == ["train_run_context"]
        and arguments(FixedScalingPolicy, "_maybe_send_resource_request") == [],
        "WorkerGroup": arguments(WorkerGroup, "_create_workers")[:3]
        == ["num_workers", "placement_group", "resources_per_worker"]
        and arguments(WorkerGroup, "_init_train_context_on_workers") == ["workers", "sync_actor", "train_context_args"]
        and arguments(WorkerGroup, "_assign_worker_ranks")[:1] == ["workers"]
        and arguments(WorkerGroup, "_decorate_worker_log_file_paths") == ["workers"]
        and arguments(WorkerGroup, "abort") == [],
        "Worker": {"actor", "metadata", "resources", "placement_group_bundle_index"}
        <= set(arguments(Worker, "__init__")),
        "RayTrainWorker": {name for name in vars(RayTrainWorker) if name[0] != "_"} == set(WORKER_METHODS)
        and set(arguments(RayTrainWorker, "init_train_context")) >= _CONTEXT_ARGUMENTS,
    }
    if changed := [name for name, same in checks.items() if not same]:
        raise NotAvailable(f"Ray Train's {', '.join(changed)} changed")


def check_synchronization() -> None:
    """Raises NotAvailable when the actor in which Ray Train's workers wait for each other is made, asked or ended in
    another way than ``train/start/alone.py`` knows."""
    with needed("Ray Train's SynchronizationActor"):
        from ray.train.v2._internal.execution.worker_group import state, worker_group

        methods = worker_group.SynchronizationActor.__ray_metadata__.modified_class
        asked = {name for name in vars(methods) if name[0] != "_" and not name.startswith("get_")}
        if asked != {"broadcast_from_rank_zero", "reset", "set_required_ranks"}:
            raise TypeError(f"its methods are {', '.join(sorted(asked))}")
        inspect.signature(methods.broadcast_from_rank_zero).bind(None, world_rank=0, world_size=1, data=None,
                                                                 caller_method_name="")  # fmt: skip
        inspect.signature(state._shutdown_sync_actor).bind(None)


def replace_http_protocol(where: str) -> None:
    """Have the servers that others start with uvicorn's own choice of a protocol take the class at ``module:Name``."""
    from uvicorn import config

    if "auto" in getattr(config, "HTTP_PROTOCOLS", ()):
        config.HTTP_PROTOCOLS["auto"] = where
    else:
        report("uvicorn's HTTP_PROTOCOLS", "the chat page has no limits on connections")


def forget_train_snapshot(filesystem: Any, folder: str) -> None:
    """Ray Train resumes on its own from a snapshot of the same name; the manifests are what counts in a run directory.

    A name of its own for each attempt would be the public way, but a bucket's checkpoints go below that name.
    """
    snapshot = f"{folder}/checkpoint_manager_snapshot.json"
    if filesystem.get_file_info(snapshot).is_file:
        filesystem.delete_file(snapshot)


# --- Ray Serve ----------------------------------------------------------------------------------------------------


def bind_replica_ports(host: str) -> None:
    """Have this Serve replica open its gRPC port at ``host``: Ray Serve 2.60 opens it on all interfaces, and takes
    pickles from whoever connects. Without that the replica is not to run."""
    with needed("Ray Serve's add_port_to_grpc_server"):
        from ray.serve._private import replica

        open_port = replica.add_port_to_grpc_server
    inside = f"[{host}]" if ":" in host else host

    def open_inside(server: object, address: str) -> int:
        return int(open_port(server, f"{inside}:{address.rpartition(':')[2]}"))

    replica.add_port_to_grpc_server = open_inside


def replace_applications(config: dict[str, Any]) -> None:
    """Hand a running Serve the configuration of its applications; those of other names stay as they are.

    ``serve.run_many`` would deploy each application anew.
    """
    with needed("Ray Serve's client"):
        from ray.serve.context import _get_global_client
        from ray.serve.schema import ServeDeploySchema

        deploy = _get_global_client().deploy_apps
    names = {app["name"] for app in config["applications"]}
    others = [found["deployed_app_config"] for name, found in serve_applications().items() if name not in names]
    schema = {**config, "applications": [*config["applications"], *filter(None, others)]}
    deploy(ServeDeploySchema.model_validate(schema))


def serve_applications() -> dict[str, dict[str, Any]]:
    """Serve's applications by name: ``deployed_app_config`` and, for each of ``deployments``, its ``replicas`` with
    their ``node_id`` and ``state``. ``serve.status`` has neither."""
    with needed("Ray Serve's client"):
        from ray.serve.context import _get_global_client

        return dict(_get_global_client().get_serve_details()["applications"])


# --- vLLM, and Ray's server of it ---------------------------------------------------------------------------------


def spin_condition() -> Any:
    """The class with which vLLM's processes wait for shared memory: ``wait(timeout_ms)``, ``record_read()`` and
    ``busy_loop_s``; None when it is another, and then engines on CPUs are slower."""
    try:
        from vllm.distributed.device_communicators.shm_broadcast import SpinCondition

        found = [list(inspect.signature(getattr(SpinCondition, name)).parameters) for name in ("wait", "record_read")]
        if found == [["self", "timeout_ms"], ["self"]]:
            return SpinCondition
    except MOVED:
        pass
    report("vLLM's SpinCondition", "engines on CPUs are up to a half slower")
    return None


def retry_engine_blocks(processor: Any, tries: int) -> None:
    """Ask the blocks of `ray.data.llm`'s engine stage again when an engine dies; its configuration has no place for
    it."""
    try:
        processor.get_stage_by_name("vLLMEngineStage").map_batches_kwargs["max_task_retries"] = tries
    except (*MOVED, ValueError):
        report("the engine stage of ray.data.llm", "the work of an engine that dies is not asked again")


def without_vllm_report() -> None:
    """Where Ray's usage report is off, no process of 400 MB that has nothing to send."""
    try:
        from ray._common.usage import usage_lib
        from ray.llm._internal.serve.core.server import llm_server

        if not usage_lib.usage_stats_enabled() and llm_server.push_telemetry_report_for_all_models:
            llm_server.push_telemetry_report_for_all_models = lambda all_models: None
    except (ImportError, AttributeError):
        report("the usage report of ray.serve.llm", "it takes 400 MB more")


def engine_client(server: Any) -> Any:
    """The ``AsyncLLM`` of a started ``LLMServer``."""
    with needed("the engine of ray.serve.llm"):
        return server.engine._engine_client


async def openai_app(server: Any) -> tuple[Any, Any]:
    """vLLM's OpenAI app of a started ``LLMServer``, and its ``OnlineRenderer`` (None: a pooling model has none)."""
    with needed("the OpenAI app of ray.serve.llm"):
        build = server.engine.build_asgi_app
    app = await build()
    chat = getattr(app.state, "openai_serving_chat", None)
    with needed("vLLM's OpenAIServingChat"):
        return app, None if chat is None else chat.online_renderer


def rendering(online_renderer: Any) -> tuple[Any, Any]:
    """How vLLM's ``OnlineRenderer`` reads a chat request: its ``preprocess_chat(request, messages, **settings)``, and
    its renderer's ``render_messages_async(messages, params)``."""
    with needed("vLLM's OnlineRenderer"):
        return online_renderer.preprocess_chat, online_renderer.renderer.render_messages_async


def replace_rendering(online_renderer: Any, preprocess: Any, render: Any) -> None:
    """Have it call these instead of what :func:`rendering` gives."""
    online_renderer.preprocess_chat, online_renderer.renderer.render_messages_async = preprocess, render


def correct_token_bytes(app: Any, token_bytes: Callable[[int], bytes]) -> None:
    """Have the log probabilities of vLLM's app (:func:`openai_app`) give the bytes of each token: vLLM's are those of
    its text, which of half a character is U+FFFD, or nothing."""
    try:
        chat = app.state.openai_serving_chat
        create = chat._create_chat_logprobs
        wanted = {"token_ids", "top_logprobs"} <= set(inspect.signature(create).parameters)
    except MOVED:
        wanted = False
    if not wanted:
        report("vLLM's _create_chat_logprobs", "the bytes of half a character are those of U+FFFD")
        return

    def creating(token_ids: Any, top_logprobs: Any, **options: Any) -> Any:
        found = create(token_ids=token_ids, top_logprobs=top_logprobs, **options)
        for token, step, entry in zip(token_ids, top_logprobs, found.content, strict=False):
            entry.bytes = list(token_bytes(token))
            for other, alternative in zip(step or (), entry.top_logprobs, strict=False):
                alternative.bytes = list(token_bytes(other))
        return found

    chat._create_chat_logprobs = creating


def name_completion_tokens(app: Any, token_names: Callable[[Iterable[tuple[int, str]]], list[str]]) -> None:
    """Have the log probabilities of vLLM's completions call tokens so: where two have one text, it loses one of them,
    and the token that was chosen may get the other's value."""
    try:
        completion = app.state.openai_serving_completion
        create, decoded = completion._create_completion_logprobs, completion._get_decoded_token
        wanted = {"token_ids", "top_logprobs", "num_output_top_logprobs", "tokenizer", "logprob_token_ids",
                  "return_as_token_id"} <= set(inspect.signature(create).parameters)  # fmt: skip
    except MOVED:
        wanted = False
    if not wanted:
        report("vLLM's _create_completion_logprobs", "top_logprobs loses tokens that have the same text")
        return

    def creating(
        token_ids: Any, top_logprobs: Any, num_output_top_logprobs: int, tokenizer: Any,
        logprob_token_ids: Any = None, return_as_token_id: bool | None = None, **options: Any,
    ) -> Any:  # fmt: skip
        found = create(
            token_ids=token_ids, top_logprobs=top_logprobs, num_output_top_logprobs=num_output_top_logprobs,
            tokenizer=tokenizer, logprob_token_ids=logprob_token_ids, return_as_token_id=return_as_token_id, **options,
        )  # fmt: skip
        if return_as_token_id or (return_as_token_id is None and completion.return_tokens_as_token_ids):
            return found
        most = None if logprob_token_ids or num_output_top_logprobs == -1 else num_output_top_logprobs + 1
        for place, (token, step) in enumerate(zip(token_ids, top_logprobs, strict=True)):
            if step is None:
                found.tokens[place] = token_names([(token, found.tokens[place])])[0]
                continue
            likely = [(token, step[token]), *((other, one) for other, one in step.items() if other != token)][:most]
            names = token_names([(other, decoded(one, other, tokenizer)) for other, one in likely])
            found.tokens[place] = names[0]
            values = (max(one.logprob, -9999.0) for _, one in likely)
            found.top_logprobs[place] = dict(zip(names, values, strict=True))
        return found

    completion._create_completion_logprobs = creating


def adapters_by_name(server: Any) -> dict[str, Any]:
    """The ``LoRARequest`` by the name that requests ask for, as the app of a started ``LLMServer`` looks it up."""
    with needed("the adapters of vLLM's server"):
        return cast("dict[str, Any]", server.engine._oai_models.lora_requests)


def name_adapters(server: Any, name_of: Callable[[Any], str]) -> None:
    """Have its answers say for an adapter what ``name_of`` its ``LoRARequest`` is, which vLLM's own name is not."""
    with needed("the adapters of vLLM's server"):
        models = server.engine._oai_models
        own = models.model_name
    models.model_name = lambda lora_request=None: own() if lora_request is None else name_of(lora_request)


# --- PyTorch, DeepSpeed and PEFT ----------------------------------------------------------------------------------


@contextlib.contextmanager
def no_mask_questions(rows_by_mask: bool) -> Iterator[None]:
    """Forward passes inside do not ask a device what its masks and positions hold, which the host would wait for: a
    mask is one of padded rows, and positions tell nothing, but where a mask keeps joined rows apart."""
    from transformers import masking_utils

    own, answers = vars(masking_utils), {"fast_all": lambda *_: False, "find_packed_sequence_indices": lambda *_: None}
    if rows_by_mask:
        del answers["find_packed_sequence_indices"]
    if not answers.keys() <= own.keys():
        report("transformers.masking_utils", "the host waits for the device at each forward pass")
        answers = {}
    before = {name: own[name] for name in answers}
    own.update(answers)
    try:
        yield
    finally:
        own.update(before)


@contextlib.contextmanager
def no_pickled_code() -> Iterator[None]:
    """Inside, ``torch.load`` opens no pickle that could run code, whatever its caller asks for.

    DeepSpeed passes ``weights_only=False`` for shards that hold tensors and four plain classes of its own. Public way:
    torch's environment variable. Without those classes (DeepSpeed moved them) its shards are refused, never run.
    """
    import torch

    classes = []
    if "deepspeed" in sys.modules:
        try:
            from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
            from deepspeed.runtime.zero.config import ZeroStageEnum
            from deepspeed.utils.tensor_fragment import fragment_address

            classes = [LossScaler, DynamicLossScaler, ZeroStageEnum, fragment_address]
        except ImportError:
            logger.warning("DeepSpeed has moved its plain classes: its shards cannot be read")
    variable = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
    before = os.environ.get(variable)
    os.environ[variable] = "1"
    try:
        with torch.serialization.safe_globals(classes):
            yield
    finally:
        if before is None:
            del os.environ[variable]
        else:
            os.environ[variable] = before


#: Where a kind of ZeRO has a worker's float32 vectors, and its ``state_dict`` that of the optimiser that steps them.
_ZERO_STATE = {
    "DeepSpeedZeroOptimizer": ("single_partition_of_fp32_groups", "base_optimizer_state"),
    "DeepSpeedZeroOptimizer_Stage3": ("fp32_partitioned_groups_flat", "optimizer_state_dict"),
}


def zero_layout(engine: Any) -> tuple[list[list[tuple[str, int, int, int]]], dict[str, list[int]]] | None:
    """What lies in each flat vector of a worker of a DeepSpeed engine, as (parameter, place in the vector, place in the
    parameter, how many numbers), and the shapes of those parameters.

    None where that is not known (MoE, state on NVMe, ZeRO++'s and other kinds of ZeRO): then only DeepSpeed itself can
    save and load the state, for the same number of workers.
    """
    zero = engine.optimizer
    try:
        if type(zero).__name__ not in _ZERO_STATE or engine.has_moe_layers or zero.elastic_checkpoint:
            return None
        names = zero.param_names
        if hasattr(zero, "fp16_groups"):  # stage 3: of every parameter each worker has an equal part
            if zero.swap_optimizer or zero.params_in_nvme_and_cpu:
                return None
            shapes = {names[one]: list(one.ds_shape) for group in zero.fp16_groups for one in group}
            layout: list[list[tuple[str, int, int, int]]] = []
            for group in zero.fp16_groups:
                layout.append([])
                place = 0
                for one in group:
                    part = int(one.partition_numel())
                    start = zero._get_param_partition_rank(one) * part
                    if (count := min(part, one.ds_numel - start)) > 0:
                        layout[-1].append((names[one], place, start, count))
                    place += part
            return layout, shapes
        shapes = {names[one]: list(one.shape) for group in zero.bit16_groups for one in group}
        found = [[(names[one], one._hp_mapping) for one in group if one._hp_mapping] for group in zero.bit16_groups]
        return [
            [(name, of.hp_fragment_address.start, of.lp_fragment_address.start, of.hp_fragment_address.numel)
             for name, of in group]
            for group in found
        ], shapes  # fmt: skip
    except MOVED:
        report("DeepSpeed's ZeRO optimiser", "its checkpoints are for the same number of workers")
        return None


def zero_state(engine: Any) -> tuple[dict[str, Any], list[Any], dict[str, Any]]:
    """The state of a worker's ZeRO optimiser, the float32 vectors that it steps, and in the state the ``state_dict`` of
    what steps them: its entry N is of vector N."""
    vectors, base = _ZERO_STATE[type(engine.optimizer).__name__]
    state = engine.optimizer.state_dict()
    return state, getattr(engine.optimizer, vectors), state[base]


def load_zero_state(engine: Any, state: dict[str, Any]) -> None:
    """Take a state that `zero_state` gave and that was changed with its vectors, and have the weights follow."""
    import torch

    zero = engine.optimizer
    own = {torch.distributed.get_rank(group=zero.dp_process_group): state}
    for event in ("checkpoint_event_prologue", "load", "update_lp_params", "checkpoint_event_epilogue"):
        if event == "load":
            zero.load_state_dict(own, load_optimizer_states=True, load_from_fp32_weights=True)
        elif hasattr(zero, event):
            getattr(zero, event)()


def may_have_changed(tensor: Any) -> bool:
    """Whether something was written into a tensor since it was made."""
    return bool(getattr(tensor, "_version", 1))


def cpu_has_bfloat16() -> bool:
    """Whether this CPU multiplies bfloat16 matrices at speed, by what oneDNN asks of it."""
    # Linux says it to those who have not imported PyTorch, which takes a second and 130 MiB.
    with contextlib.suppress(OSError), open("/proc/cpuinfo") as lines:
        line = next((line for line in lines if line.startswith(("flags", "Features"))), "")
        if flags := set(line.split()):
            return {"avx512bw", "avx512dq", "avx512vl"} <= flags or "bf16" in flags
    import torch

    try:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    except MOVED:
        return torch.backends.cpu.get_cpu_capability().startswith("AVX512")


def lora_targets(target_modules: Any) -> Callable[[str], bool]:
    """Whether LoRA's ``target_modules`` mean a module, by PEFT's rules."""
    with needed("PEFT's check_target_module_exists"):
        from peft import LoraConfig
        from peft.tuners.tuners_utils import check_target_module_exists

    config = LoraConfig(target_modules=target_modules)
    return lambda module: bool(check_target_module_exists(config, module))


def lora_pattern(patterns: list[str], module: str) -> str:
    """Which of ``rank_pattern``'s keys is meant for a module; without one, the module's name."""
    with needed("PEFT's get_pattern_key"):
        from peft.utils.other import get_pattern_key

    return str(get_pattern_key(patterns, module))


# --- lm-eval ------------------------------------------------------------------------------------------------------


def without_git_hash() -> None:
    """lm-eval asks `git` for the commit of the folder it stands in, and what git says of it lands in the terminal."""
    try:
        from lm_eval import evaluator

        if callable(evaluator.get_git_commit_hash):
            evaluator.get_git_commit_hash = lambda: None
    except MOVED:
        report("lm-eval's git hash", "git may say that this is no repository")

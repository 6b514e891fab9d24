"""``rayswift deploy``: arguments → specs → Ray Serve → a port that answers, until Ctrl-C."""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from rayswift import private
from rayswift.cluster import waiting_line
from rayswift.errors import UserError
from rayswift.generate.model_spec import ModelSpec, check_nodes, hub_token, model_specs
from rayswift.serve.application import GATEWAY, app_name, serve_config
from rayswift.serve.gateways import Gateways
from rayswift.serve.ports import require_free_port

if TYPE_CHECKING:
    from rayswift.arguments import DeployArguments
    from rayswift.cluster import Cluster

logger = logging.getLogger("rayswift.serve.deploy")

_POLL_SECONDS = 1.0
#: Between lines about what replicas wait for.
_WAITING_SECONDS = 10.0
#: Between looks whether an application has stopped; beyond --drain_timeout, for the end of its processes.
_STOP_POLL_SECONDS, _STOP_SECONDS = 0.1, 30.0
#: A Ray that is started for one deployment looks after it once a second instead of ten times, and counts nothing for
#: a dashboard that is not there: on a small machine the engine needs that time.
_QUIET_RAY = {
    "RAY_SERVE_CONTROL_LOOP_INTERVAL_S": "1",
    "RAY_SERVE_METRICS_EXPORT_INTERVAL_MS": "5000",
    "RAY_enable_metrics_collection": "0",
}


def deploy(args: DeployArguments) -> None:
    """Serve the models of ``args`` until Ctrl-C or SIGTERM, which let running requests finish.

    With ``--dry_run true`` prints the configuration that ``serve deploy`` and KubeRay's RayService take, and returns.

    Raises:
        UserError: something that cannot work, before anything is started.
    """
    specs = model_specs(args)
    if args.dry_run:
        import yaml

        if args.hub_token:
            logger.warning("--hub_token is not in this configuration, which is no place for it: set HF_TOKEN or "
                           "MODELSCOPE_API_TOKEN in the environment of the cluster's nodes")  # fmt: skip
        plain = json.loads(json.dumps(serve_config(specs, args, listen=False)))
        print(yaml.safe_dump(plain, sort_keys=False, allow_unicode=True), end="")
        return
    with deployment(args, specs) as gateways:
        watch(args, specs, gateways)


@contextmanager
def deployment(args: DeployArguments, specs: list[ModelSpec]) -> Iterator[Gateways]:
    """A running deployment; left, it lets its requests finish and stops."""
    from rayswift import cluster

    if specs[0].local:
        require_free_port(args.host, args.port, "--port")
        for name, value in _QUIET_RAY.items():
            os.environ.setdefault(name, value)
    connected = cluster.connect(args)
    check_room(specs, connected)
    import ray
    from ray import serve

    logging.getLogger("ray.serve").setLevel(logging.WARNING)  # this command says what happens itself
    is_main = threading.current_thread() is threading.main_thread()
    sigterm = signal.signal(signal.SIGTERM, signal.default_int_handler) if is_main else None
    serve.start(proxy_location="Disabled", http_options={"host": "127.0.0.1"})
    gateways = Gateways(args, specs)
    # Replicas of a cluster download for themselves. Serve's configuration, which everybody may read, has no token.
    tokens = [] if specs[0].local or not args.hub_token else [hub_token(app_name(args.app_name, one)) for one in specs]
    for name in tokens:
        private.keep_secret(name, args.hub_token)
    gateways.deploy()
    try:
        wait_until_ready(args, specs, gateways)
        yield gateways
    finally:
        # What another command has deployed again meanwhile (a rolling update) is not ours to stop.
        if gateways.is_ours():
            for name in tokens:
                private.keep_secret(name, None)
            logger.info("stopping: running requests finish first (--drain_timeout %d)", args.drain_timeout)
            stop_applications(gateways.names, args.drain_timeout)
            stop_applications(gateways.others, args.drain_timeout)
        if connected.started:
            ray.shutdown()
        if is_main:
            signal.signal(signal.SIGTERM, sigterm)


def stop_applications(names: list[str], drain_timeout: int) -> None:
    """Stop them and wait until their requests have ended; Ctrl-C, once more, cuts them off."""
    from ray import serve

    for name in names:
        serve.delete(name, _blocking=False)
    end = time.monotonic() + drain_timeout + _STOP_SECONDS
    try:
        while names and time.monotonic() < end:
            time.sleep(_STOP_POLL_SECONDS)
            apps = serve.status().applications
            names = [name for name in names if name in apps]
    except KeyboardInterrupt:
        logger.warning("stopping at once")
    for name in names:
        logger.warning("%s: its requests did not end in time and are cut off", name)


# --- checks -----------------------------------------------------------------------------------------------------


def check_room(specs: list[ModelSpec], cluster: Cluster) -> None:
    """Raises UserError when the cluster can never hold the fewest replicas: Serve would wait for ever."""
    for name, available in (("GPU", cluster.gpus), ("CPU", cluster.cpus)):
        needed = sum(max(1, one.min_replicas) * sum(bundle.get(name, 0) for bundle in one.bundles) for one in specs)
        if needed > available:
            mend = "lower it, --vllm_tensor_parallel_size or --resources_per_worker"
            if name == "GPU" and not available:
                mend = "--use_gpu false serves on CPUs"
            raise UserError(f"--min_replicas: the replicas need {needed:g} {name}s and {cluster.describe()}; {mend}")
    for spec in specs:
        check_nodes(spec, cluster)


# --- while it runs ------------------------------------------------------------------------------------------------


def wait_until_ready(args: DeployArguments, specs: list[ModelSpec], gateways: Gateways) -> None:
    """Wait until every model answers; says what is going on. Raises UserError when a replica cannot start."""
    from ray import serve

    started, said = time.monotonic(), ""
    looked = started
    while True:
        apps, names = serve.status().applications, [*gateways.names, *gateways.others]
        states = {name: str(getattr(apps.get(name), "status", "NOT_STARTED")).rpartition(".")[2] for name in names}
        for name, state in states.items():
            if state in ("DEPLOY_FAILED", "UNHEALTHY"):
                raise UserError(f"{name} does not start: {failure_of(apps[name])}")
        if all(state == "RUNNING" for state in states.values()) and not gateways.follow():
            break
        line = ", ".join(f"{name} {state.lower()}" for name, state in states.items())
        if line != said:
            logger.info("%5.1f s  %s", time.monotonic() - started, line)
            said = line
        if time.monotonic() - looked > _WAITING_SECONDS:
            looked = time.monotonic()
            if not all(private.own_groups()):
                for spec in specs:
                    logger.info(waiting_line(f"a replica of {spec.name}", spec.together, spec.node_labels))
        time.sleep(_POLL_SECONDS)
    scheme = "https" if args.ssl_certfile else "http"
    models = ", ".join(spec.name for spec in specs)
    logger.info("ready: %s://%s:%d/v1  (%s)", scheme, args.host, args.port, models)


def failure_of(app: Any) -> str:
    """The last line of what Serve says about an application that failed."""
    texts = [app.message, *(deployment.message for deployment in app.deployments.values())]
    lines = [line.strip() for text in texts if text for line in text.strip().splitlines() if line.strip()]
    errors = [line for line in lines if "Error" in line or "error" in line]
    return (errors or lines or ["no reason given"])[-1]


def watch(args: DeployArguments, specs: list[ModelSpec], gateways: Gateways) -> None:
    """Show what the deployment does until SIGINT or SIGTERM; one live line on a terminal, else one per interval."""
    from ray import serve

    from rayswift.serve.status_line import StatusLine

    stop = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())
    door = serve.get_deployment_handle(GATEWAY, args.app_name)
    line = StatusLine(sys.stderr, sys.stderr.isatty(), args.log_interval)
    names = {app_name(args.app_name, spec): spec.name for spec in specs}
    while not stop.wait(1 if line.live else args.log_interval):
        try:
            gateways.follow()
            stats = door.stats.remote().result(timeout_s=5)
        except Exception as error:  # the gateway is being started again
            logger.debug("no statistics: %s", error)
            continue
        replicas = {model: _replicas(serve.status().applications.get(name)) for name, model in names.items()}
        line.show(stats, replicas)
    line.end()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler)


def _replicas(app: Any) -> str:
    """``running/all`` replicas of a model's application."""
    states = app.deployments[next(iter(app.deployments))].replica_states if app and app.deployments else {}
    counts = {str(state).rpartition(".")[2]: count for state, count in states.items()}
    return f"{counts.get('RUNNING', 0)}/{sum(counts.values())}"

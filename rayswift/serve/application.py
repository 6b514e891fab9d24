"""The Serve applications: one per model, and the gateway. Built by Serve itself from a configuration (`import_path`).

``rayswift deploy`` and ``serve deploy`` (KubeRay) hand Serve the same configuration; `serve_config` makes it.
"""

from __future__ import annotations

import hashlib
import re
from typing import TYPE_CHECKING, Any

from rayswift.generate.model_spec import ModelSpec

if TYPE_CHECKING:
    from ray.serve import Application

    from rayswift.arguments import DeployArguments

GATEWAY = "Gateway"


def build_model(args: dict[str, Any]) -> Application:
    """The application of one model. ``args``: a `ModelSpec` as a dictionary."""
    from ray import serve
    from ray.serve.config import AutoscalingConfig

    from rayswift.serve.replica.server import LLMServer

    plan = ModelSpec(**args)
    first = plan.bundles[0]
    options: dict[str, Any] = {
        "name": deployment_name(plan),
        "max_ongoing_requests": plan.max_ongoing_requests,
        "max_queued_requests": plan.max_queued_requests,
        "graceful_shutdown_timeout_s": plan.drain_timeout,
        "health_check_period_s": 5,
        "health_check_timeout_s": 60,
        "placement_group_bundles": plan.bundles,
        "placement_group_strategy": "PACK",
        "ray_actor_options": {
            "num_cpus": first["CPU"] if len(plan.bundles) == 1 and not plan.use_gpu else 1,
            "num_gpus": first.get("GPU", 0) if plan.engine == "transformers" else 0,
            "runtime_env": {"env_vars": plan.env_vars},
        },
    }
    if plan.min_replicas == plan.max_replicas:
        options["num_replicas"] = plan.max_replicas
    else:
        options["autoscaling_config"] = AutoscalingConfig(
            min_replicas=plan.min_replicas,
            max_replicas=plan.max_replicas,
            target_ongoing_requests=plan.target_ongoing_requests,
            upscale_delay_s=plan.upscale_delay,
            downscale_delay_s=plan.downscale_delay,
            look_back_period_s=max(2, min(30, plan.upscale_delay)),
            metrics_interval_s=2,
        )
    return serve.deployment(LLMServer, **options).bind(plan.to_dict())


def build_gateway(args: dict[str, Any]) -> Application:
    """The application of the gateway. ``args``: the arguments of `Gateway`."""
    from ray import serve

    from rayswift.serve.gateway.app import Gateway

    actor: dict[str, Any] = {"num_cpus": 0}
    if args.get("listen"):  # on the head node, where its port is looked for
        actor["resources"] = {"node:__internal_head__": 0.001}
    options = {"name": GATEWAY, "max_ongoing_requests": 100_000, "ray_actor_options": actor}
    return serve.deployment(serve.ingress()(Gateway), **options).bind(**args)


def serve_config(plans: list[ModelSpec], args: DeployArguments, *, listen: bool) -> dict[str, Any]:
    """The configuration of Serve (``ray.serve.schema.ServeDeploySchema``) for these models.

    Args:
        listen: the gateway listens on ``--host`` and ``--port`` itself; else Serve's proxy does.
    """
    models = [
        {"name": app_name(args.app_name, plan), "import_path": f"{__name__}:build_model", "args": plan.to_dict()}
        for plan in plans
    ]
    tls = {key: getattr(args, key) for key in ("ssl_keyfile", "ssl_certfile") if getattr(args, key)}
    optional = ("adapters", "default_adapter", "adapter_root")
    gateway: dict[str, Any] = {
        "models": [
            {"name": plan.name, "app": app_name(args.app_name, plan), "deployment": deployment_name(plan)}
            | {key: getattr(plan, key) for key in optional if getattr(plan, key)}
            for plan in plans
        ],
        "api_keys": [hashlib.sha256(key.encode()).hexdigest() for key in args.api_key],
        "queue_timeout": args.queue_timeout,
        "owned_by": args.owned_by,
    }
    if args.allowed_origins:
        gateway["allowed_origins"] = args.allowed_origins
    if listen:
        gateway["listen"] = {"host": args.host, "port": args.port, **tls}
    # A gateway with a port of its own takes no route of Serve's proxy: several may run on one cluster.
    route = None if listen else "/"
    door = {"name": args.app_name, "import_path": f"{__name__}:build_gateway", "args": gateway, "route_prefix": route}
    return {
        "proxy_location": "Disabled" if listen else "EveryNode",
        "http_options": {"host": args.host, "port": args.port},
        "applications": [*({**app, "route_prefix": None} for app in models), door],
    }


def app_name(app: str, plan: ModelSpec) -> str:
    """Name of a model's application."""
    return f"{app}-{re.sub(r'[^A-Za-z0-9_-]', '-', plan.name)}"


def deployment_name(plan: ModelSpec) -> str:
    """Name of a model's deployment."""
    return f"LLMServer-{re.sub(r'[^A-Za-z0-9_-]', '-', plan.name)}"

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
#: Behind Serve's proxies a further gateway starts when there are more requests than this for each.
REQUESTS_PER_GATEWAY = 100


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
        "placement_group_strategy": plan.placement_strategy,
        "ray_actor_options": {
            "num_cpus": first["CPU"] if len(plan.bundles) == 1 and not plan.use_gpu else 1,
            "num_gpus": first.get("GPU", 0) if plan.engine == "transformers" else 0,
            "runtime_env": {"env_vars": plan.env_vars},
        },
    }
    if plan.node_labels:
        options["placement_group_bundle_label_selector"] = [plan.node_labels] * len(plan.bundles)
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
    """The application of the gateways of one node, or of all behind Serve's proxies.

    ``args``: the arguments of `Gateway`, and ``node`` (its id; without it the head node, where the port is looked for),
    ``drain_timeout``, and for those behind proxies ``num_replicas`` or ``autoscaling_config``.
    """
    from ray import serve

    from rayswift.serve.gateway.app import Gateway

    args = dict(args)
    actor: dict[str, Any] = {"num_cpus": 0}
    if node := args.pop("node", None):
        actor["label_selector"] = {"ray.io/node-id": node}
    elif args.get("listen"):
        actor["resources"] = {"node:__internal_head__": 0.001}
    scale = {key: args.pop(key) for key in ("num_replicas", "autoscaling_config") if key in args}
    deployment = serve.deployment(
        serve.ingress()(Gateway), name=GATEWAY, max_ongoing_requests=100_000, ray_actor_options=actor,
        graceful_shutdown_timeout_s=args.pop("drain_timeout"), **scale,
    )  # fmt: skip
    return deployment.bind(**args)


def build_state(args: dict[str, Any]) -> Application:
    """The application of what several gateways share."""
    from ray import serve

    from rayswift.serve.gateway.shared import STATE, GatewayState

    options = {"num_cpus": 0, "resources": {"node:__internal_head__": 0.001}} if args.get("head") else {"num_cpus": 0}
    deployment = serve.deployment(GatewayState, name=STATE, max_ongoing_requests=10_000, ray_actor_options=options)
    return deployment.bind(is_actor=True)


def serve_config(plans: list[ModelSpec], args: DeployArguments, *, listen: bool) -> dict[str, Any]:
    """The configuration of Serve (``ray.serve.schema.ServeDeploySchema``) for these models.

    The gateways' application comes last; `gateways_on` gives those of further nodes.

    Args:
        listen: the gateways listen on ``--host`` and ``--port`` themselves; else Serve's proxies do.
    """
    models = [
        {"name": app_name(args.app_name, plan), "import_path": f"{__name__}:build_model", "args": plan.to_dict()}
        for plan in plans
    ]
    tls = {key: getattr(args, key) for key in ("ssl_keyfile", "ssl_certfile") if getattr(args, key)}
    optional = ("adapters", "default_adapter", "adapter_root", "fingerprints")
    gateway: dict[str, Any] = {
        "models": [
            {
                "name": plan.name, "app": app_name(args.app_name, plan), "deployment": deployment_name(plan),
                "max_queued_requests": plan.max_queued_requests,
            }
            | {key: getattr(plan, key) for key in optional if getattr(plan, key)}
            | ({} if plan.min_replicas else {"may_sleep": True})
            for plan in plans
        ],
        "api_keys": [hashlib.sha256(key.encode()).hexdigest() for key in args.api_key],
        "queue_timeout": args.queue_timeout,
        "owned_by": args.owned_by,
        "drain_timeout": max(plan.drain_timeout for plan in plans),
    }  # fmt: skip
    if args.allowed_origins:
        gateway["allowed_origins"] = args.allowed_origins
    state = {"name": state_app(args.app_name), "import_path": f"{__name__}:build_state", "args": {"head": listen}}
    if listen:
        # One that is alone keeps everybody else from its port.
        several = (args.num_gateways or 1) > 1 or on_every_node(plans, args)
        gateway["listen"] = {"host": args.host, "port": args.port, **tls} | ({"shared": True} if several else {})
    else:
        several = args.num_gateways != 1
        most = sum(plan.max_replicas for plan in plans)
        scale = {"min_replicas": 1, "max_replicas": most, "target_ongoing_requests": REQUESTS_PER_GATEWAY}
        gateway |= {"num_replicas": args.num_gateways} if args.num_gateways else {"autoscaling_config": scale}
    if several:
        gateway["shared"] = state["name"]
    # A gateway with a port of its own takes no route of Serve's proxy: several may run on one cluster.
    route = None if listen else "/"
    door = {"name": args.app_name, "import_path": f"{__name__}:build_gateway", "args": gateway, "route_prefix": route}
    return {
        "proxy_location": "Disabled" if listen else "EveryNode",
        "http_options": {"host": args.host, "port": args.port},
        "applications": [*({**app, "route_prefix": None} for app in (*models, *([state] if several else ()))), door],
    }  # fmt: skip


def on_every_node(plans: list[ModelSpec], args: DeployArguments) -> bool:
    """Whether gateways listen on every node that has replicas: where other machines can reach them."""
    return not plans[0].local and args.host in ("0.0.0.0", "::") and args.num_gateways != 1


def spread(total: int | None, nodes: list[str]) -> dict[str, int]:
    """How many gateways each node gets: one; or ``total`` in turn, the first nodes first."""
    if total is None:
        return dict.fromkeys(nodes, 1)
    counts = {node: total // len(nodes) + (number < total % len(nodes)) for number, node in enumerate(nodes)}
    return {node: count for node, count in counts.items() if count}


def gateways_on(counts: dict[str, int], door: dict[str, Any], deployed_by: str) -> list[dict[str, Any]]:
    """The applications of the gateways on each node: how many by its id, ``""`` for the head.

    ``deployed_by`` marks whose they are. Numbers and the mark change while the gateways run; all else starts them anew.
    """
    return [
        {
            **door,
            "name": f"{door['name']}{f'--{node[:12]}' if node else ''}",
            "args": door["args"] | ({"node": node} if node else {}),
            "deployments": [{"name": GATEWAY, "num_replicas": count, "user_config": {"deployed_by": deployed_by}}],
        }
        for node, count in counts.items()
    ]


def state_app(app: str) -> str:
    """Name of the application of what several gateways share."""
    return f"{app}--state"


def app_name(app: str, plan: ModelSpec) -> str:
    """Name of a model's application."""
    return f"{app}-{re.sub(r'[^A-Za-z0-9_-]', '-', plan.name)}"


def deployment_name(plan: ModelSpec) -> str:
    """Name of a model's deployment."""
    return f"LLMServer-{re.sub(r'[^A-Za-z0-9_-]', '-', plan.name)}"

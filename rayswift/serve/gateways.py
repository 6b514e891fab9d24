"""Where the gateways of a deployment listen: on the head node, and on a cluster wherever replicas come and go."""

from __future__ import annotations

import logging
import secrets
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from rayswift import private
from rayswift.errors import UserError
from rayswift.generate.model_spec import ModelSpec
from rayswift.serve.application import app_name, gateways_on, on_every_node, serve_config, spread, state_app

if TYPE_CHECKING:
    from rayswift.arguments import DeployArguments

logger = logging.getLogger("rayswift.serve.gateways")


class Gateways:
    """The gateways of one ``rayswift deploy``, and what is deployed with them.

    Raises:
        UserError: another deployment of the cluster listens on ``--port``.
    """

    def __init__(self, args: DeployArguments, specs: list[ModelSpec]) -> None:
        self._args, self._specs, self._deployed_by = args, specs, secrets.token_hex(8)
        self._settings = serve_config(specs, args, listen=True)
        *self._others, self._door = self._settings.pop("applications")
        self._counts: dict[str, int] = {}
        for name, app in private.serve_applications().items():
            listen = _args_of(app).get("listen") or {}
            if listen.get("port") == args.port and not self._is_one(name, app):
                raise UserError(
                    f"--port {args.port}: the deployment {name} of this cluster listens there; choose another port, "
                    f"or --app_name {name} to replace it"
                )

    def deploy(self) -> None:
        """Hand Serve the models and the gateways; applications of other names run on beside.

        The configuration and not ``serve.run``: an application whose part of it has not changed is left alone, so that
        deploying again replaces the models one by one behind gateways that stay.
        """
        self._apply(self._others)

    def follow(self) -> bool:
        """Start and stop gateways where replicas have come and gone; whether any had."""
        if spread(self._args.num_gateways, self._nodes()) == self._counts or not self.is_ours():
            return False
        self._apply([])
        return True

    def is_ours(self) -> bool:
        """Whether nobody has deployed under the same name since."""
        config = (private.serve_applications().get(self._args.app_name) or {}).get("deployed_app_config") or {}
        marks = [one.get("user_config") or {} for one in config.get("deployments") or []]
        return [mark.get("deployed_by") for mark in marks] == [self._deployed_by]

    @property
    def names(self) -> list[str]:
        """Names of their applications, that of the head node first."""
        return [app["name"] for app in gateways_on(self._counts, self._door, "")]

    @property
    def others(self) -> list[str]:
        """Names of the other applications."""
        return [app["name"] for app in self._others]

    def _apply(self, others: list[dict[str, Any]]) -> None:
        from ray import serve

        self._counts = spread(self._args.num_gateways, self._nodes())
        doors = gateways_on(self._counts, self._door, self._deployed_by)
        private.replace_applications({**self._settings, "applications": [*others, *doors]})
        for name, app in private.serve_applications().items():
            unwanted = name == state_app(self._args.app_name) and name not in self.others
            if unwanted or (self._is_one(name, app) and name not in self.names):
                serve.delete(name, _blocking=False)
        if len(self._counts) > 1:
            logger.info("gateways listen on %d nodes", len(self._counts))

    def _is_one(self, name: str, app: dict[str, Any]) -> bool:
        """Whether an application is a gateway of this deployment, also of one that it replaces."""
        own = name == self._args.app_name or name.startswith(f"{self._args.app_name}--")
        return own and "models" in _args_of(app)

    def _nodes(self) -> list[str]:
        """Ids of the nodes where gateways belong; ``""`` is the head."""
        if not on_every_node(self._specs, self._args):
            return [""]
        import ray

        alive = {node["NodeID"]: node["Resources"] for node in ray.nodes() if node["Alive"]}
        nodes = [id_ for id_, resources in alive.items() if "node:__internal_head__" not in resources]
        return ["", *sorted(set(nodes) & set(self._replica_nodes()))]

    def _replica_nodes(self) -> Iterator[str]:
        """Nodes with replicas; and while an application changes, those with gateways. A controller that has just come
        back, with the head or without, knows of no replica that runs, and they all do."""
        apps = private.serve_applications()
        for name in (app_name(self._args.app_name, spec) for spec in self._specs):
            app = apps.get(name) or {}
            if app.get("status", "RUNNING") != "RUNNING":
                yield from self._counts
            for deployment in app.get("deployments", {}).values():
                yield from (one["node_id"] for one in deployment["replicas"] if one["state"] == "RUNNING")


def _args_of(app: dict[str, Any]) -> dict[str, Any]:
    return (app.get("deployed_app_config") or {}).get("args") or {}

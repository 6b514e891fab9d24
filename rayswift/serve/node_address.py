"""The address at which the cluster reaches this process: 127.0.0.1 where Ray was started for one command."""

from __future__ import annotations

from rayswift import private


def node_ip() -> str:
    """The address of this node in the connected cluster."""
    import ray

    return str(ray.util.get_node_ip_address())


def keep_replica_ports_inside() -> None:
    """Have this Serve replica open its gRPC port at the node's address; to be called in a deployment's ``__init__``."""
    private.bind_replica_ports(node_ip())

"""The address at which the cluster reaches this process: 127.0.0.1 where Ray was started for one command."""

from __future__ import annotations


def node_ip() -> str:
    """The address of this node in the connected cluster."""
    import ray

    return str(ray.util.get_node_ip_address())


def keep_replica_ports_inside() -> None:
    """Have this Serve replica open its gRPC port at the node's address; to be called in a deployment's ``__init__``.

    Ray Serve 2.60 opens that port on all interfaces and takes pickles from whoever connects.
    """
    from ray.serve._private import replica

    open_port = replica.add_port_to_grpc_server
    host = node_ip()
    inside = f"[{host}]" if ":" in host else host

    def open_inside(server: object, address: str) -> int:
        return int(open_port(server, address.replace("[::]", inside)))

    replica.add_port_to_grpc_server = open_inside

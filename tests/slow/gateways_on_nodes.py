"""A deployment on two Ray nodes of this machine, the replica on the second one; run by ``test_gateways_on_nodes.py``.

Prints one line of JSON: on how many nodes gateways listened while the replica was there and when it had gone, how many
processes answered on the one port, and what a second deployment was told that wanted the port too.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

import ray
from ray import serve
from ray.cluster_utils import Cluster

from rayswift import private
from rayswift.arguments import make_arguments
from rayswift.errors import UserError
from rayswift.generate.model_spec import ModelSpec
from rayswift.serve.deploy import stop_applications, wait_until_ready
from rayswift.serve.gateways import Gateways

TESTS = Path(__file__).resolve().parents[1]
sys.path += [str(TESTS), str(TESTS / "serve"), str(TESTS / "slow")]


def main() -> None:
    from serving import free_port
    from test_gateways import doors

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
    second = cluster.add_node(num_cpus=1)
    ray.init(address=cluster.address, logging_level="error", log_to_driver=False)
    serve.start(proxy_location="Disabled", http_options={"host": "127.0.0.1"})
    args = make_arguments("deploy", model=".", host="0.0.0.0", port=free_port(), address=cluster.address)
    spec = ModelSpec("words", ".", "transformers", local=False)
    gateways = Gateways(args, [spec])
    path = os.pathsep.join(filter(None, sys.path))
    model = {"import_path": "word_replica:build", "runtime_env": {"env_vars": {"PYTHONPATH": path}}}
    gateways._others[0] |= model
    gateways.deploy()
    wait_until_ready(args, [spec], gateways)
    found = {"nodes": nodes(gateways), "second": second.node_id, "doors": len(doors(args.port))}
    try:
        Gateways(make_arguments("deploy", model=".", port=args.port, app_name="another"), [spec])
    except UserError as error:
        found["refused"] = str(error)
    serve.delete(gateways.others[0])
    followed, end = False, time.monotonic() + 60
    while not (followed := gateways.follow() or followed) and time.monotonic() < end:
        time.sleep(0.2)
    while len(nodes(gateways)) > 1 and time.monotonic() < end:
        time.sleep(0.2)
    found["left"] = nodes(gateways)
    stop_applications([*gateways.names, *gateways.others], 20)
    serve.shutdown()
    ray.shutdown()
    cluster.shutdown()
    print(json.dumps(found))


def nodes(gateways: Gateways) -> list[str]:
    """Where gateways run."""
    apps = [app for name, app in private.serve_applications().items() if gateways._is_one(name, app)]
    return [one["node_id"] for app in apps for dep in app["deployments"].values() for one in dep["replicas"]]


if __name__ == "__main__":
    main()

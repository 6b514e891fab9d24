"""Gateways of a cluster: one on the head node, one on each node that has replicas, for as long as it has."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow


def test_gateways_follow_the_replicas_from_node_to_node() -> None:
    script = Path(__file__).with_name("gateways_on_nodes.py")
    environment = {**os.environ, "RAY_USAGE_STATS_ENABLED": "0"}
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stderr[-4000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert len(found["nodes"]) == found["doors"] == 2
    assert found["second"] in found["nodes"]
    assert len(found["left"]) == 1
    assert found["second"] not in found["left"]
    assert "the deployment rayswift" in found["refused"]

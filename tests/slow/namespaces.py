"""Ray nodes with addresses of their own on one machine: each in namespaces of its own, like a machine that one can cut
off or switch off.

A node has its own network (a ``veth`` to a bridge that is in a namespace too), host name, processes, ``/tmp``,
``/dev/shm`` and home: what it shares with the others is the folders that the test names, as on a real cluster.
Everything of a node ends with its first process, and that with the test's.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import pytest

ROOT = Path(__file__).resolve().parents[2]
HEAD_ADDRESS = "10.77.0.1"
#: What `ray start` says at last.
STARTED = "Ray runtime started"
#: What Ray takes at least, in bytes.
OBJECT_STORE = 80 * 2**20
_FAKE_HEAD = "f" * 51 + "00000"
_NAMESPACE = ["unshare", "--net", "--mount", "--uts", "--pid", "--fork", "--mount-proc", "--kill-child"]
#: Its own /tmp and home, with the shared folders at their places: $1 the host's name, $2 the addresses, then folders.
_PREPARE = """
set -e
hostname "$1"; hosts="$2"; shift 2
mount -t tmpfs none /mnt
number=0
for folder; do number=$((number + 1)); mkdir /mnt/$number; mount --bind "$folder" /mnt/$number; done
for own in /tmp /dev/shm; do mount -t tmpfs -o mode=1777 none $own; done
number=0
for folder; do number=$((number + 1)); mkdir -p "$folder"; mount --bind /mnt/$number "$folder"; done
mkdir /tmp/home; printf '%s' "$hosts" > /tmp/hosts; mount --bind /tmp/hosts /etc/hosts
ip link set lo up
sleep infinity
"""


@dataclass
class Node:
    """One of the nodes; ``pid`` is its first process, as this machine counts."""

    name: str
    address: str
    pid: int
    link: str
    log: Path
    environment: dict[str, str]
    _switch: int = field(repr=False)

    def start(self, *command: str, log: Path, **environment: str) -> subprocess.Popen[bytes]:
        """A command on this node, which ends with it; its output goes to ``log``."""
        return subprocess.Popen(
            ["nsenter", "--target", str(self.pid), "--net", "--mount", "--uts", "--pid", "--wd=.", *command],
            stdout=log.open("ab"), stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, cwd=ROOT,
            env={**self.environment, **environment}, start_new_session=True,
        )  # fmt: skip

    def ask(self, program: str, timeout: float = 120) -> Any:
        """What a Python program that is connected to Ray here prints last, as JSON."""
        log = self.log.with_suffix(f".{secrets.token_hex(4)}.ask")
        head = "import json, ray, logging\nray.init(address='auto', logging_level='error', log_to_driver=False)\n"
        status = self.start(sys.executable, "-c", head + program, log=log).wait(timeout)
        assert status == 0, log.read_text()
        return json.loads(log.read_text().splitlines()[-1])

    def cut(self) -> None:
        """Pull the network cable."""
        _run("nsenter", "--target", str(self._switch), "--net", "ip", "link", "set", self.link, "down")

    def join(self) -> None:
        """Plug it in again."""
        _run("nsenter", "--target", str(self._switch), "--net", "ip", "link", "set", self.link, "up")

    def disturb(self, *netem: str) -> None:
        """Delay or lose what comes to this node, in the words of ``tc … netem``: ``delay``, ``50ms``, ``loss``, ``1%``.
        Skips the test where the kernel has no netem."""
        command = ["tc", "qdisc", "replace", "dev", self.link, "root", "netem", *netem]
        done = subprocess.run(
            ["nsenter", "--target", str(self._switch), "--net", *command], capture_output=True, text=True, check=False
        )
        if "qdisc kind is unknown" in done.stderr:
            pytest.skip("this kernel has no netem: links cannot be slow or lossy")
        assert done.returncode == 0, done.stderr

    def kill(self) -> None:
        """Switch it off: no process of it lives to see what happened, and none of its connections says goodbye."""
        self.cut()
        psutil.Process(self.pid).kill()


class Nodes:
    """Nodes on one bridge. ``folder``: for logs, and shared by all nodes; ``shared``: other folders that are."""

    def __init__(self, folder: Path, *shared: Path) -> None:
        self.folder, self._shared = folder, [folder, ROOT, *shared]
        self.nodes: dict[str, Node] = {}
        self._processes: list[subprocess.Popen[bytes]] = []
        self._switch = self._first_process("switch", "ip link add br0 type bridge; ip link set br0 up; sleep infinity")
        self.environment = {
            **{key: value for key, value in os.environ.items() if not key.startswith("RAY_")},
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
            "PYTHONPATH": str(ROOT), "HOME": "/tmp/home", "TMPDIR": "/tmp", "HF_HUB_OFFLINE": "1",
            "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32),
            # A node sees the memory of the whole machine: others' use of it is no reason to end its processes.
            "RAY_memory_monitor_refresh_ms": "0", "RAY_raylet_start_wait_time_s": "150",
            "RAY_USAGE_STATS_ENABLED": "0", "OMP_NUM_THREADS": "1",
        }  # fmt: skip

    def _first_process(self, name: str, script: str, *arguments: str) -> int:
        """The first process of new namespaces, as this machine counts; it dies with this one."""
        command = ["setpriv", "--pdeathsig", "KILL", *_NAMESPACE, "sh", "-c", script, name, *arguments]
        with (self.folder / f"{name}.namespace").open("w") as log:
            process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
        self._processes.append(process)
        for _ in range(100):
            time.sleep(0.05)
            found = psutil.Process(process.pid).children() if process.poll() is None else []
            if found and any(child.name() == "sleep" for child in found[0].children()):
                return found[0].pid
        raise AssertionError(f"namespaces: {Path(log.name).read_text()}")

    def add(self, name: str, *flags: str, wait: bool = True, **environment: str) -> Node:
        """A node that has joined Ray; the first one is the head. ``flags``: more of ``ray start``'s. One of a name that
        has been switched off is switched on again: empty, at its old address."""
        number = [*dict.fromkeys([*self.nodes, name])].index(name) + 1
        address = f"10.77.0.{number}"
        # A host's name leads to its address everywhere, as torch's process groups expect.
        known = {**{one.name: one.address for one in self.nodes.values()}, name: address}
        hosts = "127.0.0.1 localhost\n" + "".join(f"{at} {one}\n" for one, at in known.items())
        pid = self._first_process(name, _PREPARE, name, hosts, *map(str, self._shared))
        link = f"n{len(self._processes)}"
        inside = ["nsenter", "--target", str(pid), "--net", "ip"]
        switch = ["nsenter", "--target", str(self._switch), "--net", "ip"]
        own = ["eth0", "address", f"02:00:0a:4d:00:{number:02x}"]
        _run(*inside, "link", "add", *own, "type", "veth", "peer", "name", link, "netns", str(self._switch))
        _run(*inside, "address", "add", f"{address}/24", "dev", "eth0")
        _run(*inside, "link", "set", "eth0", "up")
        _run(*switch, "link", "set", link, "master", "br0", "up")
        node = Node(name, address, pid, link, self.folder / f"{name}.log", self.environment, self._switch)
        for other in self.nodes.values():
            if other.name != name and psutil.pid_exists(other.pid):
                line = shlex.quote(f"{address} {name}")
                _run("nsenter", "--target", str(other.pid), "--mount", "sh", "-c", f"echo {line} >> /tmp/hosts")
        self.nodes[name] = node
        before = node.log.read_text().count(STARTED) if node.log.exists() else 0
        self.start_ray(node, *flags, **environment)
        if wait:
            self.wait_for_ray(node, before + 1)
        return node

    def start_ray(self, node: Node, *flags: str, **environment: str) -> None:
        """``ray start`` on a node: the head where it is the first."""
        place = ["--address", f"{HEAD_ADDRESS}:6379"]
        if node.address == HEAD_ADDRESS:
            place = ["--head", "--port", "6379", "--dashboard-host", "127.0.0.1"]
        flags = ("--node-ip-address", node.address, "--object-store-memory", str(OBJECT_STORE), "--block", *flags)
        command = [f"{Path(sys.executable).parent}/ray", "start", *place, *flags]
        process = node.start(*command, log=node.log, **environment)
        self._processes.append(process)

    def add_autoscaling_head(self, types: dict[str, dict[str, Any]], idle_minutes: float = 0.2) -> Node:
        """A head without CPUs whose autoscaler (version 2) starts nodes of these types, by Ray's own provider of fake
        nodes (`machines.py`): real raylets on the head's address, which end when they are idle.

        Args:
            types: for each its ``resources``, ``max_workers``, and ``labels``.
        """
        head = "ray.head.default"  # the provider's name for it
        empty_lists = ("initialization_commands", "setup_commands", "head_setup_commands", "worker_setup_commands",
                       "head_start_ray_commands", "worker_start_ray_commands", "cluster_synced_files", "rsync_exclude",
                       "rsync_filter")  # fmt: skip
        node_types = {head: {"resources": {"CPU": 0}, "max_workers": 0, "node_config": {}}}
        for name, one in types.items():
            resources = {"object_store_memory": OBJECT_STORE, **one["resources"]}
            node_types[name] = {"min_workers": 0, "node_config": {}, **one, "resources": resources}
        config = {
            "cluster_name": "fake", "max_workers": 8, "upscaling_speed": 4.0, "idle_timeout_minutes": idle_minutes,
            "provider": {  # named by its class: what Ray reads for its type `fake_multinode` is not in its wheel
                "type": "external", "module": "machines.Machines", "use_node_id_as_ip": True,
                "disable_node_updaters": True,
                "disable_launch_config_check": True, "launch_multiple": True, "head_node_id": _FAKE_HEAD,
                "gcs_address": f"{HEAD_ADDRESS}:6379",
            },
            "available_node_types": node_types, "head_node_type": head, "auth": {}, "docker": {}, "file_mounts": {},
            "file_mounts_sync_continuously": False, **{name: [] for name in empty_lists},
        }  # fmt: skip
        file = self.folder / "autoscaling.yaml"
        file.write_text(json.dumps(config))  # which YAML is
        return self.add(
            "head", "--num-cpus", "0", "--autoscaling-config", str(file), RAY_FAKE_CLUSTER="1",
            PYTHONPATH=f"{ROOT}{os.pathsep}{Path(__file__).parent}", AUTOSCALER_UPDATE_INTERVAL_S="1",
            RAY_enable_autoscaler_v2="1", RAY_CLOUD_INSTANCE_ID=_FAKE_HEAD,
            RAY_OVERRIDE_NODE_ID_FOR_TESTING=_FAKE_HEAD,
        )  # fmt: skip

    def wait_for_ray(self, node: Node, times: int = 1, timeout: float = 240) -> None:
        """Until Ray runs on a node (has been started there so many times)."""
        deadline = time.monotonic() + timeout
        while node.log.read_text().count(STARTED) < times:
            assert time.monotonic() < deadline, node.log.read_text()
            time.sleep(0.3)

    def close(self) -> None:
        """End all nodes."""
        for process in reversed(self._processes):
            process.kill()
            process.wait(30)


def send(process: subprocess.Popen[bytes], number: signal.Signals) -> None:
    """A signal to a command that :meth:`Node.start` started: its process is the one that waits for it."""
    for command in psutil.Process(process.pid).children():
        command.send_signal(number)


@contextlib.contextmanager
def nodes(folder: Path, *shared: Path) -> Iterator[Nodes]:
    """:class:`Nodes` that end with the block; skips the test where the kernel forbids namespaces."""
    tried = subprocess.run([*_NAMESPACE, "true"], capture_output=True, text=True, check=False)
    if tried.returncode:
        pytest.skip(f"this machine makes no namespaces: {tried.stderr.strip()}")
    found = Nodes(folder, *shared)
    try:
        yield found
    finally:
        found.close()


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{' '.join(command)}: {done.stderr}"

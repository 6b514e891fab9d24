"""Starts a probe on every node of the connected cluster, asks, and ends them."""

from __future__ import annotations

import os
import secrets
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from rayswift.cluster.doctor import checks
from rayswift.cluster.doctor.checks import Finding, Level
from rayswift.cluster.doctor.probe import NodeProbe
from rayswift.console import say
from rayswift.errors import one_line

if TYPE_CHECKING:
    from rayswift.cluster.connection import Cluster

#: Seconds for a node to start a process and import Ray, for any answer, and for the processes of an all-reduce.
START_SECONDS, ASK_SECONDS, REDUCE_SECONDS = 120, 60, 180
#: Each node tries so many others' ports at most: in a ring they reach all.
NEIGHBOURS = 16


@dataclass(frozen=True)
class Examination:
    """What was found. ``nodes``: the reports by address."""

    findings: list[Finding]
    nodes: dict[str, dict[str, Any]]

    @property
    def is_well(self) -> bool:
        """Whether no finding is an error."""
        return all(finding.level is not Level.ERROR for finding in self.findings)

    def as_json(self) -> dict[str, Any]:
        """For scripts."""
        return {"ok": self.is_well, "findings": [asdict(finding) for finding in self.findings], "nodes": self.nodes}


def examine(
    *, storage: str | None = None, checkpoint: int = 0, refusal: str | None = None, hub: str | None = None,
    quick: bool = False,
) -> Examination:  # fmt: skip
    """Examine the connected cluster.

    Args:
        storage: the folder or URI that results will go to; None checks none.
        checkpoint: bytes of a checkpoint, 0 where nothing is known of it.
        refusal: why the cluster cannot give what a command asks for, if so.
        hub: the address of the hub that models come from; None asks none.
        quick: only what takes seconds: no bandwidth, no all-reduce, no hub.
    """
    import ray

    alive = [node for node in ray.nodes() if node["Alive"]]
    findings = list(checks.check_nodes(ray.nodes()))
    probes, reports = _start(alive, findings)
    try:
        nodes = {name: node for node in alive if (name := _name(node, alive)) in probes}
        if probes:
            findings.extend(_find(probes, reports, nodes, storage, checkpoint, refusal, None if quick else hub))
        if not quick and len(probes) > 1:
            findings.extend(checks.check_bandwidth(_speeds(probes, nodes), _gpus(nodes) > 0))
        if not quick:
            findings.extend(_reduce(probes, nodes))
    except ray.exceptions.RayError as error:
        mend = "the logs of Ray there (raylet.out, dmesg): memory, disk, the network"
        findings.append(Finding("nodes", Level.ERROR, f"one answers no more ({one_line(error)})", mend))
    finally:
        for probe in probes.values():
            ray.kill(probe)
    return Examination(findings, {name: dict(report) for name, report in reports.items()})


def _name(node: dict[str, Any], alive: list[dict[str, Any]]) -> str:
    """A node's address; with its port where several have one address."""
    address = str(node["NodeManagerAddress"])
    shared = sum(one["NodeManagerAddress"] == address for one in alive) > 1
    return f"{address}:{node['NodeManagerPort']}" if shared else address


def _probe_on(node: dict[str, Any], **options: Any) -> Any:
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    place = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
    return ray.remote(NodeProbe).options(num_cpus=0, max_concurrency=4, scheduling_strategy=place, **options).remote()


def _start(alive: list[dict[str, Any]], findings: list[Finding]) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """The probes that answer, and their reports; a finding for each of the others."""
    import ray

    started = {_name(node, alive): _probe_on(node) for node in alive}
    asked = {name: probe.facts.remote() for name, probe in started.items()}
    ray.wait(list(asked.values()), num_returns=len(asked), timeout=START_SECONDS)
    reports = {}
    for name, answer in asked.items():
        try:
            reports[name] = ray.get(answer, timeout=0.1)
        except Exception as error:
            why = "no answer" if isinstance(error, ray.exceptions.GetTimeoutError) else one_line(error)
            mend = "the same environment on every node, and memory and disk for a process"
            findings.append(Finding("nodes", Level.ERROR, f"{name}: nothing of RaySwift runs there ({why})", mend))
            ray.kill(started[name])
    return {name: started[name] for name in reports}, reports


def _find(
    probes: dict[str, Any],
    reports: dict[str, dict[str, Any]],
    nodes: dict[str, dict[str, Any]],
    storage: str | None,
    checkpoint: int,
    refusal: str | None,
    hub: str | None,
) -> Iterator[Finding]:
    """What needs no load."""
    resources = {name: node["Resources"] for name, node in nodes.items()}
    yield from checks.check_versions(reports)
    yield from checks.check_clocks({name: _offset(probe) for name, probe in probes.items()})
    yield from checks.check_accelerators(reports, {n: one.get("GPU", 0) for n, one in resources.items()}, refusal)
    stores = {name: one.get("object_store_memory", 0) for name, one in resources.items()}
    yield from checks.check_shared_memory(reports, stores)
    yield from checks.check_limits(reports)
    free = _ask(probes, "free", storage) if storage else {}
    yield from checks.check_disks(reports, storage, free, checkpoint)
    yield from _check_storage(probes, storage)
    if len(nodes) > 1:
        yield from checks.check_ports(_unreached(probes, nodes))
    if hub:
        yield from checks.check_hub({n: why for n, why in _ask(probes, "reaches_hub", hub).items() if why}, hub)


def _ask(probes: dict[str, Any], method: str, *args: Any) -> dict[str, Any]:
    import ray

    asked = [getattr(probe, method).remote(*args) for probe in probes.values()]
    return dict(zip(probes, ray.get(asked, timeout=ASK_SECONDS), strict=True))


def _offset(probe: Any) -> tuple[float, float]:
    """How far a node's clock is from this one, and half the time that asking took."""
    import ray

    tries = []
    for _ in range(3):
        started = time.time()
        there = ray.get(probe.clock.remote(), timeout=ASK_SECONDS)
        took = time.time() - started
        tries.append((took / 2, there - started - took / 2))
    error, offset = min(tries)
    return offset, error


def _check_storage(probes: dict[str, Any], storage: str | None) -> Iterator[Finding]:
    """Every node writes a file, then every node reads all of them."""
    import ray

    if storage is None:
        yield from checks.check_storage(None, {}, {})
        return
    folder, text = f"{storage.rstrip('/')}/.rayswift-doctor-{secrets.token_hex(8)}", secrets.token_hex(8)
    writes = {name: probe.write.remote(folder, _file(name), text) for name, probe in probes.items()}
    failed = {name: why for name, answer in writes.items() if (why := ray.get(answer, timeout=ASK_SECONDS))}
    able = {name: probe for name, probe in probes.items() if name not in failed}
    files = {_file(name): name for name in able}
    found = _ask(able, "missing", folder, list(files), text)
    yield from checks.check_storage(storage, failed, {n: [files[file] for file in lost] for n, lost in found.items()})
    _ask(able, "remove", folder)  # where it is not shared, each has a folder of its own


def _file(name: str) -> str:
    return name.replace(":", "-")


def _unreached(probes: dict[str, Any], nodes: dict[str, dict[str, Any]]) -> dict[str, list[str]]:
    """Ray's ports of the nodes that come after each one in a ring, and of the head."""
    import ray

    names = list(probes)
    asked = {}
    for place, name in enumerate(names):
        head = [one for one in names if "node:__internal_head__" in nodes[one]["Resources"]]
        others = [*head, *(names[place + 1 :] + names[:place])[:NEIGHBOURS]]
        ports = {(nodes[one]["NodeManagerAddress"], nodes[one][kind]) for one in others if one != name
                 for kind in ("NodeManagerPort", "ObjectManagerPort")}  # fmt: skip
        asked[name] = probes[name].reaches.remote(sorted(ports))
    return {name: ray.get(answer, timeout=120 + ASK_SECONDS) for name, answer in asked.items()}


def _speeds(probes: dict[str, Any], nodes: dict[str, dict[str, Any]]) -> dict[str, float | str]:
    """Bytes per second from each node to the next, one pair after the other; why, where there is none."""
    import ray

    names, found = list(probes), dict[str, float | str]()
    for source, target in zip(names, [*names[1:], names[0]], strict=True):
        try:
            port = ray.get(probes[target].listen.remote(), timeout=ASK_SECONDS)
            sent = probes[source].send.remote(nodes[target]["NodeManagerAddress"], port)
            found[f"{source} → {target}"] = ray.get(sent, timeout=ASK_SECONDS)
        except Exception as error:
            found[f"{source} → {target}"] = one_line(error)
    return found


def _gpus(nodes: dict[str, dict[str, Any]]) -> int:
    return sum(int(node["Resources"].get("GPU", 0)) for node in nodes.values())


def _reduce(probes: dict[str, Any], nodes: dict[str, dict[str, Any]]) -> Iterator[Finding]:
    """NCCL over all GPUs, gloo over all nodes: whichever has several."""
    import ray

    if _gpus(nodes) > 1:
        ranks = [_probe_on(node, num_gpus=1) for node in nodes.values() for _ in range(int(node["Resources"]["GPU"]))]
        try:
            answers = [rank.clock.remote() for rank in ranks]
            _, late = ray.wait(answers, num_returns=len(ranks), timeout=START_SECONDS)
            speed = f"not tested: {len(late)} GPUs are in use" if late else _all_reduce(ranks, "nccl", nodes)
            yield from checks.check_all_reduce("nccl", len(ranks), speed)
        finally:
            for rank in ranks:
                ray.kill(rank)
    elif len(probes) > 1:
        yield from checks.check_all_reduce("gloo", len(probes), _all_reduce(list(probes.values()), "gloo", nodes))


def _all_reduce(ranks: list[Any], backend: str, nodes: dict[str, dict[str, Any]]) -> float | str:
    import ray

    try:
        first = next(iter(nodes.values()))["NodeManagerAddress"]
        address = f"{first}:{ray.get(ranks[0].free_port.remote(), timeout=ASK_SECONDS)}"
        asked = [rank.all_reduce.remote(number, len(ranks), address, backend) for number, rank in enumerate(ranks)]
        return min(ray.get(asked, timeout=REDUCE_SECONDS))
    except Exception as error:
        return one_line(error)


def default_hub(use_hf: bool) -> str:
    """The address that nodes download models from."""
    if use_hf:
        return os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    return f"https://{os.environ.get('MODELSCOPE_DOMAIN', 'www.modelscope.cn')}"


def quick_look(cluster: Cluster, storage: str) -> None:
    """Before a long job on several nodes: say what is wrong, in the seconds that the quick part takes."""
    if cluster.embedded or cluster.nodes < 2:
        return
    for finding in examine(storage=storage, quick=True).findings:
        if finding.level is not Level.OK:
            say(f"{finding.level}: {finding.check}: {finding.message} (mend: {finding.mend})")

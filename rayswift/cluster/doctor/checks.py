"""What the nodes' reports mean: each check is a function from reports to findings, and each finding names its mend."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

GIB = 2**30
#: Seconds by which clocks may differ: logs and checkpoints of two nodes are put in order by them.
CLOCK_SECONDS, CLOCK_LIMIT = 2.0, 60.0
#: What Ray's documents ask for; a busy head has a connection to every worker.
OPEN_FILES = 65536
#: Bytes per second between two nodes below which training over them waits for the network: 1 and 10 GBit/s.
SLOW_CPU, SLOW_GPU = 0.11e9, 1.1e9


class Level(StrEnum):
    """How bad a finding is; an error would end or spoil a job."""

    OK = "ok"
    WARNING = "warning"
    ERROR = "error"


@dataclass(frozen=True)
class Finding:
    """One line of the report. ``mend``: what to do about it."""

    check: str
    level: Level
    message: str
    mend: str = ""


#: Ray's numbers for nodes that ended as they should: stopped, taken away by their cloud, or idle.
ENDED = (1, 3, 4)

#: What a node reported, by its address.
Reports = Mapping[str, Mapping[str, Any]]


def check_nodes(nodes: Sequence[Mapping[str, Any]]) -> Iterator[Finding]:
    """No node of Ray's list was lost and has not come back."""
    alive = {node["NodeManagerAddress"] for node in nodes if node["Alive"]}
    lost = {node["NodeManagerAddress"] for node in nodes if not node["Alive"] and node.get("DeathReason") not in ENDED}
    if dead := sorted(lost - alive):
        yield Finding("nodes", Level.WARNING, f"dead: {some(dead)}", "ray start on them again")


def check_versions(reports: Reports) -> Iterator[Finding]:
    """The same Python and packages everywhere."""
    versions = {address: {"python": one["python"], **one["packages"]} for address, one in reports.items()}
    wrong = 0
    for name in sorted({name for one in versions.values() for name in one}):
        found: dict[str, list[str]] = {}
        for address, one in versions.items():
            found.setdefault(one.get(name, "missing"), []).append(address)
        if len(found) > 1:
            wrong += 1
            shown = "; ".join(f"{version} on {some(nodes)}" for version, nodes in sorted(found.items()))
            yield Finding("versions", Level.ERROR, f"{name} differs: {shown}",
                          "install one environment (the same image or constraints file) on every node")  # fmt: skip
    if not wrong:
        one = next(iter(versions.values()))
        yield Finding("versions", Level.OK, f"Python {one['python']}, Ray {one.get('ray')} and "
                      f"{len(one) - 2} packages are the same on {len(reports)} nodes")  # fmt: skip


def check_clocks(offsets: Mapping[str, tuple[float, float]]) -> Iterator[Finding]:
    """Clocks agree. ``offsets``: seconds from this one, and how far that may be off."""
    sure = {address: max(abs(offset) - error, 0.0) for address, (offset, error) in offsets.items()}
    late = {address: seconds for address, seconds in sure.items() if seconds > CLOCK_SECONDS}
    for address, seconds in late.items():
        level = Level.ERROR if seconds > CLOCK_LIMIT else Level.WARNING
        yield Finding("clocks", level, f"{address}: its clock is {seconds:.1f} s off", "start chrony or ntpd there")
    if not late:
        yield Finding("clocks", Level.OK, f"within {max(sure.values(), default=0):.2f} s")


def check_shared_memory(reports: Reports, object_store: Mapping[str, float]) -> Iterator[Finding]:
    """``/dev/shm`` holds Ray's objects, and what NCCL and loaders share."""
    small = [address for address, one in reports.items()
             if one["shm"][1] is not None and one["shm"][1] < object_store.get(address, 0)]  # fmt: skip
    if small:
        yield Finding("/dev/shm", Level.WARNING, f"smaller than Ray's object store on {some(small)}: objects go to a "
                      "disk", "docker run --shm-size=…, or in Kubernetes an emptyDir with medium: Memory at /dev/shm; "
                      "or ray start --object-store-memory lower")  # fmt: skip
    else:
        least = min((one["shm"][1] or 0 for one in reports.values()), default=0)
        yield Finding("/dev/shm", Level.OK, f"at least {least / GIB:.1f} GiB on each node")


def check_limits(reports: Reports) -> Iterator[Finding]:
    """Open files."""
    few = [address for address, one in reports.items() if (one["open_files"] or OPEN_FILES) < OPEN_FILES]
    if few:
        yield Finding("limits", Level.WARNING, f"fewer than {OPEN_FILES} open files on {some(few)}",
                      f"ulimit -n {OPEN_FILES} before ray start")  # fmt: skip


def check_disks(
    reports: Reports, storage: str | None, free: Mapping[str, int | None], checkpoint: int
) -> Iterator[Finding]:
    """Room for two checkpoints where they are made (Ray's folder) and where they are kept."""
    need = max(2 * checkpoint, GIB)
    what = f"two checkpoints of {checkpoint / GIB:.1f} GiB" if checkpoint else "1 GiB"
    places = {
        ("Ray's folder", "ray start --temp-dir on a larger disk"): {a: one["tmp"][0] for a, one in reports.items()}
    }
    if storage:
        places[(storage, "delete old runs, --save_total_limit lower, or another --storage_path")] = dict(free)
    for (place, mend), sizes in places.items():
        full = {address: size for address, size in sizes.items() if size is not None and size < need}
        for address, size in full.items():
            text = f"{address}: {place} has {size / GIB:.1f} GiB free, not enough for {what}"
            yield Finding("disk", Level.ERROR, text, mend)
        known = [size for size in sizes.values() if size is not None]
        if known and not full:
            yield Finding("disk", Level.OK, f"{place}: at least {min(known) / GIB:.0f} GiB free on each node")


def check_storage(folder: str | None, failed: Mapping[str, str], missing: Mapping[str, list[str]]) -> Iterator[Finding]:
    """Whether what one node writes is read on all. ``missing``: node → nodes whose file it does not see."""
    if folder is None:
        yield Finding("storage", Level.WARNING, "not checked", "give --storage_path, or the command that is to run")
        return
    for address, why in failed.items():
        yield Finding("storage", Level.ERROR, f"{address} cannot write below {folder}: {why}",
                      "mount it there, or let the node's user or role write to it")  # fmt: skip
    apart = {address: others for address, others in missing.items() if others}
    if apart:
        address, others = next(iter(apart.items()))
        more = f", nor do {len(apart) - 1} other nodes" if len(apart) > 1 else ""
        yield Finding("storage", Level.ERROR,
                      f"{folder} is not shared: {address} does not see what {some(others)} wrote{more}",
                      "a shared file system mounted at the same path on every node, or a bucket (s3://…)")  # fmt: skip
    if not failed and not apart:
        yield Finding("storage", Level.OK, f"{folder}: written on each of {len(missing)} nodes, read on all")


def check_hub(unreached: Mapping[str, str], url: str) -> Iterator[Finding]:
    """Nodes download models for themselves."""
    if not unreached:
        yield Finding("hub", Level.OK, f"{url} answers every node")
    else:
        why = next(iter(unreached.values()))
        yield Finding("hub", Level.WARNING, f"{url} does not answer {some(list(unreached))} ({why})",
                      "a mirror (HF_ENDPOINT, MODELSCOPE_DOMAIN) or a proxy (HTTPS_PROXY) on the nodes; or models as "
                      "paths on shared storage and HF_HUB_OFFLINE=1")  # fmt: skip


def check_ports(unreached: Mapping[str, list[str]]) -> Iterator[Finding]:
    """Ray's ports of each node, from each other one."""
    closed = {address: places for address, places in unreached.items() if places}
    for address, places in closed.items():
        yield Finding("ports", Level.ERROR, f"{address} does not reach {some(places)}",
                      "let nodes speak to each other at all ports (a security group that allows itself), or fix Ray's: "
                      "--node-manager-port, --object-manager-port, --min-worker-port, --max-worker-port")  # fmt: skip
    if not closed:
        yield Finding("ports", Level.OK, "each node reaches Ray on the others")


def check_bandwidth(speeds: Mapping[str, float | str], has_gpus: bool) -> Iterator[Finding]:
    """Bytes per second between nodes, ``FROM → TO``; a text says why there is none."""
    limit = SLOW_GPU if has_gpus else SLOW_CPU
    for way, speed in speeds.items():
        if isinstance(speed, str):
            yield Finding("network", Level.ERROR, f"{way}: {speed}", "let nodes speak to each other at all ports")
        elif speed < limit:
            yield Finding("network", Level.WARNING, f"{way}: {speed * 8 / 1e9:.2f} GBit/s",
                          "nodes of one zone and placement group; --node-ip-address of the fast one")  # fmt: skip
    known = [speed for speed in speeds.values() if not isinstance(speed, str)]
    if known and min(known) >= limit:
        yield Finding("network", Level.OK, f"at least {min(known) * 8 / 1e9:.1f} GBit/s between nodes")


def check_all_reduce(backend: str, ranks: int, speed: float | str | None) -> Iterator[Finding]:
    """The collective that training waits for."""
    if isinstance(speed, str):
        mend = {
            "gloo": "GLOO_SOCKET_IFNAME, the interface of the nodes' addresses; /etc/hosts must not give a node's own "
                    "name 127.0.0.1",
            "nccl": "NCCL_DEBUG=INFO says where it stops; NCCL_SOCKET_IFNAME, on EFA FI_PROVIDER=efa and its plugin",
        }[backend]  # fmt: skip
        level = Level.WARNING if speed.startswith("not tested") else Level.ERROR
        yield Finding("all-reduce", level, f"{backend} over {ranks} ranks: {speed}", mend)
    elif speed is not None:
        yield Finding("all-reduce", Level.OK, f"{backend} over {ranks} ranks: {speed / 1e9:.2f} GB/s")


def check_accelerators(reports: Reports, counted: Mapping[str, float], refusal: str | None) -> Iterator[Finding]:
    """What the drivers show against what Ray counts, and against what is asked for (``refusal``: why it cannot be)."""
    for address, one in reports.items():
        seen = len(one["gpus"])
        if seen != counted.get(address, 0) and (seen or counted.get(address)):
            text = f"{address}: its driver shows {seen} GPUs and Ray counts {counted.get(address, 0):g}"
            mend = "nvidia-smi there; then ray start anew, without --num-gpus and CUDA_VISIBLE_DEVICES"
            yield Finding("accelerators", Level.ERROR, text, mend)
    kinds = Counter(f"{gpu['name']} (driver {gpu['driver']})" for one in reports.values() for gpu in one["gpus"])
    if len(kinds) > 1:
        yield Finding("accelerators", Level.WARNING, f"different ones: {', '.join(sorted(kinds))}",
                      "the slowest sets the pace: one kind for a run (--num_nodes)")  # fmt: skip
    if refusal:
        message, _, mend = refusal.partition("; ")
        yield Finding("accelerators", Level.ERROR, message, mend or "ask for less, or start more nodes")
    elif kinds:
        yield Finding("accelerators", Level.OK, ", ".join(f"{count} × {kind}" for kind, count in sorted(kinds.items())))
    else:
        yield Finding("accelerators", Level.OK, "none: training on CPUs")


def some(names: Sequence[str], most: int = 4) -> str:
    """The first of them, and how many more there are."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")

"""Which nodes take what: their labels, and what one node of a cluster can hold at all.

Nodes with the label ``ray-subcluster=data`` read and encode, and take no training. Ray Data knows the label: without a
word about it, it reckons with the nodes that do not carry it at all.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from rayswift import private

SUBCLUSTER = "ray-subcluster"
DATA = "data"
#: Labels that Ray itself gives: the type of the autoscaler's that a node is of, and the node's id.
GROUP, NODE = "ray.io/node-group", "ray.io/node-id"


@dataclass(frozen=True)
class NodeKind:
    """``count`` nodes with these resources and labels, some of which the autoscaler may have to start first. Labels are
    None where they are not known: of a type of which no node runs."""

    resources: Mapping[str, float]
    labels: Mapping[str, str] | None
    count: int = 1

    def takes(self, selector: Mapping[str, str]) -> bool:
        """Whether a label selector of Ray's may mean these nodes."""
        labels = self.labels
        return labels is None or all(_matches(labels.get(key), wanted) for key, wanted in selector.items())

    def room(self, bundle: Mapping[str, float]) -> int:
        """How many times one of these nodes has the resources."""
        needs = [(self.resources.get(name, 0), amount) for name, amount in bundle.items() if amount > 0]
        return min((int(has / amount + 1e-9) for has, amount in needs), default=sys.maxsize)


def _matches(label: str | None, wanted: str) -> bool:
    """``value``, ``in(a, b)``, ``!value`` or ``!in(a, b)``; the last two also mean nodes without the label."""
    positive = wanted.removeprefix("!")
    if positive.startswith("in("):
        found = label in [one.strip() for one in positive[3:-1].split(",")]
    else:
        found = label == positive
    return found == (positive == wanted)


def node_kinds() -> tuple[NodeKind, ...]:
    """The nodes of the connected cluster, and those that its autoscaler may still start."""
    import ray

    nodes = [node for node in ray.nodes() if node["Alive"]]
    running = Counter(node["Labels"].get(GROUP) for node in nodes)
    kinds = [NodeKind(node["Resources"], node["Labels"]) for node in nodes]
    for name, resources, most in private.autoscaler_types():
        alike = [node["Labels"] for node in nodes if node["Labels"].get(GROUP) == name]
        labels = {key: value for key, value in alike[0].items() if key != NODE} if alike else None
        kinds.append(NodeKind(resources, labels, most - running[name]))
    return tuple(kind for kind in kinds if kind.count > 0)


def total(kinds: Iterable[NodeKind], name: str) -> float:
    """What all these nodes have of a resource."""
    return sum(kind.resources.get(name, 0) * kind.count for kind in kinds)


def most_free_cpus(selector: Mapping[str, str]) -> float:
    """The CPUs that nobody has asked for, of the node with most of them."""
    import ray

    free = private.free_resources()
    nodes = [node["NodeID"] for node in ray.nodes() if NodeKind(node["Resources"], node["Labels"]).takes(selector)]
    return max((free.get(node, {}).get("CPU", 0.0) for node in [*nodes, ""]), default=0.0)


def data_selector(kinds: Iterable[NodeKind]) -> dict[str, str]:
    """The nodes that read and encode: those for data, where there are any."""
    kinds = list(kinds)
    return {SUBCLUSTER: DATA} if DATA in _subclusters(kinds) else engine_selector(kinds)


def engine_selector(kinds: Iterable[NodeKind], node_labels: Mapping[str, str] | None = None) -> dict[str, str]:
    """The nodes of a pool of engines: those of ``--node_labels``. Where all nodes carry the label that Ray Data knows,
    it is told one value of it, or it would reckon with no node."""
    found = _subclusters(kinds)
    known = {SUBCLUSTER: min(filter(None, found - {DATA} or found))} if found and None not in found else {}
    return {**known, **(node_labels or {})}


def _subclusters(kinds: Iterable[NodeKind]) -> set[str | None]:
    working = [kind.labels for kind in kinds if kind.labels is not None and kind.resources.get("CPU")]
    return {labels.get(SUBCLUSTER) for labels in working}


def train_selector(kinds: Iterable[NodeKind], node_labels: Mapping[str, str]) -> dict[str, str]:
    """The nodes that train: those of ``--node_labels``, and none that is, or may turn out to be, for data unless there
    are no others."""
    apart, kinds = {SUBCLUSTER: f"!{DATA}", **node_labels}, list(kinds)
    mixed = DATA in _subclusters(kinds) or any(kind.labels is None for kind in kinds)
    others = any(kind.takes(apart) and (kind.resources.get("CPU") or kind.resources.get("GPU")) for kind in kinds)
    return apart if mixed and others else dict(node_labels)


def others_read(kinds: Iterable[NodeKind], selector: Mapping[str, str]) -> bool:
    """Whether nodes for data run, beside those of this selector."""
    data = [kind for kind in kinds if kind.labels and kind.labels.get(SUBCLUSTER) == DATA and kind.resources.get("CPU")]
    return bool(data) and not any(kind.takes(selector) for kind in data)

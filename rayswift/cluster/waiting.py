"""What a run waits for on a cluster, said on one line every ten seconds."""

from __future__ import annotations

import contextlib
import logging
import os
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from rayswift import private
from rayswift.cluster.placement import NODE, NodeKind, node_kinds
from rayswift.cluster.workers import Workers
from rayswift.console import say

logger = logging.getLogger("rayswift.cluster")

SECONDS = 10.0
#: How long Ray Train waits for the nodes of a fixed group before that is a failure of the run: machines start in
#: minutes. An elastic group waits without such a limit, and with it would not try a smaller size.
START_SECONDS = 1800
_START_VARIABLE = "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"


@contextlib.contextmanager
def waiting_said(workers: Workers) -> Iterator[None]:
    """Within, say while this job's worker group has no place what is asked, what is there, and what the autoscaler
    does."""
    if isinstance(workers.num_workers, int):
        os.environ.setdefault(_START_VARIABLE, str(START_SECONDS))
    done = threading.Event()
    thread = threading.Thread(target=_look, args=(workers, done), name="rayswift-waiting", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join(SECONDS)


def _look(workers: Workers, done: threading.Event, tell: Callable[[str], None] = say) -> None:
    has_waited, is_elastic = False, not isinstance(workers.num_workers, int)
    while not done.wait(SECONDS):
        try:
            groups = private.own_groups()
            # An elastic group is not asked for before there is room for it; one that grows is gone for a moment.
            waits = not all(groups) or (is_elastic and not groups)
            if waits and (groups or has_waited):
                tell(waiting_line(workers.describe(), workers.resources_per_worker, workers.selector))
            has_waited = waits
        except Exception as error:  # a cluster out of reach is another's to report
            logger.debug("nothing is known of what this run waits for: %s", error)


def wait_for_task(reference: Any, asked: str, workers: Workers) -> Any:
    """What a task with a worker's resources returns.

    While no node runs that could take it, says ``asked`` every ten seconds, and asks for the places of the other
    workers, so that the autoscaler starts their nodes together: the task alone would bring one, and its end the others.
    The places are given up with the first node, for the task to run there.
    """
    import ray

    def could_run() -> bool:
        running = (kind for kind in node_kinds() if kind.labels and NODE in kind.labels)
        return any(kind.takes(workers.selector) and kind.room(workers.resources_per_worker) for kind in running)

    with contextlib.ExitStack() as places:
        others = (workers.num_workers if isinstance(workers.num_workers, int) else workers.num_workers[0]) - 1
        if others and not could_run():
            group = ray.util.placement_group(
                [workers.resources_per_worker] * others, workers.strategy,
                bundle_label_selector=[workers.selector] * others if workers.selector else None,
            )  # fmt: skip
            places.callback(ray.util.remove_placement_group, group)
        while not ray.wait([reference], timeout=SECONDS)[0]:
            if could_run():
                places.close()
            else:
                say(waiting_line(asked, workers.resources_per_worker, workers.selector))
    return ray.get(reference)


def waiting_line(asked: str, bundle: Mapping[str, float], selector: Mapping[str, str]) -> str:
    """``waiting for 2 workers of 1 CPU: now there is room for 1 on 3 node(s); the autoscaler starts 1 gpu``.

    Args:
        asked: what is waited for, in words.
        bundle: the resources of one of them, on one node.
        selector: the labels of the nodes that it may lie on.
    """
    free, nodes = private.free_resources(), [kind for kind in node_kinds() if kind.takes(selector)]
    ids = {kind.labels.get(NODE) for kind in nodes if kind.labels} & set(free)
    room = sum(NodeKind(left, None).room(bundle) for node, left in free.items() if node in ids)
    starting = ", ".join(f"{count} {name}" for name, count in sorted(private.starting_nodes().items()))
    if starting:
        scaler = f"the autoscaler starts {starting}"
    elif private.autoscaler_types():
        scaler = "the autoscaler starts none"
    else:
        scaler = "without an autoscaler: a node has to join, or another job to end"
    return f"waiting for {asked}: now there is room for {room} on {len(ids)} node(s); {scaler}"

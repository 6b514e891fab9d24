"""A training group of one worker without the process in which Ray Train has workers wait for each other.

That is an actor, ``SynchronizationActor``: the controller makes and ends it, and the worker asks it at every barrier,
broadcast and ``ray.train.report``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any, cast

import ray
from ray.train.v2._internal.execution.worker_group import state, worker_group

from rayswift import private


class Alone:
    """Stands in for the actor's handle, in each process that has it: who asks for the one worker waits for nobody."""

    @classmethod
    def options(cls, **_: Any) -> SimpleNamespace:
        return SimpleNamespace(remote=lambda **_: cls())

    @property
    def broadcast_from_rank_zero(self) -> SimpleNamespace:
        return _answering(lambda *, data, **_: data)

    @property
    def set_required_ranks(self) -> SimpleNamespace:
        return _answering(lambda ranks: ranks is None or 0 in ranks)

    @property
    def reset(self) -> SimpleNamespace:
        return _answering(lambda: None)


def _answering(method: Callable[..., Any]) -> SimpleNamespace:
    return SimpleNamespace(remote=lambda *args, **options: ray.put(method(*args, **options)))


@contextmanager
def alone_in_group() -> Iterator[None]:
    """Within, groups that a controller of this process starts have an :class:`Alone`; the actor where Ray Train's is
    another than this program was made for."""
    try:
        private.check_synchronization()
    except private.NotAvailable:
        private.report("Ray Train's SynchronizationActor", "one more process runs beside the worker")
        yield
        return
    groups, states = cast(Any, worker_group), cast(Any, state)
    actor, end = groups.SynchronizationActor, states._shutdown_sync_actor
    groups.SynchronizationActor = Alone
    states._shutdown_sync_actor = lambda one: None if isinstance(one, Alone) else end(one)
    try:
        yield
    finally:
        groups.SynchronizationActor, states._shutdown_sync_actor = actor, end

"""Fewer processes and warm workers for a run on one machine, with as much of Ray Train as there is to build on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from rayswift import private
from rayswift.errors import one_line


def make_trainer(
    train_loop: Callable[..., Any],
    *,
    embedded: bool,
    alone: bool,
    warm: list[Any],
    start_spares: Callable[[], list[Any]] = list,
    **options: Any,
) -> Any:
    """Ray Train's ``TorchTrainer`` without the processes that this run does not need.

    A plain one, which starts some seconds later, where Ray Train is another than this program was made for. See
    :class:`~rayswift.train.start.lean_trainer.LeanTorchTrainer` for the arguments.
    """
    try:
        private.check_ray_train()
        from rayswift.train.start.lean_trainer import LeanTorchTrainer

        own: dict[str, Any] = {"embedded": embedded, "alone": alone, "warm": warm, "start_spares": start_spares}
        return LeanTorchTrainer(train_loop, **own, **options)
    except Exception as error:
        from ray.train.torch import TorchTrainer

        private.report("Ray Train", f"training starts some seconds later ({one_line(error)})")
        warm.clear()
        return TorchTrainer(train_loop, **options)


def torch_config(backend: str, timeout_s: int, *, embedded: bool, alone: bool = False) -> Any:
    """Ray Train's ``TorchConfig``; on an ``embedded`` Ray one whose workers open nothing beyond this machine, and where
    one that is ``alone`` joins no process group. ``timeout_s``: after which a worker gives up waiting for another."""
    if embedded:
        from rayswift.train.start.local_group import LocalTorchConfig

        return LocalTorchConfig(backend=backend, timeout_s=timeout_s, alone=alone)
    from ray.train.torch import TorchConfig

    return TorchConfig(backend=backend, timeout_s=timeout_s)

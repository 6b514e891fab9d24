"""Ray Train's ``TorchTrainer`` with the helper processes that a run needs.

Each of them is a Python process that imports Ray before the first step: seconds on a small machine.
"""

from __future__ import annotations

from typing import Any

from ray.train.torch import TorchTrainer
from ray.train.v2._internal.callbacks import DatasetsCallback
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback


class LeanTorchTrainer(TorchTrainer):
    """A trainer whose workers get their data from the token cache or from a stream of their own.

    Without ``datasets`` no process deals them out. On an ``embedded`` Ray, which ends with this process, none watches
    whether the controller leaves a placement group behind.
    """

    def __init__(self, *args: Any, embedded: bool, **options: Any) -> None:
        super().__init__(*args, **options)
        self._unneeded: tuple[type, ...] = () if self.datasets else (DatasetsCallback,)
        if embedded:
            self._unneeded += (PlacementGroupCleanerCallback,)

    def _create_default_callbacks(self) -> list[Any]:
        return [one for one in super()._create_default_callbacks() if not isinstance(one, self._unneeded)]

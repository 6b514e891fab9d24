"""Progress of the data path in the driver's terminal."""

from __future__ import annotations

import sys
from typing import Any


class StageBars:
    """A counter per data stage in the terminal: rows done, rows/s."""

    def __init__(self) -> None:
        self._bars: dict[str, Any] = {}

    def __enter__(self) -> StageBars:
        return self

    def update(self, stage: str, done: int) -> None:
        """Show that this many rows of a stage are done."""
        from tqdm import tqdm

        if stage not in self._bars:
            self._bars[stage] = tqdm(desc=stage, unit=" rows", file=sys.stderr, dynamic_ncols=True)
        bar = self._bars[stage]
        bar.update(done - bar.n)

    def __exit__(self, *_: object) -> None:
        for bar in self._bars.values():
            bar.close()

"""When a step's loss is a spike."""

from __future__ import annotations

import math
from collections import deque
from statistics import fmean

#: OLMo's measure of a spike: so many standard deviations above the mean of so many losses.
_DEVIATIONS, _LOSSES = 7.0, 1000
#: Losses before anything is one; and where losses hardly differ, the least share above their mean.
_LEAST, _SHARE = 20, 0.5


class Spikes:
    """The losses of the last steps."""

    def __init__(self) -> None:
        self._losses: deque[float] = deque(maxlen=_LOSSES)

    def is_spike(self, loss: float) -> bool:
        """Whether the loss of one more step stands far above those before it."""
        spike = False
        if len(self._losses) >= _LEAST:
            mean = fmean(self._losses)
            deviation = math.sqrt(fmean((one - mean) ** 2 for one in self._losses))
            spike = loss > mean + max(_DEVIATIONS * deviation, _SHARE * abs(mean))
        self._losses.append(loss)
        return spike

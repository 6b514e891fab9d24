from __future__ import annotations

from collections.abc import Iterator

import pytest

from rayswift.rewards import orms, prms


@pytest.fixture(autouse=True)
def _own_rewards() -> Iterator[None]:
    """The names that a test's plugins register end with the test."""
    before = [dict(known) for known in (orms, prms)]
    yield
    for known, names in zip((orms, prms), before, strict=True):
        known.clear()
        known.update(names)

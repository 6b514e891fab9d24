"""Machines for Ray's autoscaler to start, as Ray's own provider of fake ones has them: real raylets on the head."""

from __future__ import annotations

import time
from typing import Any

from ray.autoscaler._private.fake_multi_node.node_provider import FakeMultiNodeProvider

#: Seconds from the request for a machine to its Ray's start; a cloud takes minutes.
BOOT = 12


class Machines(FakeMultiNodeProvider):  # type: ignore[misc]
    """The fake ones, which take their time."""

    def create_node_with_resources_and_labels(self, *arguments: Any) -> None:
        """Start so many of a type."""
        time.sleep(BOOT)
        super().create_node_with_resources_and_labels(*arguments)

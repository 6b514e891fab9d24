"""What the raylet of an embedded Ray runs in the place of the dashboard's agent: it waits for the raylet's end.

Started as a file, by :func:`rayswift.private.small_ray`, and imports nothing that takes time.
"""

import os
import time

SECONDS = 5


def wait_for_parent() -> None:
    """Return when the process that started this one is gone."""
    parent = os.getppid()
    while os.getppid() == parent != 1:
        time.sleep(SECONDS)


if __name__ == "__main__":
    wait_for_parent()

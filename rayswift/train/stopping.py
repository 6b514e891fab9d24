"""A run that will be ended soon saves what it has trained: after SIGTERM, and before the cluster takes a machine away.

Clusters send SIGTERM and kill what still runs half a minute later. The command asks the workers, through the event
queue, to stop after the step that they are at; all of them learn of it at the same step.
"""

from __future__ import annotations

import contextlib
import enum
import os
import signal
import threading
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from rayswift.console import say
from rayswift.errors import Terminated
from rayswift.train.local_events import QueueGone

if TYPE_CHECKING:
    from rayswift.train.loader import Rank

#: Seconds that the workers have for their step and its checkpoint: Kubernetes and Slurm give 30 in all.
GRACE_SECONDS = 25.0
#: Seconds between two questions of a worker.
ASK_SECONDS = 0.5


class Wish(enum.IntEnum):
    """What the workers do after a step beside training on."""

    NOTHING = 0
    KEEP = 1
    SAVE = 2
    STOP = 3


class Notices:
    """What one worker has heard, and what all of them do about it.

    Args:
        events: the driver's event queue.
        rank: this worker's share.
        keeps: whether the state after this step shall be kept; the first worker is asked.
        timeout_s: seconds after which a worker gives up waiting for another.
    """

    def __init__(
        self, events: Any, rank: Rank, keeps: Callable[[], bool] = lambda: False, timeout_s: float = 1800
    ) -> None:
        self._events, self._rank, self._stopping, self._saved = events, rank, threading.Event(), False
        self._keeps = keeps
        self._group: Any = None
        if rank.world_size > 1:
            import torch

            # Beside the work of accelerators: a step waits for none of them.
            self._group = torch.distributed.new_group(backend="gloo", timeout=timedelta(seconds=timeout_s))
        if rank.rank == 0:
            threading.Thread(target=self._listen, name="rayswift-notices", daemon=True).start()

    def wish(self) -> Wish:
        """What all workers do after this step; every one of them asks."""
        import ray.train

        own = Wish.KEEP if self._rank.rank == 0 and self._keeps() else Wish.NOTHING
        if not self._saved and ray.train.get_preemption_info() is not None:  # a machine of this run goes
            own = Wish.SAVE
        if self._stopping.is_set():
            own = Wish.STOP
        if self._group is not None:
            import torch

            shared = torch.tensor([int(own)])
            torch.distributed.all_reduce(shared, torch.distributed.ReduceOp.MAX, group=self._group)
            own = Wish(int(shared))
        self._saved = self._saved or own is Wish.SAVE
        return own

    def _listen(self) -> None:
        with contextlib.suppress(QueueGone):
            while not self._events.ask("is_stopping"):
                threading.Event().wait(ASK_SECONDS)
            self._stopping.set()


class Ending:
    """Whether SIGTERM has asked this command to end."""

    asked = False


@contextlib.contextmanager
def saved_on_sigterm(events: Any) -> Iterator[Ending]:
    """Within, SIGTERM has the workers save a checkpoint and stop. What the command does at SIGTERM else happens after
    :data:`GRACE_SECONDS`, and at a second one. Without a handler of the command's (a program that calls RaySwift) all
    stays as it is."""
    ending, before = Ending(), signal.getsignal(signal.SIGTERM)
    if threading.current_thread() is not threading.main_thread() or not callable(before):
        yield ending
        return
    late = threading.Timer(GRACE_SECONDS, os.kill, (os.getpid(), signal.SIGTERM))
    late.daemon = True

    def ask() -> None:
        say(f"SIGTERM: the workers stop after this step and save it (at most {GRACE_SECONDS:.0f} s; a second signal "
            "ends the run at once)")  # fmt: skip
        events.tell("stop")

    def on_sigterm(number: int, frame: Any) -> None:
        if ending.asked:
            before(number, frame)
            return
        ending.asked = True
        late.start()
        threading.Thread(target=ask, daemon=True).start()  # who was interrupted may hold what this needs

    signal.signal(signal.SIGTERM, on_sigterm)
    try:
        yield ending
    except Exception as error:
        if ending.asked:  # whoever sent it to this process may have sent it to those of Ray as well
            raise Terminated from error
        raise
    finally:
        late.cancel()
        signal.signal(signal.SIGTERM, before)


def end_if_asked(ending: Ending, is_complete: bool) -> None:
    """Raises Terminated for a run that ended before its last step because it was asked to."""
    if ending.asked and not is_complete:
        raise Terminated

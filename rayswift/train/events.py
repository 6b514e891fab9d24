"""What workers tell the driver while they train: a small queue, because ``ray.train.report`` costs seconds.

Who has the queue ``tell``s it something, which waits for nothing, or ``ask``s it, each by the name of a method.

Events are plain dicts with an ``event`` key: ``start`` (model facts), ``resume`` (step, and the rows logged before it),
``step`` (one optimiser step done), ``kept`` (the state after a step is held here), ``log`` (a row for logging.jsonl),
``bad_step`` (rows of a step without a number for its loss), ``hang`` (where a worker is that does not get on), ``save``
(a checkpoint begins), ``checkpoint`` (it became whole, and the seconds that took), ``drops`` (rows a stream dropped),
``note`` (a line for the person), ``end`` (the workers' memory); ``seconds`` of the others are the first worker's clock.
The other way goes one word: `stop`.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from rayswift.cluster.board import RunBoard
from rayswift.redaction import redact_text
from rayswift.train.local_events import EventsHere, QueueGone

if TYPE_CHECKING:
    from rayswift.cluster import Workers
    from rayswift.train.checkpoints.held_state import HeldState
    from rayswift.train.run_directory import RunDirectory
    from rayswift.train.schedule import StepSchedule

logger = logging.getLogger("rayswift.train")


class EventQueue:
    """Keeps events in order until the driver fetches them, and says to the cluster what they mean.

    Args:
        facts: of the run, for its `RunBoard`; without them nothing is said.
    """

    def __init__(self, facts: dict[str, Any] | None = None) -> None:
        self._board = RunBoard(facts or {})
        self._events: list[dict[str, Any]] = []
        self._stopping = False
        self._kept: tuple[int, HeldState | None] = (0, None)

    def push(self, event: dict[str, Any]) -> None:
        """Add one event; callers do not wait for it."""
        self._board.take(event)
        if event["event"] == "step" and self._events and self._events[-1]["event"] == "step":
            # Only the newest step matters to a progress bar: a slow driver does not pile them up.
            self._events[-1] = event
            return
        self._events.append(event)

    def drain(self, counted: dict[str, float] | None = None) -> list[dict[str, Any]]:
        """All events since the last call. ``counted``: what the driver alone knows of the run, to be said with it."""
        self._board.counted(counted or {})
        events, self._events = self._events, []
        return events

    def keep(self, step: int, state: HeldState, seconds: dict[str, float]) -> None:
        """Hold the state after a step, in the place of the one before; ``seconds``: the first worker's clock then."""
        self._kept = (step, state.of_its_own())
        self._events.append({"event": "kept", "step": step, "seconds": seconds})

    def kept_step(self) -> int:
        """The step whose state is held; 0: none."""
        return self._kept[0]

    def kept_state(self) -> HeldState | None:
        """Its state."""
        return self._kept[1]

    def stop(self) -> None:
        """Have the workers stop after the step that they are at."""
        self._stopping = True

    def is_stopping(self) -> bool:
        """Whether they shall."""
        return self._stopping


def run_facts(args: Any, workers: Workers, schedule: StepSchedule, run: RunDirectory) -> dict[str, Any]:
    """What those who ask the cluster are told of a run from its beginning."""
    return {
        "run": redact_text(run.uri), "command": args.command, "model": redact_text(args.model),
        "max_steps": schedule.max_steps, "workers": workers.num_workers,
    }  # fmt: skip


class EventsOfActor:
    """The queue as an actor on the driver's node, which asks for no CPU."""

    def __init__(self, facts: dict[str, Any]) -> None:
        import ray
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        self._actor = ray.remote(EventQueue).options(num_cpus=0, scheduling_strategy=here).remote(facts)

    def tell(self, name: str, *args: Any) -> None:
        """Call a method of the queue without waiting for it."""
        getattr(self._actor, name).remote(*args)

    def ask(self, name: str, *args: Any) -> Any:
        """What a method of the queue returns.

        Raises:
            QueueGone: the actor is.
        """
        import ray

        try:
            return ray.get(getattr(self._actor, name).remote(*args))
        except ray.exceptions.RayError as error:
            raise QueueGone from error

    def settle(self) -> None:
        """Nothing: calls are answered in the order in which they came."""

    def close(self) -> None:
        """Nothing: the actor ends with its driver."""


def start_event_queue(facts: dict[str, Any] | None = None) -> EventsHere | EventsOfActor:
    """Start the queue of a run: in this process, or with ``facts`` of the run, for those who ask the cluster, as an
    actor on this node."""
    if facts is None:
        try:
            return EventsHere(EventQueue())
        except OSError as error:  # the path of the folder for temporary files may be too long
            logger.warning("workers reach this process in no socket (%s): one more process runs beside them", error)
    return EventsOfActor(facts or {})

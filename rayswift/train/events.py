"""What workers tell the driver while they train: a small actor, because ``ray.train.report`` costs seconds.

Events are plain dicts with an ``event`` key: ``start`` (model facts), ``resume`` (step, and the rows logged before it),
``step`` (one optimiser step done), ``log`` (a row for logging.jsonl), ``bad_step`` (rows of a step without a number for
its loss), ``hang`` (where a worker is that does not get on), ``save`` (a checkpoint begins), ``checkpoint`` (it became
whole, and the seconds that took), ``drops`` (rows a stream dropped), ``note`` (a line for the person), ``end`` (the
workers' memory); ``seconds`` of the others are the first worker's clock. The other way goes one word: `stop`.
"""

from __future__ import annotations

from typing import Any


class EventQueue:
    """Keeps events in order until the driver fetches them. Lives on the driver's node and asks for no CPU."""

    def __init__(self) -> None:
        self._events: list[dict[str, Any]] = []
        self._stopping = False

    def push(self, event: dict[str, Any]) -> None:
        """Add one event; callers do not wait for it."""
        if event["event"] == "step" and self._events and self._events[-1]["event"] == "step":
            # Only the newest step matters to a progress bar: a slow driver does not pile them up.
            self._events[-1] = event
            return
        self._events.append(event)

    def drain(self) -> list[dict[str, Any]]:
        """All events since the last call."""
        events, self._events = self._events, []
        return events

    def stop(self) -> None:
        """Have the workers stop after the step that they are at."""
        self._stopping = True

    def is_stopping(self) -> bool:
        """Whether they shall."""
        return self._stopping


def start_event_queue() -> Any:
    """Start the queue's actor on this node."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    return ray.remote(EventQueue).options(num_cpus=0, scheduling_strategy=here).remote()

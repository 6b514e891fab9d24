"""Ray Data as this package uses it: every row of a small table is a task."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rayswift.cluster.placement import data_selector, node_kinds

if TYPE_CHECKING:
    import pyarrow as pa
    from ray.data import Dataset


def one_task_each(rows: pa.Table, preserve_order: bool, block_bytes: int | None = None) -> Dataset:
    """A dataset whose every row is a task of its own, on the nodes that are for data where there are any: no bars of
    Ray's, no time-out while training pauses.

    Args:
        rows: what each task is given.
        preserve_order: whether the tasks' output comes in the order of the rows.
        block_bytes: the size at which a task hands on a block; None for Ray's own.
    """
    import ray.data
    from ray.data import DataContext

    context: Any = DataContext.get_current().copy()
    context.execution_options.preserve_order = preserve_order
    context.execution_options.label_selector = data_selector(node_kinds()) or None
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.execution_no_progress_timeout_s = -1
    context.target_max_block_size = block_bytes or context.target_max_block_size
    with DataContext.current(context):
        # Not `range`: reading it would be an operator of its own beside one that asks for less than a CPU.
        return ray.data.from_arrow([rows.slice(number, 1) for number in range(len(rows))])

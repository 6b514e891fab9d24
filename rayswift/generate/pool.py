"""Answers from a pool of engines on the cluster, through Ray Data: it starts, scales and replaces them.

In: prompts that are to be answered once or several times. Out: numbered answers, in the order they finish.
The Transformers engine is an actor here, vLLM comes from `ray.data.llm` (`rayswift.generate.vllm_pool`).
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from rayswift import cluster
from rayswift.cluster.placement import engine_selector, node_kinds
from rayswift.errors import UserError, telling_line
from rayswift.generate.model_spec import ModelSpec, check_nodes, model_spec
from rayswift.generate.pool_rows import (
    BLOCK_RETRIES,
    HELPER_CPUS,
    NO_SEED,
    answer_row,
    each_answer,
    read_answer,
    request_row,
)
from rayswift.generate.transformers import load_engine, seed_everything
from rayswift.generate.types import Answer, Request, SamplingParams
from rayswift.modeling.resolved import ResolvedModel

#: Rows per block: what one task takes to an engine, and what a dead engine has to do again.
BLOCK_ROWS = 32


@dataclass(frozen=True)
class EnginePool:
    """A pool of engines for one command.

    ``model``: with the arguments of the command. ``spec``: what ``rayswift deploy`` would start for the same flags.
    ``size``: fewest and most engines.
    """

    model: ResolvedModel
    spec: ModelSpec
    size: tuple[int, int]

    @classmethod
    def start(cls, model: ResolvedModel) -> EnginePool:
        """Plan the pool and connect to Ray; engines start with the first requests.

        Raises:
            UserError: the engine is not there, or the cluster can never hold the pool.
        """
        asked = model.args.num_workers  # engines on one machine share its memory and cores as replicas do
        spec = model_spec(model, fewest_and_most(asked) if asked else None)
        connected = cluster.connect(model.args)
        size = pool_size(model.args, spec, connected)
        check_nodes(spec, connected)
        if spec.node_labels and len(spec.bundles) > 1:
            raise UserError("--node_labels: Ray Data places an engine of several GPUs without labels; leave it out, or "
                            "use rayswift deploy and --base_url")  # fmt: skip
        return cls(model, spec, size)

    def answers(self, requests: Sequence[Request]) -> Iterator[tuple[int, Answer]]:
        """Answer each request as often as it has numbers. UserError when no engine can be started."""
        if not requests:
            return
        import pyarrow as pa
        import ray

        context = ray.data.DataContext.get_current()
        context.enable_progress_bars = False
        labels = engine_selector(node_kinds(), self.spec.node_labels)
        context.execution_options.label_selector = labels or None
        context.execution_options.preserve_order = False  # the result file orders; none waits for a long answer
        repeats = max(len(request.numbers) for request in requests)
        size = max(1, BLOCK_ROWS // repeats) if self.spec.engine == "vllm" else self.batch_size
        rows = [request_row(request) for request in requests]
        blocks = [pa.Table.from_pylist(rows[first : first + size]) for first in range(0, len(rows), size)]
        try:
            for found in self.answered(ray.data.from_arrow(blocks), size * repeats).iter_rows():
                yield int(found["index"]), read_answer(found)
        except ray.exceptions.ActorUnavailableError:  # no retries left; not starting is below
            raise UserError(f"--infer_backend {self.spec.engine}: engines died {BLOCK_RETRIES + 1} times of the same "
                            "prompts; what they said is in Ray's log, and --num_workers, --max_batch_size or a smaller "
                            "--max_model_len makes each need less") from None  # fmt: skip
        except ray.exceptions.RayError as error:
            reason = telling_line(str(error), type(error).__name__)
            raise UserError(f"--infer_backend {self.spec.engine}: the engine failed ({reason})") from None

    def answered(self, dataset: Any, block_answers: int) -> Any:
        """The dataset of answers to one of requests (`pool_rows.request_row`), ``block_answers`` to a block."""
        import ray

        if self.spec.engine == "vllm":
            from rayswift.generate.vllm_pool import answered_by_vllm

            return answered_by_vllm(dataset, self.model, self.spec, self.size, block_answers)
        needs = dict(self.spec.bundles[0])
        with warnings.catch_warnings():  # Ray 2.60 wants named parameters and has none for the retries
            warnings.simplefilter("ignore", DeprecationWarning)
            return dataset.map_batches(
                TransformersWorker,
                fn_constructor_args=(self.model, self.size[1]),
                batch_size=self.batch_size,
                batch_format="pyarrow",
                compute=ray.data.ActorPoolStrategy(min_size=self.size[0], max_size=self.size[1]),
                num_cpus=needs.pop("CPU"),
                num_gpus=needs.pop("GPU", 0),
                memory=needs.pop("memory", None),
                resources=needs,
                max_task_retries=BLOCK_RETRIES,
            )

    @property
    def batch_size(self) -> int:
        """Prompts per batch of the Transformers engine."""
        asked: int = self.model.args.max_batch_size
        return BLOCK_ROWS if asked == -1 else asked


def pool_size(args: Any, spec: ModelSpec, connected: cluster.Cluster) -> tuple[int, int]:
    """Fewest and most engines: ``--num_workers N`` or ``MIN,MAX`` (``sample``: ``--min_replicas``, ``--max_replicas``);
    unset, ``--vllm_data_parallel_size``, or as many as there are GPUs for, else one.

    Raises:
        UserError: the cluster can never hold the fewest.
    """
    needs = {name: sum(bundle.get(name, 0) for bundle in spec.bundles) for name in ("CPU", "GPU")}
    by_gpus = max(1, int(connected.gpus // needs["GPU"])) if needs["GPU"] else 1
    side_by_side = args.vllm_data_parallel_size if spec.engine == "vllm" else 1
    fewest, most = fewest_and_most(args.num_workers or (side_by_side if side_by_side > 1 else by_gpus))
    flag = "--min_replicas" if getattr(args, "min_replicas", None) else "--num_workers"
    helpers = {"CPU": 2 * HELPER_CPUS if spec.engine == "vllm" else 0.0, "GPU": 0.0}
    for name, available in (("GPU", connected.gpus), ("CPU", connected.cpus)):
        needed = needs[name] * fewest + helpers[name]
        if needed > available:
            raise UserError(
                f"{flag} {fewest}: {fewest} engine(s) and what feeds them need {needed:g} {name}s and "
                f"{connected.describe()}; lower it, or --resources_per_worker, for example '{{\"CPU\": 0.5}}'"
            )
    return fewest, most


def fewest_and_most(asked: int | tuple[int, int]) -> tuple[int, int]:
    """``N`` or ``MIN,MAX`` as two numbers."""
    return (asked, asked) if isinstance(asked, int) else asked


class TransformersWorker:
    """One Transformers engine in an actor of the pool."""

    def __init__(self, model: ResolvedModel, pool_size: int) -> None:
        import torch

        self.engine = load_engine(model)
        self.params = SamplingParams.from_arguments(model.args)
        # Engines that each use every core get in each other's way.
        torch.set_num_threads(max(1, cluster.cpu_count() // pool_size))

    def __call__(self, table: Any) -> Any:
        import pyarrow as pa

        rows = [row for item in table.to_pylist() for row in each_answer(item)]
        if rows[0]["seed"] != NO_SEED:
            seed_everything(rows[0]["seed"])
        conversations, tools = ([json.loads(row[key]) for row in rows] for key in ("messages", "tools"))
        answers = self.engine.generate(conversations, self.params, tools)
        return pa.Table.from_pylist(
            [answer_row(row["index"], answer) for row, answer in zip(rows, answers, strict=True)]
        )

"""Answers from a pool of engines on the cluster, through Ray Data: it starts, scales and replaces them.

In: numbered rows, or prompts that are to be answered several times. Out: numbered answers, in the order they finish.
The Transformers engine is an actor here, vLLM comes from `ray.data.llm` (`rayswift.generate.vllm_pool`).
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rayswift import cluster
from rayswift.errors import UserError
from rayswift.generate.model_spec import ModelPlan, plan_model
from rayswift.generate.sources import seed_everything
from rayswift.generate.types import Answer, GenerationSettings
from rayswift.inference.rows import prompt_of
from rayswift.serve.running import serving_settings

if TYPE_CHECKING:
    from rayswift.arguments import InferArguments, SampleArguments

    PoolArguments = InferArguments | SampleArguments

Row = dict[str, Any]
#: Rows per block: what one task takes to an engine, and what a dead engine has to do again.
BLOCK_ROWS = 32
#: How often a block of prompts is given to another engine when its engine died. One that kills every engine must not
#: be tried for ever.
BLOCK_RETRIES = 20
#: CPUs that each of Ray Data's tasks before and after vLLM reserves: they must fit beside it on a small machine, or it
#: would wait for ever.
HELPER_CPUS = 0.1
#: The columns of an answer on its way back; ``error`` is the name that `ray.data.llm` gives it.
ERROR = "__inference_error__"
#: The seed of an answer that has none of its own: the command's ``--seed``.
NO_SEED = -1


@dataclass(frozen=True)
class Request:
    """A prompt (``row`` without its reference) to be answered once for each number; ``seeds``: one for each, or none.

    All its answers come from one engine, which keeps the prompt's cache between them.
    """

    numbers: tuple[int, ...]
    row: Row
    seeds: tuple[int, ...] = ()

    def as_item(self) -> Row:
        """The row of Ray Data's table."""
        return {
            "index": self.numbers,
            "seed": self.seeds or (NO_SEED,) * len(self.numbers),
            "messages": json.dumps(prompt_of(self.row)),
            "tools": json.dumps(self.row.get("tools")),
        }


@dataclass(frozen=True)
class EnginePool:
    """A pool of engines for one command: a source of answers as `rayswift.inference.run` takes it.

    ``plan``: what ``rayswift deploy`` would start for the same flags. ``size``: fewest and most engines.
    """

    args: PoolArguments
    plan: ModelPlan
    size: tuple[int, int]

    @classmethod
    def start(cls, args: PoolArguments) -> EnginePool:
        """Plan the pool (``args`` are completed from the checkpoint) and connect to Ray; engines start with the rows.

        Raises:
            UserError: model or engine are not there, or the cluster can never hold the pool.
        """
        settings = serving_settings(args)
        if args.num_workers:  # engines on one machine share its memory and cores as replicas do
            settings.min_replicas, settings.max_replicas = fewest_and_most(args.num_workers)
        plan = plan_model(settings)
        return cls(args, plan, pool_size(args, plan, cluster.connect(args)))

    def __call__(self, rows: Sequence[tuple[int, Row]]) -> Iterator[tuple[int, Answer]]:
        """Answer numbered rows. UserError when no engine can be started."""
        return self.answers([Request((index,), row) for index, row in rows])

    def answers(self, requests: Sequence[Request]) -> Iterator[tuple[int, Answer]]:
        """Answer each request as often as it has numbers. UserError when no engine can be started."""
        if not requests:
            return
        import ray

        context = ray.data.DataContext.get_current()
        context.enable_progress_bars = False
        context.execution_options.preserve_order = False  # the result file orders; none waits for a long answer
        repeats = max(len(request.numbers) for request in requests)
        size = max(1, BLOCK_ROWS // repeats) if self.plan.engine == "vllm" else self.batch_size
        dataset = ray.data.from_arrow(list(tables(requests, size)))
        try:
            for found in self.answered(dataset, size * repeats).iter_rows():
                yield int(found["index"]), read_answer(found)
        except ray.exceptions.ActorUnavailableError:  # no retries left; not starting is below
            raise UserError(f"--infer_backend {self.plan.engine}: engines died {BLOCK_RETRIES + 1} times of the same "
                            "prompts; what they said is in Ray's log, and --num_workers, --max_batch_size or a smaller "
                            "--max_model_len makes each need less") from None  # fmt: skip
        except ray.exceptions.RayError as error:
            raise UserError(f"--infer_backend {self.plan.engine}: the engine failed ({reason(error)})") from None

    def answered(self, dataset: Any, block_answers: int) -> Any:
        """The dataset of answers to one of requests (:meth:`Request.as_item`), ``block_answers`` to a block."""
        import ray

        if self.plan.engine == "vllm":
            from rayswift.generate.vllm_pool import answered_by_vllm

            return answered_by_vllm(dataset, self.args, self.plan, self.size, block_answers)
        bundle = self.plan.bundles[0]
        with warnings.catch_warnings():  # Ray 2.60 wants named parameters and has none for the retries
            warnings.simplefilter("ignore", DeprecationWarning)
            return dataset.map_batches(
                TransformersWorker,
                fn_constructor_args=(self.args, self.size[1]),
                batch_size=self.batch_size,
                batch_format="pyarrow",
                compute=ray.data.ActorPoolStrategy(min_size=self.size[0], max_size=self.size[1]),
                num_cpus=bundle["CPU"],
                num_gpus=bundle.get("GPU", 0),
                max_task_retries=BLOCK_RETRIES,
            )

    @property
    def batch_size(self) -> int:
        """Prompts per batch of the Transformers engine."""
        return BLOCK_ROWS if self.args.max_batch_size == -1 else self.args.max_batch_size


def tables(requests: Sequence[Request], size: int) -> Iterable[Any]:
    """The blocks of Ray Data: ``size`` requests each."""
    import pyarrow as pa

    for first in range(0, len(requests), size):
        yield pa.Table.from_pylist([request.as_item() for request in requests[first : first + size]])


def each_answer(item: Row) -> list[Row]:
    """A request as one row for each of its answers."""
    return [{**item, "index": int(index), "seed": int(seed)}
            for index, seed in zip(item["index"], item["seed"], strict=True)]  # fmt: skip


def pool_size(args: PoolArguments, plan: ModelPlan, connected: cluster.Cluster) -> tuple[int, int]:
    """Fewest and most engines: ``--num_workers N`` or ``MIN,MAX`` (``sample``: ``--min_replicas``, ``--max_replicas``);
    unset, as many as there are GPUs for, else one.

    Raises:
        UserError: the cluster can never hold the fewest.
    """
    needs = {name: sum(bundle.get(name, 0) for bundle in plan.bundles) for name in ("CPU", "GPU")}
    by_gpus = max(1, int(connected.gpus // needs["GPU"])) if needs["GPU"] else 1
    fewest, most = fewest_and_most(args.num_workers or by_gpus)
    flag = "--min_replicas" if getattr(args, "min_replicas", None) else "--num_workers"
    helpers = {"CPU": 2 * HELPER_CPUS if plan.engine == "vllm" else 0.0, "GPU": 0.0}
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

    def __init__(self, args: PoolArguments, pool_size: int) -> None:
        import torch

        from rayswift.generate.sources import load_engine

        self.engine = load_engine(args)
        self.settings = GenerationSettings.from_arguments(args)
        # Engines that each use every core get in each other's way.
        torch.set_num_threads(max(1, cluster.cpu_count() // pool_size))
        seed_everything(args.seed)

    def __call__(self, table: Any) -> Any:
        import pyarrow as pa

        rows = [row for item in table.to_pylist() for row in each_answer(item)]
        if rows[0]["seed"] != NO_SEED:
            seed_everything(rows[0]["seed"])
        conversations, tools = ([json.loads(row[key]) for row in rows] for key in ("messages", "tools"))
        answers = self.engine.generate(conversations, self.settings, tools)
        return pa.Table.from_pylist(
            [answer_row(row["index"], answer) for row, answer in zip(rows, answers, strict=True)]
        )


def answer_row(index: int, answer: Answer) -> Row:
    """An answer on its way from an engine to the driver."""
    return {
        "index": index,
        "text": answer.text,
        "num_prompt_tokens": answer.num_prompt_tokens,
        "num_generated_tokens": answer.num_generated_tokens,
        "logprobs": json.dumps(answer.logprobs),
        "seconds": answer.seconds,
        ERROR: answer.error or "",
    }


def read_answer(row: Row) -> Answer:
    """The answer of such a row. From `ray.data.llm` a row with an error has nothing else that can be relied on."""
    if row[ERROR]:
        return Answer(error=str(row[ERROR]))
    return Answer(
        row["text"],
        int(row["num_prompt_tokens"]),
        int(row["num_generated_tokens"]),
        json.loads(row["logprobs"]),
        seconds=float(row["seconds"]),
    )


def reason(error: BaseException) -> str:
    """The line of an error from a worker that says what went wrong there."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    telling = [line for line in lines if "Error" in line]
    return (telling or lines or [type(error).__name__])[-1]

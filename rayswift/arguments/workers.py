"""The settings of where the work runs: the Ray cluster, its nodes, how many workers."""

# ruff: noqa: RUF009 (arg() makes a dataclass field: it is meant to be called in the class body)
from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

from rayswift.arguments.base import Arguments
from rayswift.arguments.fields import arg
from rayswift.arguments.groups import ASKED_ROWS, CHAT, NOTHING_MADE, SERVED_ELSEWHERE, SERVED_TOO

_COMPUTED = {
    "command=export to_cached_dataset=false quant_method=none": "only with --quant_method or --to_cached_dataset true"
}
_QUANTISED = {**dict.fromkeys(_COMPUTED, ""), "command=export quant_method=none": "only with --quant_method"}
_IN_PROCESS = {
    f"{CHAT} engine=transformers": "the model of a conversation is in this process",
    "command=infer engine=transformers stream=true": "--stream true answers in this process",
}

_LABEL = r"[a-zA-Z0-9]([a-zA-Z0-9_.-]{0,61}[a-zA-Z0-9])?"
_LABEL_KEY = re.compile(rf"({_LABEL}/)?{_LABEL}")
_LABEL_WANTED = re.compile(rf"!?({_LABEL}|in\({_LABEL}(, ?{_LABEL})*\))")


def read_labels(raw: Any) -> dict[str, str]:
    """``LABEL=VALUE,LABEL=in(VALUE,VALUE)``, or a mapping."""
    pairs = raw if isinstance(raw, dict) else dict(
        part.strip().partition("=")[::2] for part in re.split(r",(?![^(]*\))", str(raw)) if part.strip()
    )  # fmt: skip
    for key, value in pairs.items():
        if not (_LABEL_KEY.fullmatch(key) and _LABEL_WANTED.fullmatch(str(value))):
            raise ValueError(f"expected LABEL=VALUE,…, found {key}={value}")
    return {key: str(value) for key, value in pairs.items()}


@dataclass(init=False, repr=False, eq=False)
class RayArguments(Arguments):
    """Where the work runs."""

    topic: ClassVar[str] = "Ray"
    no_effect: ClassVar[dict[str, str]] = {**SERVED_ELSEWHERE, **_COMPUTED}

    address: str | None = arg(
        None, "Ray cluster to join", shown="this machine, or the cluster of the Ray job", example="auto",
        no_effect=_IN_PROCESS,
    )  # fmt: skip
    use_gpu: bool | None = arg(None, "run on GPUs", shown="true if the cluster has any", no_effect=_QUANTISED)
    resources_per_worker: dict[str, Any] = arg(
        {}, "resources of each worker, as JSON", example='\'{"CPU": 4, "GPU": 1}\'',
        no_effect={
            **_IN_PROCESS,
            **_QUANTISED,
            "command=infer engine=transformers num_workers=none address=none": "only with --num_workers or --address",
        },
    )  # fmt: skip
    node_labels: dict[str, str] = arg(
        {}, "labels of the nodes to use, LABEL=VALUE,…; VALUE may be !V, in(V,W) or !in(V,W)", parse=read_labels,
        example="ray.io/accelerator-type=A100-80G",
        no_effect={
            **_IN_PROCESS,
            **_QUANTISED,
            "command=infer|sample engine=transformers num_workers=none": "give --num_workers",
        },
    )  # fmt: skip
    storage_path: str | None = arg(
        None,
        "folder or URI that every node can reach, for results",
        shown="the output folder",
        example="s3://bucket/runs",
        no_effect={
            **SERVED_TOO,
            **ASKED_ROWS,
            "command=deploy|app": "a server writes no results",
            **dict.fromkeys(_COMPUTED, ""),
            NOTHING_MADE: "only for a folder that is made, not to push one that is there",
        },
    )

    def problems(self) -> Iterator[str]:
        for name, amount in self.resources_per_worker.items():
            if isinstance(amount, bool) or not isinstance(amount, (int, float)) or amount < 0:
                yield (f"--resources_per_worker: {name} is {amount!r}, expected a number of at least 0, "
                       "for example '{\"CPU\": 4, \"GPU\": 1}'")  # fmt: skip
        if self.use_gpu is False and self.resources_per_worker.get("GPU"):
            yield "--use_gpu false contradicts --resources_per_worker, which asks for a GPU: drop one of the two"


def read_workers(raw: Any) -> int | tuple[int, int]:
    """``4``, or ``1,4`` for an elastic run: at least 1 and at most 4 workers."""
    parts = raw if isinstance(raw, (list, tuple)) else str(raw).split(",")
    try:
        counts = [int(part) for part in parts]
    except ValueError:
        counts = []
    if len(counts) not in (1, 2) or counts[0] < 1 or counts[-1] < counts[0]:
        raise ValueError("expected N or MIN,MAX with 1 <= MIN <= MAX")
    return counts[0] if len(counts) == 1 else (counts[0], counts[1])


@dataclass(init=False, repr=False, eq=False)
class WorkerArguments(RayArguments):
    """How many workers share the work."""

    num_workers: int | tuple[int, int] | None = arg(
        None, "worker processes, N or MIN,MAX (elastic)", parse=read_workers, example="4",
        shown="NPROC_PER_NODE x NNODES if set, else one per GPU, else 1",
        no_effect={**ASKED_ROWS, "command=infer stream=true": "--stream true answers one row after the other"},
    )  # fmt: skip
    num_nodes: int | None = arg(
        None, "nodes the workers are spread over", ge=1, shown="NNODES if set",
        no_effect={"command=infer|sample": "engines start where there is room, --num_workers of them"},
    )  # fmt: skip
    placement_strategy: str | None = arg(
        None, "how workers lie on nodes: as few nodes as can be, as many, or one worker on each",
        choices=("PACK", "SPREAD", "STRICT_SPREAD"), shown="PACK, over --num_nodes SPREAD",
        no_effect={"command=infer|sample": "Ray Data places engines where there is room"},
    )  # fmt: skip
    max_failures: int = arg(
        3, "how often a failed run starts again from its last checkpoint (-1: always)", ge=-1,
        no_effect={"command=infer|sample": "engines that die are started again by themselves"},
    )  # fmt: skip

    def resolve(self) -> None:
        nodes, per_node = _count_from_env("NNODES"), _count_from_env("NPROC_PER_NODE")
        if self.num_nodes is None:
            self.num_nodes = nodes
        if self.num_workers is None and (per_node or nodes):
            self.num_workers = (per_node or 1) * (self.num_nodes or 1)


def _count_from_env(name: str) -> int | None:
    text = os.environ.get(name, "").strip()
    return int(text) if text.isdigit() and int(text) > 0 else None

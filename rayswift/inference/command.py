"""``rayswift infer``: a conversation in the terminal, or answers to the rows of ``--val_dataset``."""

from __future__ import annotations

import contextlib
import logging
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from rayswift import hub
from rayswift.arguments import deciding_settings, read_saved_arguments
from rayswift.cluster import address_of
from rayswift.errors import UserError
from rayswift.generate.sources import load_engine, open_endpoint, seed_everything
from rayswift.generate.transformers import TransformersEngine
from rayswift.generate.types import GenerationSettings
from rayswift.inference.chat import chat
from rayswift.inference.rows import Row, read_rows
from rayswift.inference.run import Source, answer_rows, in_batches, shown, side_by_side
from rayswift.inference.scores import check_metric
from rayswift.journal import ResultFile, open_results, run_identity
from rayswift.modeling.adapters import base_model_of, check_adapter

if TYPE_CHECKING:
    from rayswift.arguments import InferArguments, SampleArguments
    from rayswift.generate.endpoint import EndpointEngine

logger = logging.getLogger("rayswift.inference.command")

Checkpointed = TypeVar("Checkpointed", "InferArguments", "SampleArguments")


def infer(args: InferArguments) -> list[Row] | None:
    """Answer the rows of ``--val_dataset`` (or ``--dataset``) and return the result rows; without one, chat.

    ``--adapters CKPT`` is enough: model, template, system and dtype come from the checkpoint's ``args.json``.
    The result file has SWIFT's rows: ``response, labels, logprobs, messages, dataset, …``; a row that cannot be
    answered has an ``error`` beside an empty response and never stops the others. A run that was killed goes on where
    it stopped when it is started again with the same ``--result_path``.

    Raises:
        UserError: a model, checkpoint, endpoint or dataset that cannot be used, a result file that cannot be written.
    """
    if not args.base_url:
        args = with_checkpoint(args)
    settings = GenerationSettings.from_arguments(args)
    if not (args.val_dataset or args.dataset):
        with open_engine(args) as engine:
            chat(engine, settings, stream=args.stream is not False)
        return None
    check_metric(args.metric)
    rows = read_rows(args)
    # Opened before the model loads: a path that cannot be written must not cost the answers.
    with open_results(result_path(args), run_identity(deciding_settings(args), rows)) as results:
        try:
            with open_source(args, settings, results, len(rows)) as source:
                return answer_rows(source, rows, results, args)
        except KeyboardInterrupt:
            logger.info("the same command with --result_path %s goes on from row %d", results.path, len(results.rows))
            raise


def with_checkpoint(args: Checkpointed) -> Checkpointed:
    """Complete ``args`` from the ``args.json`` of the adapter, or of a full checkpoint given as ``--model``."""
    if len(args.adapters) > 1:
        raise UserError(f"--adapters: rayswift {args.command} takes one adapter; merge them one after the other first")
    where = args.adapters[0] if args.adapters else args.model
    if where is None:
        raise UserError("--model or --adapters is needed: which model should answer?")
    if args.adapters:
        adapter = hub.resolve_adapter(where, use_hf=args.use_hf, token=args.hub_token)
        check_adapter(adapter)
        args.adapters = [adapter]
        where = adapter
    saved = read_saved_arguments(where) if os.path.isdir(where) else None
    if saved is not None:
        args = args.with_saved(saved)
    if args.model is None:
        args.model = base_model_of(where)
    return args


# --- engines ----------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def open_engine(args: InferArguments, *, seed: int | None = None) -> Iterator[TransformersEngine | EndpointEngine]:
    """The engine for one conversation at a time: the endpoint's, a deployment's, or the model in this process."""
    if args.base_url or args.infer_backend != "transformers":
        with open_endpoint(args, seed=seed) as endpoint:
            yield endpoint
        return
    engine = load_engine(args)
    seed_everything(args.seed)
    yield engine


@contextlib.contextmanager
def open_source(
    args: InferArguments, settings: GenerationSettings, results: ResultFile, num_rows: int
) -> Iterator[Source]:
    """What answers the rows of a dataset.

    A pool of engines on the cluster for vLLM, and for Transformers where workers or a cluster are named; else one
    engine. With ``--stream true`` always one, since only one answer can be shown at a time.
    """
    if len(results.rows) == num_rows:
        yield lambda rows: []  # an earlier start has answered them all: no engine is needed
        return
    on_cluster = args.infer_backend == "vllm" or (
        args.infer_backend == "transformers" and bool(args.num_workers or address_of(args))
    )
    if not args.base_url and not args.stream and on_cluster:
        from rayswift.generate.pool import EnginePool

        yield EnginePool.start(args)
        return
    with open_engine(args, seed=args.seed) as engine:
        if args.stream:
            yield shown(engine, settings)
        elif isinstance(engine, TransformersEngine):
            yield in_batches(engine, settings, args.max_batch_size)
        else:
            yield side_by_side(engine, settings)


# --- results ----------------------------------------------------------------------------------------------------


def result_path(args: InferArguments) -> Path:
    """``--result_path``, else ``<checkpoint>/infer_result/<date>.jsonl``, else the same below ``result/<model>``."""
    if args.result_path:
        return Path(args.result_path).expanduser()
    checkpoint = Path(args.adapters[0] if args.adapters else args.model or "")
    if args.base_url or (not args.adapters and not (checkpoint / "args.json").is_file()):
        checkpoint = Path("result", args.model_suffix)
    return checkpoint / "infer_result" / f"{time.strftime('%Y%m%d-%H%M%S')}.jsonl"

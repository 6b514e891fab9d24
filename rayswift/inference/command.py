"""``rayswift infer``: a conversation in the terminal, or answers to the rows of ``--val_dataset``."""

from __future__ import annotations

import logging
import time
from pathlib import Path
from typing import TYPE_CHECKING

from rayswift.arguments import deciding_settings
from rayswift.generate.sources import open_answers, open_engine
from rayswift.generate.types import JsonRow, SamplingParams
from rayswift.inference.chat import chat
from rayswift.inference.rows import read_rows
from rayswift.inference.run import answer_rows, shown
from rayswift.inference.scores import check_metric
from rayswift.journal import open_results, run_identity
from rayswift.modeling.resolved import resolve_model
from rayswift.serve.running import running_deployment

if TYPE_CHECKING:
    from rayswift.arguments import InferArguments

logger = logging.getLogger("rayswift.inference.command")


def infer(args: InferArguments) -> list[JsonRow] | None:
    """Answer the rows of ``--val_dataset`` (or ``--dataset``) and return the result rows; without one, chat.

    ``--adapters CKPT`` is enough: model, template, system and dtype come from the checkpoint's ``args.json``.
    The result file has SWIFT's rows: ``response, labels, logprobs, messages, dataset, …``; a row that cannot be
    answered has an ``error`` beside an empty response and never stops the others. A run that was killed goes on where
    it stopped when it is started again with the same ``--result_path``.

    Raises:
        UserError: a model, checkpoint, endpoint or dataset that cannot be used, a result file that cannot be written.
    """
    model = None if args.base_url else resolve_model(args)
    args = args if model is None else model.args
    params = SamplingParams.from_arguments(args)
    if not (args.val_dataset or args.dataset):
        with open_engine(args, model, running_deployment) as engine:
            chat(engine, params, stream=args.stream is not False)
        return None
    path, deciding = result_path(args), deciding_settings(args)
    check_metric(args.metric)
    rows = read_rows(args)
    # Opened before the model loads: a path that cannot be written must not cost the answers.
    with open_results(path, run_identity(deciding, rows)) as results:
        try:
            if len(results.rows) == len(rows):  # an earlier start has answered them all: no engine is needed
                return answer_rows(lambda _: (), rows, results, args)
            one_by_one = shown if args.stream else None
            with open_answers(args, model, params, running_deployment, one_by_one) as source:
                return answer_rows(source, rows, results, args)
        except KeyboardInterrupt:
            logger.info("the same command with --result_path %s goes on from row %d", results.path, len(results.rows))
            raise


def result_path(args: InferArguments) -> Path:
    """``--result_path``, else ``<checkpoint>/infer_result/<date>.jsonl``, else the same below ``result/<model>``."""
    if args.result_path:
        return Path(args.result_path).expanduser()
    checkpoint = Path(args.adapters[0] if args.adapters else args.model or "")
    if args.base_url or (not args.adapters and not (checkpoint / "args.json").is_file()):
        checkpoint = Path("result", args.model_suffix)
    return checkpoint / "infer_result" / f"{time.strftime('%Y%m%d-%H%M%S')}.jsonl"

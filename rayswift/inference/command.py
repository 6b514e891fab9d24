"""``rayswift infer``: a conversation in the terminal, or answers to the rows of ``--val_dataset``."""

from __future__ import annotations

import logging
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from rayswift.arguments import deciding_settings
from rayswift.cluster import results_folder
from rayswift.errors import UserError
from rayswift.generate.media import has_media
from rayswift.generate.sources import AnswerJob, open_answers, open_engine, sources_of
from rayswift.generate.task_answers import open_task_answers
from rayswift.generate.types import JsonRow, SamplingParams
from rayswift.inference.chat import chat
from rayswift.inference.rows import BAD_ROW, media_check, read_rows, resolve_asked
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
    job = AnswerJob(args, model, SamplingParams.from_arguments(args), resolve_asked(args))
    if job.datasets:
        return answer_dataset(job)
    if not model_writes_text(job):
        raise UserError(f"--task_type {args.task_type}: numbers are told of rows; name them with --val_dataset")
    with open_engine(job, running_deployment) as engine:
        chat(engine, job.params, stream=job.args.stream is not False)
    return None


def model_writes_text(job: AnswerJob) -> bool:
    """Whether answers are texts; an endpoint's are."""
    return job.model is None or job.args.task_type == "causal_lm"


def answer_dataset(job: AnswerJob) -> list[JsonRow]:
    """Answer the rows of the datasets, and go on with a run that was killed."""
    args = job.args
    path, deciding = result_path(args), deciding_settings(args)
    check_metric(args.metric)
    why_refused = media_check(job.model, args.infer_backend)
    rows = [row if BAD_ROW in row or not (why := why_refused(row)) else {**row, BAD_ROW: why}
            for row in read_rows(job.datasets, args)]  # fmt: skip
    job = replace(job, has_media=any(has_media(row) and BAD_ROW not in row for row in rows))
    sources = sources_of(args, job.model)
    # Opened before the model loads: a path that cannot be written must not cost the answers.
    with open_results(path, run_identity(deciding, rows), sources) as results:
        try:
            if len(results.rows) == len(rows):  # an earlier start has answered them all: no engine is needed
                logger.info("%s is finished: its %d rows are answered already, and nothing has changed; another "
                            "--result_path, or removing the file, begins again", path, len(rows))  # fmt: skip
                return answer_rows(lambda _: (), rows, results, args)
            opened = (
                open_answers(job, running_deployment, shown if args.stream else None)
                if model_writes_text(job)
                else open_task_answers(job)
            )
            with opened as source:
                return answer_rows(source, rows, results, args)
        except KeyboardInterrupt:
            logger.info("the same command with --result_path %s goes on from row %d", results.path, len(results.rows))
            raise


def result_path(args: InferArguments) -> Path:
    """``--result_path``, else ``<checkpoint>/infer_result/<date>.jsonl``; with ``--storage_path``, or where no
    checkpoint answers, the same below ``result/<model>``."""
    if args.result_path:
        return results_folder(args, "result_path", args.result_path)
    checkpoint = Path(args.adapters[0] if args.adapters else args.model or "")
    if args.base_url or args.storage_path or (not args.adapters and not (checkpoint / "args.json").is_file()):
        checkpoint = Path("result", args.model_suffix)
    name = f"{time.strftime('%Y%m%d-%H%M%S')}.jsonl"
    return results_folder(args, "result_path", str(checkpoint / "infer_result" / name))

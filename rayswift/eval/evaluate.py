"""``rayswift eval``: arguments → benchmarks and models, checked → endpoints, one after the other → results."""

from __future__ import annotations

import contextlib
import copy
import json
import logging
import os
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rayswift import arguments
from rayswift.cluster import results_folder
from rayswift.console import say
from rayswift.eval.backends import choose_backend
from rayswift.eval.backends.base import Backend
from rayswift.eval.benchmarks import Benchmark, read_benchmarks
from rayswift.eval.models import EvalEndpoint, EvalModel, api_key, check_endpoints, plan_endpoints
from rayswift.eval.report import page, table
from rayswift.eval.results import Result, load_result, write_json
from rayswift.files import write_whole
from rayswift.journal import RunFolder, open_run, run_identity
from rayswift.redaction import mask_files, redact
from rayswift.serve.running import Endpoint

if TYPE_CHECKING:
    from rayswift.arguments import EvalArguments

logger = logging.getLogger("rayswift.eval")


def evaluate(args: EvalArguments) -> dict[str, dict[str, float]]:
    """Run the benchmarks of ``--eval_dataset`` on every model; returns model → benchmark → score.

    Writes ``eval_output/<backend>/<date>/``: ``results.json``, ``report.html``, and per model and benchmark
    ``answers.jsonl`` and what the backend keeps. Prints a table. Appends a line to each model's
    ``eval_result.jsonl``. An evaluation that was killed goes on when the same command is started again.

    Raises:
        UserError: a benchmark, its data, a model or an endpoint that cannot be used, before any model starts; or a
            backend that stopped in the middle.
    """
    benchmarks = read_benchmarks(args)
    endpoints = plan_endpoints(args)
    backend = choose_backend(args)
    for benchmark in benchmarks:
        backend.prepare(benchmark)
        for endpoint in endpoints:
            backend.check(benchmark, endpoint)
    check_endpoints(endpoints)
    root = results_folder(args, "eval_output_dir", args.eval_output_dir) / backend.folder
    sources = {name: mark for endpoint in endpoints for name, mark in endpoint.sources().items()}
    with open_run(root, run_identity(deciding_settings(args, benchmarks), []), sources) as run:
        if run.resumed:
            logger.info("going on with %s", run.path)
        try:
            results = [result for one in endpoints for result in _serve_and_ask(one, benchmarks, backend, run)]
        except KeyboardInterrupt:
            logger.info("answers so far are in %s; the same command goes on from there", run.path)
            raise
        _report(args, results, [model for endpoint in endpoints for model in endpoint.models], backend, run.path)
        run.mark(finished=True)
    scores: dict[str, dict[str, float]] = {}
    for result in results:
        scores.setdefault(result.model, {})[result.benchmark] = result.score
    return scores


def _serve_and_ask(
    endpoint: EvalEndpoint, benchmarks: list[Benchmark], backend: Backend, run: RunFolder
) -> Iterator[Result]:
    """Results of the models of one endpoint; it is started only if something is left to ask."""
    asked = [(model, one, run.path / model.folder / one.folder) for model in endpoint.models for one in benchmarks]
    done, running = [load_result(folder) for _, _, folder in asked], None
    with contextlib.ExitStack() as stack:
        for (model, benchmark, folder), result in zip(asked, done, strict=True):
            if result is None:
                running = running or stack.enter_context(_running(endpoint))
                logger.info("%s: %s", model.label, benchmark.asked)
                try:
                    result = backend.run(benchmark, model, replace(running, model=model.name or running.model), folder)
                finally:
                    mask_files(folder)  # the backends' libraries write down how they were called
                result.save(folder)
            yield result


@contextlib.contextmanager
def _running(endpoint: EvalEndpoint) -> Iterator[Endpoint]:
    """The endpoint of ``--eval_url``, else an own deployment for as long as it is asked."""
    args = endpoint.args
    if args.eval_url:
        yield Endpoint(args.eval_url.rstrip("/"), api_key(args), endpoint.models[0].name or "")
        return
    from rayswift.generate.model_spec import model_specs
    from rayswift.serve.running import running_deployment

    own = copy.copy(args)
    if own.target_ongoing_requests is None and (own.max_replicas or 1) > 1:
        # Deploy's target is meant for many clients: these requests would never reach it, and no replica be added.
        own.target_ongoing_requests = max(1, own.eval_num_proc // (own.max_replicas or 1))
    with running_deployment(own, model_specs(own)) as running:
        yield running


def deciding_settings(args: EvalArguments, benchmarks: list[Benchmark]) -> dict[str, Any]:
    """What decides the answers: the flags, and the local files as they are now."""
    files = {}
    for benchmark in benchmarks:
        if path := benchmark.local_path:
            found = sorted(f for f in Path(path).rglob("*") if f.is_file()) if os.path.isdir(path) else [Path(path)]
            files[benchmark.asked] = [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in found]
    return arguments.deciding_settings(args) | {"files": files}


# --- results ----------------------------------------------------------------------------------------------------


def _report(
    args: EvalArguments, results: list[Result], models: list[EvalModel], backend: Backend, folder: Path
) -> None:
    """Print the table, and write JSON, page and SWIFT's line."""
    content = {
        "results": [result.summary() for result in results], "time": time.strftime("%Y%m%d-%H%M%S"),
        "eval_backend": args.eval_backend, "eval_limit": args.eval_limit,
        "eval_generation_config": redact(args.eval_generation_config),
    }  # fmt: skip
    write_json(folder / "results.json", content)
    title = f"rayswift eval: {', '.join(dict.fromkeys(args.eval_dataset))}"
    write_whole(folder / "report.html", page(results, title))
    say(table(results))
    say(f"every answer: {folder / 'report.html'}   scores: {folder / 'results.json'}")
    for model in models:
        own = {result.benchmark: result.scores for result in results if result.model == model.label}
        _append_line(args, model, own, backend, folder)


def _append_line(
    args: EvalArguments, model: EvalModel, scores: dict[str, dict[str, float]], backend: Backend, folder: Path
) -> None:
    """SWIFT's line in ``<checkpoint, or result/model>/eval_result.jsonl``."""
    weights = Path(model.weights)
    is_checkpoint = model.adapter is not None or (weights / "args.json").is_file()
    folder_of_line = weights if is_checkpoint else results_folder(args, "eval_output_dir", f"result/{model.folder}")
    path = folder_of_line / "eval_result.jsonl"
    line = {
        backend.folder: scores,
        "time": time.strftime("%Y%m%d-%H%M%S"),
        "model": args.model or model.weights,
        "adapters": [model.adapter] if model.adapter else [],
        "result_path": str(path),
        "eval_output_dir": str(folder),
        "eval_limit": args.eval_limit,
    }
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line, ensure_ascii=False) + "\n")
    except OSError as error:  # a model's folder may be read-only: the scores are in the run's folder anyway
        logger.warning("%s: cannot be written (%s); the scores are in %s", path, error.strerror or error, folder)

"""``--eval_backend Native``: EvalScope asks and scores (https://github.com/modelscope/evalscope).

Each benchmark of each model is an EvalScope task of its own, in a folder of its own: predictions and reviews are
appended there question by question, and EvalScope goes on with what is there (``use_cache``).
"""

from __future__ import annotations

import copy
import json
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rayswift.errors import UserError, one_line
from rayswift.eval.backends.base import generation_flags, is_debugging, own_logging, own_progress, without_bars
from rayswift.eval.benchmarks import QUESTION_SETS, Benchmark, require_known
from rayswift.eval.local_data import data_line, lay_out
from rayswift.eval.models import EvalEndpoint, EvalModel
from rayswift.eval.question_sets import is_chinese, lay_out_questions
from rayswift.eval.results import Question, Result
from rayswift.serve.running import Endpoint

if TYPE_CHECKING:
    from rayswift.arguments import EvalArguments

logger = logging.getLogger("rayswift.eval.backends.evalscope")

#: Settings of EvalScope that are decided here.
_OURS = ("model", "datasets", "dataset_args", "work_dir", "use_cache", "api_url", "api_key", "eval_type")


class Native:
    """EvalScope's own benchmarks."""

    folder = "native"

    def __init__(self, args: EvalArguments) -> None:
        self.args = args
        self.dataset_args: dict[str, dict[str, Any]] = {}
        self.shots: dict[str, int] = {}
        self.sizes: dict[str, int] = {}
        if ours := [name for name in _OURS if name in args.extra_eval_args]:
            raise UserError(f"--extra_eval_args: {ours[0]} is set by other flags of rayswift eval; leave it out")
        # EvalScope logs each step: its log file keeps them, the terminal gets what went wrong.
        with own_logging():
            from evalscope.utils.logger import get_logger
        logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns at each number that it sets no timer
        for handler in get_logger().handlers:
            if not isinstance(handler, logging.FileHandler) and not is_debugging():
                handler.addFilter(
                    lambda record: record.levelno >= logging.ERROR or not record.name.startswith("evalscope")
                )

    def prepare(self, benchmark: Benchmark) -> None:
        from evalscope.api.registry import BENCHMARK_REGISTRY, get_benchmark

        require_known(benchmark, "Native", BENCHMARK_REGISTRY.keys())
        try:
            meta = get_benchmark(benchmark.name, self._task(benchmark, dict(benchmark.settings)))._benchmark_meta
            self.dataset_args[benchmark.asked] = self._with_data(benchmark, meta)
            adapter = get_benchmark(benchmark.name, self._task(benchmark, self.dataset_args[benchmark.asked]))
            with without_bars():
                rows = sum(len(rows) for rows in adapter.load_dataset().values())
        except UserError:
            raise
        except Exception as error:
            raise UserError(data_line(benchmark, error)) from None
        self.sizes[benchmark.asked] = rows
        if not rows:
            raise UserError(f"--eval_dataset {benchmark.asked}: no questions in its data")
        try:
            adapter.validate_judge_strategy()
        except Exception as error:  # who judges has to be named before the answers are paid for
            raise UserError(
                f"--eval_dataset {benchmark.asked}: {one_line(error)}; name a judge: --extra_eval_args "
                '\'{"judge": {"models": [{"model_id": "NAME", "api_url": "http://…/v1"}]}}\''
            ) from None
        self.shots[benchmark.asked] = int(adapter.few_shot_num or 0)

    def _with_data(self, benchmark: Benchmark, meta: Any) -> dict[str, Any]:
        """EvalScope's ``dataset_args`` of a benchmark, with its local data laid out."""
        settings = dict(benchmark.settings)
        if self.args.eval_url and self.args.system:
            settings.setdefault("system_prompt", self.args.system)
        if benchmark.local_path is None:
            return settings
        if benchmark.name in QUESTION_SETS:
            data, subsets = lay_out_questions(benchmark)
            settings["subset_list"] = subsets
            if benchmark.name == "general_mcq" and not is_chinese(data.path):  # EvalScope would ask in Chinese
                settings.setdefault("prompt_template", _english_exam(settings.get("extra_params", {})))
        else:
            own = meta.default_subset not in (None, "default") and meta.default_subset not in meta.subset_list
            subsets = [meta.default_subset] if own else list(meta.subset_list)
            data = lay_out(benchmark, subsets, meta.eval_split, [meta.train_split] if meta.train_split else [])
        shots = int(settings.get("few_shot_num", meta.few_shot_num) or 0)
        if shots and not all(data.has(subset, meta.train_split) for subset in subsets):
            if "few_shot_num" in settings:
                raise UserError(
                    f"--eval_dataset_args: few_shot_num {shots} of {benchmark.asked} needs its split "
                    f"{meta.train_split or 'dev'} in {benchmark.local_path}; add the file, or set it to 0"
                )
            logger.warning(
                "%s: its %d examples are not in %s (split %s): asked without examples",
                benchmark.asked, shots, benchmark.local_path, meta.train_split,
            )  # fmt: skip
            settings["few_shot_num"] = 0
        return {**settings, "local_path": data.path}

    def check(self, benchmark: Benchmark, endpoint: EvalEndpoint) -> None:
        """Every engine can chat."""

    def run(self, benchmark: Benchmark, model: EvalModel, endpoint: Endpoint, folder: Path) -> Result:
        from evalscope import run_task

        task = self._task(benchmark, self.dataset_args[benchmark.asked], endpoint, folder)
        predictions, total = folder / "predictions", self.sizes[benchmark.asked]

        def count() -> tuple[int, int]:
            return sum(file.read_bytes().count(b"\n") for file in predictions.rglob("*.jsonl")), total

        try:
            with own_progress(f"{model.label} {benchmark.asked}", count):
                report = run_task(task)[benchmark.name]
        except UserError:
            raise
        except Exception as error:
            raise UserError(
                f"--eval_dataset {benchmark.asked}: EvalScope stopped ({one_line(error)}); the same command goes on "
                "with the questions that are left"
            ) from None
        summary = report.execution_summary
        if summary is not None and summary.incomplete:
            raise UserError(
                f"--eval_dataset {benchmark.asked}: {summary.errored} of {summary.requested} questions have no score; "
                f"{folder / 'logs'} says why; the same command asks them again"
            )
        scores = {_metric_name(metric.identity): float(metric.score) for metric in report.metrics}
        primary = report.primary_metric_identity
        main = _metric_name(primary) if primary is not None else next(iter(scores), "score")
        shots, questions = self.shots[benchmark.asked], _questions(folder, main)
        return Result(benchmark.asked, model.label, "Native", main, scores, shots, questions)

    def _task(
        self,
        benchmark: Benchmark,
        settings: dict[str, Any],
        endpoint: Endpoint | None = None,
        folder: Path | None = None,
    ) -> Any:
        """The configuration of one task; without an endpoint that of looking at its data."""
        from evalscope import TaskConfig

        args = self.args
        generation = {**generation_flags(args), "seed": args.seed, **args.eval_generation_config}
        values: dict[str, Any] = {
            "model": endpoint.model if endpoint else "none",
            "datasets": [benchmark.name],
            "dataset_args": {benchmark.name: copy.deepcopy(settings)},
            "generation_config": {"stop_seqs" if key == "stop" else key: v for key, v in generation.items()},
            "eval_type": "openai_api",
            "api_url": endpoint.base_url if endpoint else "http://none",
            "api_key": (endpoint and endpoint.api_key) or "none",
            "eval_batch_size": args.eval_num_proc,
            "limit": args.eval_limit,
            "seed": args.seed,
            "dataset_hub": "huggingface" if args.use_hf else "modelscope",
            "collect_perf": False,
            **args.extra_eval_args,
        }
        if folder is not None:
            begun = (folder / "configs" / "task_config.yaml").is_file()
            values |= {"work_dir": str(folder), "no_timestamp": True, "use_cache": str(folder) if begun else None}
        try:
            return TaskConfig(**values)
        except Exception as error:  # pydantic's, which names the field
            raise UserError(f"--eval_generation_config or --extra_eval_args: {one_line(error)}") from None


def _english_exam(kind: dict[str, Any]) -> str:
    """EvalScope's own English words for the kind of exam that it is."""
    from evalscope.utils.multi_choices import MultipleChoiceTemplate

    many = "MULTIPLE_ANSWER" if kind.get("multiple_correct") else "SINGLE_ANSWER"
    return str(getattr(MultipleChoiceTemplate, f"{many}_COT" if kind.get("use_cot") else many))


def _metric_name(identity: Any) -> str:
    """``accuracy``, or ``rouge-l-recall`` for one with dimensions."""
    return "-".join([identity.name, *map(str, identity.dimensions.values())])


def _questions(folder: Path, main: str) -> list[Question]:
    """The questions of a finished task, from EvalScope's reviews."""
    found = []
    for file in sorted((folder / "reviews").rglob("*.jsonl")):
        with file.open(encoding="utf-8") as rows:
            # A question that was scored again after a kill is there twice: the last counts.
            reviews = {int(review["index"]): review for review in map(json.loads, rows)}
        for _, review in sorted(reviews.items()):
            score = review["sample_score"]["score"]
            values = {name: float(value) for name, value in score["value"].items() if value is not None}
            if main not in values and score.get("main_score_name") in values:
                values = {main: values[score["main_score_name"]], **values}  # Rouge-L-R is the report's rouge-l-recall
            asked = [m for m in review["messages"] if m["role"] != "assistant"]
            found.append(
                Question(
                    key=f"{file.stem}/{review['index']}",
                    prompt="\n\n".join(_text(message["content"]) for message in asked),
                    answer=str(score.get("prediction") or ""),
                    read=_text(score.get("extracted_prediction")),
                    expected=" | ".join(review.get("target") or []),
                    scores=values,
                )
            )
    return found


def _text(content: Any) -> str:
    return content if isinstance(content, str) else json.dumps(content, ensure_ascii=False)

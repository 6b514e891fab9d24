"""``--eval_backend lm-eval``: lm-evaluation-harness asks and scores, over ``/v1/completions``.

Tasks, prompts and scorers are the harness's; it sends token ids of the model's own tokenizer, as it does when it loads
the model itself, so that both give the same answers. Responses are kept in its request cache (sqlite), from which a
killed run goes on.
"""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rayswift import private
from rayswift.errors import UserError, one_line
from rayswift.eval.backends.base import generation_flags, is_debugging, own_logging, own_progress, without_bars
from rayswift.eval.benchmarks import QUESTION_SETS, Benchmark, require_known
from rayswift.eval.local_data import LocalData, data_line, lay_out
from rayswift.eval.models import EvalEndpoint, EvalModel
from rayswift.eval.question_sets import SPLITS, lay_out_questions
from rayswift.eval.results import Question, Result
from rayswift.modeling.loading import read_config
from rayswift.serve.running import Endpoint

if TYPE_CHECKING:
    from rayswift.arguments import EvalArguments

logger = logging.getLogger("rayswift.eval.backends.lm_eval")

#: Settings of ``simple_evaluate`` that ``--extra_eval_args`` may set; ``model_args`` and ``tokenizer`` are ours.
_EXTRA = ("apply_chat_template", "fewshot_as_multiturn", "system_instruction", "confirm_run_unsafe_code", "metadata")
_RETRIES = 8  # about a minute: a replica that is started again
_UNKNOWN_LENGTH = 2048  # the harness's own
_ANSWERED_BY_LIKELIHOOD = ("multiple_choice", "loglikelihood", "loglikelihood_rolling")


class Harness:
    """The tasks of lm-evaluation-harness."""

    folder = "lm_eval"

    def __init__(self, args: EvalArguments) -> None:
        self.args = args
        self.tasks: dict[str, Any] = {}
        known = (*_EXTRA, "model_args", "tokenizer")
        if unknown := [name for name in args.extra_eval_args if name not in known]:
            raise UserError(f"--extra_eval_args: lm-eval has no {unknown[0]} here; choose from {', '.join(known)}")
        with own_logging():
            from lm_eval.tasks import TaskManager
        if not is_debugging():
            logging.getLogger("lm_eval").setLevel(logging.ERROR)
        private.without_git_hash()

        self.manager = TaskManager(metadata=args.extra_eval_args.get("metadata"))

    def prepare(self, benchmark: Benchmark) -> None:
        if benchmark.name not in QUESTION_SETS:
            require_known(benchmark, "lm-eval", self.manager.all_tasks)
        settings = dict(benchmark.settings)
        if "few_shot_num" in settings:  # EvalScope's and SWIFT's word
            settings["num_fewshot"] = settings.pop("few_shot_num")
        try:
            with without_bars():
                self.tasks[benchmark.asked] = self._load(benchmark, settings)
        except UserError:
            raise
        except Exception as error:
            raise UserError(data_line(benchmark, error)) from None
        unsafe = any(getattr(task, "UNSAFE_CODE", False) for task in self.tasks[benchmark.asked]["tasks"].values())
        if unsafe and not self.args.extra_eval_args.get("confirm_run_unsafe_code"):
            raise UserError(
                f"--eval_dataset {benchmark.asked}: it runs code that the model writes, here; where that may "
                "be, add --extra_eval_args '{\"confirm_run_unsafe_code\": true}'"
            )

    def _load(self, benchmark: Benchmark, settings: dict[str, Any]) -> Any:
        """The benchmark's tasks with their data: ``{"tasks": …, "groups": …, "group_map": …}``."""
        if benchmark.name in QUESTION_SETS:
            return self._question_set(benchmark, settings)
        if benchmark.local_path is not None:
            # Of a tag the index knows the tasks, as its "tags".
            is_tag = benchmark.name in self.manager.all_tags
            members = sorted(self.manager.task_index[benchmark.name].tags) if is_tag else [benchmark.name]
            return self._build({name: self._local_task(benchmark, name, settings) for name in members})
        return self._build({benchmark.name: settings})

    def _build(self, overrides: dict[str, dict[str, Any]]) -> Any:
        """Registered tasks, groups or tags with other settings. (``load`` takes a dict for a task of its own.)"""
        built: list[Any] = []
        for name, settings in overrides.items():
            entry = self.manager.task_index[name]
            made = self.manager._factory.build(entry, overrides=settings, registry=self.manager.task_index)
            built += made if isinstance(made, list) else [made]
        return self.manager.load(built)

    def _local_task(self, benchmark: Benchmark, task: str, settings: dict[str, Any]) -> dict[str, Any]:
        """A task's definition with its data taken from this machine."""
        from lm_eval.tasks._yaml_loader import load_yaml

        entry = self.manager.task_index[task]
        config = load_yaml(entry.yaml_path, resolve_func=False) if entry.yaml_path else {}
        if not isinstance(config.get("task"), str) or "dataset_path" not in config:
            raise UserError(
                f"--eval_dataset {benchmark.asked}: lm-eval's {task} is made of several tasks; name one of them for "
                "local data"
            )
        subset = str(config.get("dataset_name") or "default")
        splits = {role: config.get(role) for role in ("training_split", "validation_split", "test_split")}
        split = splits["test_split"] or splits["validation_split"]
        others = [name for name in splits.values() if name and name != split]
        data = lay_out(benchmark, [subset], str(split), others)
        return {
            "dataset_path": data.path, "dataset_name": subset, "dataset_kwargs": None,
            **_splits(benchmark, config, data, subset, settings), **settings,
        }  # fmt: skip

    def _question_set(self, benchmark: Benchmark, settings: dict[str, Any]) -> Any:
        """A question set as tasks, one per subset."""
        from lm_eval.api.task import ConfigurableTask

        data, subsets = lay_out_questions(benchmark)
        split, examples = SPLITS[benchmark.name]
        own = {key: value for key, value in settings.items() if key not in ("subset_list", "extra_params")}
        tasks = {}
        for subset in subsets:
            has_examples = data.has(subset, examples)
            if own.get("num_fewshot") and not has_examples:
                raise UserError(
                    f"--eval_dataset_args: few_shot_num of {benchmark.asked} needs the examples {subset}_{examples}.csv"
                )
            name = benchmark.asked if len(subsets) == 1 else f"{benchmark.asked}_{subset}"
            config = {
                "task": name, "dataset_path": data.path, "dataset_name": subset, "test_split": split,
                "fewshot_split": examples if has_examples else None, **_QUESTION_TASKS[benchmark.name], **own,
            }  # fmt: skip
            tasks[name] = ConfigurableTask(config=config)
        return {"tasks": tasks, "groups": {}, "group_map": {}}

    def check(self, benchmark: Benchmark, endpoint: EvalEndpoint) -> None:
        args = endpoint.args
        if not self._by_likelihood(benchmark) or not endpoint.is_own:
            return
        need = f"--eval_dataset {benchmark.asked}: lm-eval's {benchmark.name} needs log probabilities of the prompt"
        if args.infer_backend != "vllm":
            raise UserError(f"{need}, which --infer_backend {args.infer_backend} does not give; use vllm")
        from rayswift.generate.preflight import wants_gpu

        if args.adapters and not args.merge_lora and not wants_gpu(args):
            raise UserError(f"{need}, which vLLM on CPUs does not give beside adapters; add --merge_lora true")

    def _by_likelihood(self, benchmark: Benchmark) -> bool:
        return any(t.OUTPUT_TYPE in _ANSWERED_BY_LIKELIHOOD for t in self.tasks[benchmark.asked]["tasks"].values())

    def run(self, benchmark: Benchmark, model: EvalModel, endpoint: Endpoint, folder: Path) -> Result:
        from lm_eval.evaluator import simple_evaluate

        from rayswift.eval.backends.lm_eval_client import RefusedRequest

        args, loaded = self.args, self.tasks[benchmark.asked]
        inner = {child for children in loaded["group_map"].values() for child in children}
        for task in loaded["tasks"].values():  # a task keeps the requests and answers of its last run
            task._instances = None
        folder.mkdir(parents=True, exist_ok=True)
        extra = {name: value for name, value in args.extra_eval_args.items() if name in _EXTRA and name != "metadata"}
        if args.eval_url and args.system:
            extra.setdefault("system_instruction", args.system)
        client = self._model(benchmark, model, endpoint)
        try:
            with own_progress(f"{model.label} {benchmark.asked}", lambda: (client.answered, client.asked)):
                found = simple_evaluate(
                    model=client,
                    tasks=[group for name, group in loaded["groups"].items() if name not in inner]  # the outermost
                    or list(loaded["tasks"].values()),
                    task_manager=self.manager,
                    limit=args.eval_limit,
                    use_cache=str(folder / "requests"),
                    gen_kwargs=self._generation() or None,
                    bootstrap_iters=0,
                    **extra,
                )
        except UserError:
            raise
        except RefusedRequest as error:
            raise UserError(f"--eval_dataset {benchmark.asked}: the endpoint refused it: {error}") from None
        except Exception as error:
            raise UserError(
                f"--eval_dataset {benchmark.asked}: lm-eval stopped ({one_line(error)}); the same command goes on with "
                "the questions that are left"
            ) from None
        return _result(benchmark, model, found)

    def _generation(self) -> dict[str, Any]:
        """Settings of generation over the task's own, in the harness's words."""
        given = {k: v for k, v in generation_flags(self.args).items() if k in self.args.given or k != "temperature"}
        names = {"max_tokens": "max_gen_toks", "stop": "until"}
        merged = {**given, **self.args.eval_generation_config}
        if merged.get("temperature"):
            merged.setdefault("do_sample", True)
        return {names.get(key, key): value for key, value in merged.items()}

    def _model(self, benchmark: Benchmark, model: EvalModel, endpoint: Endpoint) -> Any:
        """The harness's client of the endpoint."""
        from rayswift.eval.backends.lm_eval_client import Client

        extra = self.args.extra_eval_args
        tokenizer = extra.get("tokenizer") or model.tokenizer
        if tokenizer is None and self._by_likelihood(benchmark):
            raise UserError(
                f"--eval_dataset {benchmark.asked}: lm-eval's {benchmark.name} needs the model's tokenizer; name its "
                'folder with --model, or --extra_eval_args \'{"tokenizer": "DIR"}\''
            )
        # The harness has no other way in for the key.
        os.environ["OPENAI_API_KEY"] = endpoint.api_key or os.environ.get("OPENAI_API_KEY", "")
        settings = {
            "base_url": f"{endpoint.base_url.rstrip('/')}/completions",
            "model": endpoint.model,
            "tokenizer": tokenizer,
            "tokenizer_backend": "huggingface" if tokenizer else None,
            "num_concurrent": max(2, self.args.eval_num_proc),  # one at a time would retry without an end
            "max_retries": _RETRIES,
            **extra.get("model_args", {}),
        }
        if "max_length" not in settings:
            settings["max_length"] = self._max_length(endpoint, tokenizer)
        return Client(**settings)

    def _max_length(self, endpoint: Endpoint, tokenizer: str | None) -> int:
        """The longest prompt: the harness cuts longer ones on the left. As the endpoint says of its model (of an
        adapter: or of what it adapts), else ``--vllm_max_model_len``, else what the model was made for."""
        import openai

        client = openai.OpenAI(base_url=endpoint.base_url, api_key=endpoint.api_key or "none")
        served = {one.id: one for one in client.models.list()}
        own = served.get(endpoint.model)
        said = [getattr(one, "max_model_len", None) for one in (own, served.get(getattr(own, "parent", None) or ""))]
        if tokenizer and os.path.isdir(tokenizer):
            made_for = read_config(tokenizer).get("max_position_embeddings")
        else:
            made_for = None
        length = next((int(one) for one in (*said, self.args.vllm_max_model_len, made_for) if one), None)
        if length is None:
            logger.warning(
                "%s does not say how long a prompt may be: longer ones than %d tokens are cut; say it with "
                "--extra_eval_args '{\"model_args\": {\"max_length\": N}}'", endpoint.base_url, _UNKNOWN_LENGTH - 1,
            )  # fmt: skip
        return length or _UNKNOWN_LENGTH


def _splits(
    benchmark: Benchmark, config: dict[str, Any], data: LocalData, subset: str, settings: dict[str, Any]
) -> dict[str, Any]:
    """Overrides for the splits that are not there; without examples the task is asked without them."""
    roles = ("training_split", "validation_split", "fewshot_split")
    absent = {role: None for role in roles if config.get(role) and not data.has(subset, config[role])}
    source = config.get("fewshot_split") or config.get("training_split") or config.get("validation_split")
    own = (config.get("fewshot_config") or {}).get("samples")
    shots = int(settings.get("num_fewshot", config.get("num_fewshot")) or 0)
    if not shots or own or (source and data.has(subset, source)):
        return absent
    if "num_fewshot" in settings:
        raise UserError(
            f"--eval_dataset_args: few_shot_num {shots} of {benchmark.asked} needs its split {source} in "
            f"{benchmark.local_path}; add the file, or set it to 0"
        )
    logger.warning(
        "%s: its %d examples are not in %s (split %s): asked without examples",
        benchmark.asked, shots, benchmark.local_path, source,
    )  # fmt: skip
    return {**absent, "num_fewshot": 0}


#: Question sets in the harness's own terms: choices as MMLU has them there, answers as TriviaQA.
_QUESTION_TASKS: dict[str, dict[str, Any]] = {
    "general_mcq": {
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}\n{% for choice in choices %}{{'ABCDEFGHIJ'[loop.index0]}}. {{choice}}\n"
        "{% endfor %}Answer:",
        "doc_to_choice": "{{'A B C D E F G H I J'.split()[:choices|length]}}",
        "doc_to_target": "gold",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    },
    "general_qa": {
        "output_type": "generate_until",
        "doc_to_text": "Question: {{question}}\nAnswer:",
        "doc_to_target": "{{answer}}",
        "generation_kwargs": {"until": ["\n", "Question:"], "do_sample": False},
        "metric_list": [
            {
                "metric": "exact_match", "aggregation": "mean", "higher_is_better": True, "ignore_case": True,
                "ignore_punctuation": True,
            },
        ],
    },
}  # fmt: skip


def _result(benchmark: Benchmark, model: EvalModel, found: Any) -> Result:
    """The harness's results as ours. ``acc,none`` is written ``acc``; other filters keep their name.

    A benchmark of several tasks without a score of their own together gets the mean over their questions.
    """
    per_task = {task: _scores(values) for task, values in found["results"].items()}
    questions = [q for task, samples in found["samples"].items() for q in _questions(task, samples)]
    groups = found.get("groups") or {}
    if groups:
        scores = _scores(next(iter(groups.values())))
    elif len(per_task) == 1:
        scores = next(iter(per_task.values()))
    else:
        names = dict.fromkeys(name for question in questions for name in question.scores)
        each = {name: [q.scores[name] for q in questions if name in q.scores] for name in names}
        scores = {name: sum(values) / len(values) for name, values in each.items()}
    # What stands for the task: the first of the metrics that leaderboards show.
    leading = ("acc", "exact_match-flexible-extract", "exact_match", *scores)
    main = next((name for name in leading if name in scores), "score")
    if len(per_task) > 1:
        scores |= {f"{task} {name}": value for task, own in per_task.items() for name, value in own.items()}
    shots = next(iter(found["n-shot"].values()), 0)
    return Result(benchmark.asked, model.label, "lm-eval", main, scores, int(shots or 0), questions)


def _scores(values: Any) -> dict[str, float]:
    """``{"acc,none": 0.3, "acc_stderr,none": 0.1, "alias": …}`` → ``{"acc": 0.3}``."""
    split = {key.partition(","): value for key, value in values.items() if isinstance(value, (int, float))}
    return {
        _named(metric, kind): float(value)
        for (metric, comma, kind), value in split.items()
        if comma and not metric.endswith("_stderr")
    }


def _named(metric: str, kind: str) -> str:
    return metric if kind in ("none", "") else f"{metric}-{kind}"


def _questions(task: str, samples: list[dict[str, Any]]) -> list[Question]:
    """The harness's samples, one per question (it writes one per filter)."""
    merged: dict[int, Question] = {}
    for sample in samples:
        scores = {
            _named(metric, sample["filter"]): float(sample[metric])
            for metric in sample["metrics"]
            if isinstance(sample[metric], (int, float))
        }
        known = merged.get(sample["doc_id"])
        if known is None:
            answer, read, expected = _read(sample)
            prompt = sample["arguments"][0][0]
            shown = prompt if isinstance(prompt, str) else json.dumps(prompt, ensure_ascii=False)
            merged[sample["doc_id"]] = Question(f"{task}/{sample['doc_id']}", shown, answer, read, expected, scores)
        else:
            known.scores.update(scores)
    return list(merged.values())


def _read(sample: dict[str, Any]) -> tuple[str, str, str]:
    """Answer, what was read from it, and what was expected. Of choices: the likeliest one, by its text."""
    responses, target = sample["filtered_resps"], sample["target"]
    if len(sample["arguments"]) > 1 and all(isinstance(one, (list, tuple)) for one in responses):
        choices = [str(argument[1]).strip() for argument in sample["arguments"]]
        likelihoods = [float(one[0]) for one in responses]
        best = choices[likelihoods.index(max(likelihoods))]
        expected = choices[target] if isinstance(target, int) and target < len(choices) else str(target)
        shown = ", ".join(f"{choice}: {value:.2f}" for choice, value in zip(choices, likelihoods, strict=True))
        return shown, best, expected
    raw = sample["resps"][0]
    answer = raw[0] if isinstance(raw, (list, tuple)) and raw else raw
    return str(answer), str(responses[0] if responses else ""), str(target)

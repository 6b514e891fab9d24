"""``--eval_backend OpenCompass`` and ``VLMEvalKit``: EvalScope starts them, over the endpoint.

Both want other versions of libraries than serving does (old pandas and Transformers), so they run as a process of their
own: of the Python that ``--extra_eval_args '{"python": PATH}'`` names, else of this one where they are installed beside
us, else of the environment that ``make opencompass`` makes. What they need from us is the endpoint.
"""

from __future__ import annotations

import csv
import json
import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rayswift.errors import UserError, telling_line
from rayswift.eval.backends.base import generation_flags
from rayswift.eval.benchmarks import Benchmark, require_known
from rayswift.eval.models import EvalEndpoint, EvalModel
from rayswift.eval.results import Question, Result
from rayswift.serve.running import Endpoint

if TYPE_CHECKING:
    from rayswift.arguments import EvalArguments

logger = logging.getLogger("rayswift.eval.backends.opencompass_vlmeval")

#: Module and EvalScope extra of each.
_LIBRARIES = {"OpenCompass": ("opencompass", "opencompass"), "VLMEvalKit": ("vlmeval", "vlmeval")}
_RUN = "import sys; from evalscope import run_task; run_task(sys.argv[1])"
_LIST = {
    "OpenCompass": "from evalscope.backend.opencompass import OpenCompassBackendManager as M; "
    "names = M.list_datasets()",
    "VLMEvalKit": "from evalscope.backend.vlm_eval_kit import VLMEvalKitBackendManager as M; "
    "names = M.list_supported_datasets()",
}


class Toolkit:
    """A toolkit in a process of its own."""

    def __init__(self, args: EvalArguments) -> None:
        self.args = args
        self.kind = args.eval_backend
        self.folder = {"OpenCompass": "opencompass", "VLMEvalKit": "vlmeval"}[self.kind]  # SWIFT's names
        self.python = self._find_python()
        self.known: list[str] | None = None

    def _find_python(self) -> str:
        """A Python that has EvalScope and the toolkit: the one that is named, else this one, else that of the folder
        ``.venv-opencompass`` here or beside this environment. Raises UserError where there is none."""
        module, extra = _LIBRARIES[self.kind]
        named = self.args.extra_eval_args.get("python") or os.environ.get(f"RAYSWIFT_{self.kind.upper()}")
        own = os.path.join(f".venv-{extra}", "bin", "python")
        places = [str(named)] if named else [sys.executable, own, os.path.join(os.path.dirname(sys.prefix), own)]
        for python in map(shutil.which, map(os.path.expanduser, places)):
            if python is None:
                continue
            look = f"import importlib.util as u; print(all(u.find_spec(n) for n in ('evalscope', '{module}')))"
            done = subprocess.run([python, "-c", look], capture_output=True, text=True)
            if done.stdout.strip() == "True":
                return os.path.abspath(python)
        if named and shutil.which(os.path.expanduser(str(named))) is None:
            raise UserError(f"--extra_eval_args: python {named}: no such program")
        raise UserError(
            f"--eval_backend {self.kind} needs EvalScope's extra `{extra}` in an environment of its own: "
            f"`make {extra}` makes it here, or pip install 'evalscope[{extra}]' elsewhere and name its Python: "
            '--extra_eval_args \'{"python": "ENV/bin/python"}\''
        )

    def prepare(self, benchmark: Benchmark) -> None:
        if self.known is None:
            done = subprocess.run(
                [self.python, "-c", f"import json; {_LIST[self.kind]}; print('\\n' + json.dumps(sorted(names)))"],
                capture_output=True,
                text=True,
            )
            if done.returncode:
                why = telling_line(done.stderr, "no output")[:300]
                raise UserError(f"--eval_backend {self.kind}: {self.python} cannot load it ({why})")
            self.known = json.loads(done.stdout.strip().splitlines()[-1])
        require_known(benchmark, self.kind, self.known)
        if benchmark.local_path and not os.path.isdir(benchmark.local_path):
            raise UserError(f"--eval_dataset {benchmark.asked}: {benchmark.local_path} is no folder; {self.kind} takes "
                            "the folder that holds its `data` folder")  # fmt: skip

    def check(self, benchmark: Benchmark, endpoint: EvalEndpoint) -> None:
        """Every engine can chat."""

    def run(self, benchmark: Benchmark, model: EvalModel, endpoint: Endpoint, folder: Path) -> Result:
        folder.mkdir(parents=True, exist_ok=True)
        config = folder.resolve() / "task.json"
        # --extra_eval_args can hold a judge's key: only for us, and only while it runs.
        with open(os.open(config, os.O_CREAT | os.O_WRONLY | os.O_TRUNC, 0o600), "w", encoding="utf-8") as file:
            json.dump(self._task(benchmark, endpoint, folder.resolve()), file)
        # The endpoint's key goes this way: the toolkits copy their configuration into files and logs of their own.
        # Without one the user's own stays, which is that of judges.
        key = endpoint.api_key or os.environ.get("OPENAI_API_KEY") or "EMPTY"
        environment = {**os.environ, "OPENAI_API_KEY": key, "HF_HUB_OFFLINE": os.environ.get("HF_HUB_OFFLINE", "0")}
        if benchmark.local_path:
            environment |= {"COMPASS_DATA_CACHE": benchmark.local_path, "LMUData": benchmark.local_path}
        try:
            with (folder / "log.txt").open("a", encoding="utf-8") as log:
                done = subprocess.run(
                    [self.python, "-c", _RUN, str(config)], cwd=benchmark.local_path or folder, env=environment,
                    stdout=log, stderr=subprocess.STDOUT,
                )  # fmt: skip
        finally:
            config.unlink(missing_ok=True)
        read = _read_opencompass if self.kind == "OpenCompass" else _read_vlmeval
        scores, questions = read(folder) if not done.returncode else ({}, [])
        if not scores:
            log_file = folder / "log.txt"
            why = telling_line(log_file.read_text("utf-8", "replace"), "no output")[:300]
            raise UserError(
                f"--eval_dataset {benchmark.asked}: {self.kind} gave no score ({why}); its log is {log_file}"
            )
        main = next((name for name in scores if "acc" in name.lower() or "overall" in name.lower()), next(iter(scores)))
        return Result(benchmark.asked, model.label, self.kind, main, scores, None, questions)

    def _task(self, benchmark: Benchmark, endpoint: Endpoint, folder: Path) -> dict[str, Any]:
        """EvalScope's configuration of the run (what SWIFT hands it)."""
        args, url = self.args, f"{endpoint.base_url.rstrip('/')}/chat/completions"
        extra = {key: value for key, value in args.extra_eval_args.items() if key != "python"}
        generation = {**generation_flags(args), **args.eval_generation_config}
        if self.kind == "OpenCompass":
            model = {
                "path": endpoint.model, "openai_api_base": url, "key": "ENV",
                "is_chat": args.use_chat_template, "temperature": generation.get("temperature", 0.0),
                "batch_size": args.eval_num_proc,
            }  # fmt: skip
            if generation.get("max_tokens"):
                model["max_out_len"] = generation["max_tokens"]
            reuse = "latest" if any(folder.glob("*/predictions")) else None
            own = {"datasets": [benchmark.name], "models": [model], "reuse": reuse}
        else:
            model = {"type": endpoint.model, "name": "CustomAPIModel", "api_base": url, **generation}
            own = {"data": [benchmark.name], "model": [model], "nproc": args.eval_num_proc, "reuse": True}
        own |= {"work_dir": str(folder), "limit": args.eval_limit, **benchmark.settings, **extra}
        return {
            "eval_backend": self.kind, "work_dir": str(folder), "no_timestamp": True,
            "eval_config": {key: value for key, value in own.items() if value is not None},
        }  # fmt: skip


def _read_opencompass(folder: Path) -> tuple[dict[str, float], list[Question]]:
    """Scores of the newest summary (``dataset, version, metric, mode, MODEL``), and the predictions beside it."""
    summaries = sorted(folder.glob("*/summary/*.csv"))
    if not summaries:
        return {}, []
    with summaries[-1].open(encoding="utf-8") as file:
        rows = [row for row in csv.reader(file) if len(row) >= 5]
    scores = {}
    for dataset, _, metric, _, value in (row[:5] for row in rows[1:]):
        if value.replace(".", "", 1).isdigit():  # it writes percentages, and - for what was not run
            scores[metric if len(rows) == 2 else f"{dataset} {metric}"] = float(value) / 100
    questions = []
    for path in sorted(summaries[-1].parents[1].glob("predictions/*/*.json")):
        for number, row in json.loads(path.read_text(encoding="utf-8")).items():
            prompt = row.get("origin_prompt")
            if isinstance(prompt, list):
                prompt = "\n\n".join(str(turn.get("prompt", "")) for turn in prompt)
            answer = str(row.get("prediction", ""))
            questions.append(Question(f"{path.stem}/{number}", str(prompt), answer, "", str(row.get("gold", ""))))
    return scores, questions


def _read_vlmeval(folder: Path) -> tuple[dict[str, float], list[Question]]:
    """Scores of VLMEvalKit's result tables. Its answers stay in the spreadsheets beside them."""
    scores: dict[str, float] = {}
    for path in sorted([*folder.rglob("*_acc.csv"), *folder.rglob("*_score.csv")]):
        with path.open(encoding="utf-8") as file:
            for row in csv.DictReader(file):
                for name, value in row.items():
                    if name and value and value.replace(".", "", 1).isdigit() and name not in ("split", "index"):
                        scores[name] = float(value)
    return scores, []

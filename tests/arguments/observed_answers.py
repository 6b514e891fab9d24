"""What ``infer``, ``sample``, ``app``, ``eval`` and ``export`` make of their arguments: who is asked what and how, what
is said, returned and written."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

from observed_engines import Record, everything_here
from observed_serving import ASKED
from observed_training import encode_all, new_folder

from rayswift.arguments import Arguments

#: Of what is said, when it was.
_TIMES = re.compile(r"'(runtime|samples/s|tokens/s)': [\d.e+-]+|\d{8}-\d{6}|\d{4}(-\d\d){5}")


def observed(work: Callable[[Any, Record], Any], files: Path) -> Callable[[Arguments], Any]:
    """An observer: all that a command asks for, says, returns and writes. ``files``: what hubs have."""

    def observe(args: Arguments) -> Any:
        seen: Record = {}
        said = io.StringIO()
        with (
            new_folder(seen), everything_here(seen, files), mock.patch("sys.stdin", io.StringIO("one new\nthree\n")),
            contextlib.redirect_stdout(said), contextlib.redirect_stderr(io.StringIO()),
        ):  # fmt: skip
            seen["returned"] = work(args, seen)
            seen["said"] = _TIMES.sub("", said.getvalue().replace(os.getcwd(), ""))
        # A run's own file has a digest of all settings, whether they change anything or not.
        return {name: value for name, value in seen.items() if not name.endswith("run.json")}

    return observe


def infer(args: Any, seen: Record) -> Any:
    from rayswift.inference.command import infer

    return infer(args)


def sample(args: Any, seen: Record) -> Any:
    from rayswift.sampling.run import sample

    return {key: value for key, value in sample(args).items() if key not in ("output_file", "tokens/s")}


def app(args: Any, seen: Record) -> Any:
    from rayswift.chat_page import command, page

    shown = mock.MagicMock()
    shown.launch.side_effect = lambda **how: seen.update(launched=how) or (0, 0, 0)

    def build_page(engine: Any, params: Any, **about: Any) -> Any:
        seen["page"] = [about, list(engine.stream(ASKED, params))]
        return shown

    with (
        mock.patch.object(page, "build_page", build_page),
        mock.patch.object(command, "require_free_port", return_value=None),
        mock.patch.object(command, "Middleware", lambda cls, **about: about),
        mock.patch.object(command.private, "replace_http_protocol", return_value=None),
        mock.patch.object(command, "threading", SimpleNamespace(Event=mock.MagicMock)),
    ):
        return command.app(args)


def evaluate(args: Any, seen: Record) -> Any:
    from rayswift import journal
    from rayswift.eval import evaluate as evaluation
    from rayswift.eval.backends import opencompass_vlmeval as toolkit

    clock = SimpleNamespace(**{**vars(time), "strftime": lambda _: "date"})

    def run(words: list[str], **how: Any) -> Any:
        if words[1] == "-c" and "run_task" in words[2]:
            task = json.loads(Path(words[3]).read_text().replace(os.getcwd(), ""))
            own = {name: how["env"].get(name) for name in ("OPENAI_API_KEY", "COMPASS_DATA_CACHE")}
            seen.setdefault("tasks", []).append([words[0], task["eval_config"], own])
            folder = Path(words[3]).parent / "1" / "summary"
            folder.mkdir(parents=True)
            (folder / "s.csv").write_text("dataset,version,metric,mode,m\nARC_c,1,accuracy,gen,62.5\n")
            (folder.parent / "x_acc.csv").write_text("split,Overall\nall,62.5\n")
        return SimpleNamespace(returncode=0, stdout='True\n["ARC_c", "ARC_e"]' if "names" in words[2] else "True")

    with (
        mock.patch.object(toolkit.subprocess, "run", run),
        mock.patch.object(evaluation, "time", clock),
        mock.patch.object(journal, "time", clock),
    ):
        return evaluation.evaluate(args)


def export(args: Any, seen: Record) -> Any:
    from rayswift.data.flow import prepare
    from rayswift.exporting import export, quantize
    from rayswift.hub.push import Destination

    def run_in_task(job: Any, rows: Any, folder: str, options: Any) -> None:
        seen["quantised"] = [job, [row.tolist() for row in rows], options]

    def push(self: Any, staging: str, folder: str, message: str) -> str:
        files = {path.name: path.read_bytes().decode(errors="replace") for path in Path(staging).iterdir()}
        seen["pushed"] = [vars(self), files, message]
        return self.name

    node = {"NodeID": "a", "Alive": True, "Resources": {"CPU": 64.0, "GPU": 8.0}}
    with (
        mock.patch.object(quantize, "check_libraries"), mock.patch("rayswift.exporting.quantizers.check_libraries"),
        mock.patch.object(quantize, "run_in_task", run_in_task), mock.patch("ray.nodes", return_value=[node]),
        mock.patch.object(prepare, "encode_all", encode_all(seen)),
        mock.patch.object(Destination, "check_token"), mock.patch.object(Destination, "push", push),
    ):  # fmt: skip
        return export(args).replace(os.getcwd(), "")


#: What is called for a command. Nothing of them is replaced but what `observed_engines` and the above say.
WORK: dict[str, Callable[[Any, Record], Any]] = {
    "infer": infer, "sample": sample, "app": app, "eval": evaluate, "export": export,
}  # fmt: skip

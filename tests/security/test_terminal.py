"""What strangers wrote does not steer the terminal: escapes are spelled out wherever their text is shown."""

from __future__ import annotations

import io
import logging
from types import SimpleNamespace
from typing import Any

import pytest

from rayswift import redaction
from rayswift.cli import adapters, main
from rayswift.cli.cluster_state import job_list
from rayswift.cli.status import status
from rayswift.console import printable, say
from rayswift.errors import UserError
from rayswift.generate.types import Answer, SamplingParams
from rayswift.inference import run
from rayswift.serve.status_line import StatusLine

#: Clears the screen, sets the window's title, goes back in the line, and turns what follows around.
EVIL = "\x1b[2J\x1b]0;pwned\x07a\rb\x08\x9b31m\u202ec"
SPELLED = "\\u001b[2J\\u001b]0;pwned\\u0007a\\u000db\\u0008\\u009b31m\\u202ec"


def test_control_characters_are_spelled_out_but_for_lines_and_tabs() -> None:
    assert printable(EVIL) == SPELLED
    assert printable("a\tb\nć 你好 🎉") == "a\tb\nć 你好 🎉"


def test_what_is_said_is_printable_and_holds_no_known_secret(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(redaction, "_spellings", ["long-secret"])
    say(f"{EVIL} long-secret")
    say({"n": 1}, end="")
    assert capsys.readouterr().out == f"{SPELLED} ***\n{{'n': 1}}"
    narrow = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr("sys.stdout", narrow)
    say("你\ud800")
    assert narrow.buffer.getvalue() == b"\\u4f60\\ud800\n"


def test_logs_and_errors_of_a_command(capsys: pytest.CaptureFixture[str]) -> None:
    root = logging.getLogger()
    handlers, root.handlers[:] = root.handlers[:], []
    try:
        main.log_to_stderr()
        logging.getLogger("some.library").warning("row says %s", EVIL)
    finally:
        root.handlers[:] = handlers
    assert main.report(UserError(f"a.jsonl:1: {EVIL}"), "rayswift sft") == 2
    told = capsys.readouterr().err.splitlines()
    assert told == [f"warning: row says {SPELLED}", f"rayswift sft: error: a.jsonl:1: {SPELLED}"]


def test_a_crash(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(redaction, "_spellings", ["long-secret"])
    main.show_crash(OSError, OSError(f"{EVIL} long-secret https://u:pw@h/"), None)
    assert capsys.readouterr().err == f"OSError: {SPELLED} *** https://***@h/\n"


def test_a_rows_query_and_the_models_answer(capsys: pytest.CaptureFixture[str]) -> None:
    engine: Any = SimpleNamespace(stream=lambda *_: iter([EVIL, "!"]), last_stream=Answer(EVIL))
    source = run.shown(engine, SamplingParams())
    row = {"messages": [{"role": "user", "content": EVIL}]}
    [(_, answer)] = source([SimpleNamespace(numbers=[0], row=row)])  # type: ignore[list-item]
    assert answer.text == EVIL  # the result file keeps what was said
    assert capsys.readouterr().out.startswith(f"[QUERY] {SPELLED}\n[RESPONSE] {SPELLED}!\n")


def test_names_on_a_cluster_and_of_an_endpoint(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    node = {"state": "alive", "role": "head", "pool": EVIL, "address": EVIL, "resources": {EVIL: 1}}
    run = {"run": EVIL, "command": "sft", "model": EVIL, "state": "running", "since": 1, "heard": 1, "step": 1,
           "max_steps": 2, "eta_seconds": None, "checkpoint": None, "nodes": {}, "job": EVIL,
           **dict.fromkeys(("loss", "eval_loss", "tokens/s", "goodput", "data_wait"))}  # fmt: skip
    job = SimpleNamespace(submission_id=EVIL, job_id=None, status="RUNNING", start_time=1, end_time=None,
                          driver_exit_code=None, message=EVIL, entrypoint="python \x1b[2J --hub_token X")  # fmt: skip
    state = {"time": 2, "nodes": [node], "pools": [], "runs": [run], "deployments": [],
             "autoscaler": {"pending": [EVIL], "demands": [], "failures": [EVIL]},
             "jobs": job_list(SimpleNamespace(list_jobs=lambda: [job]))}  # type: ignore[arg-type] # fmt: skip
    monkeypatch.setattr("rayswift.cli.status.connect_client", lambda address: None)
    monkeypatch.setattr("rayswift.cli.cluster_state.cluster_state", lambda *_, **__: state)
    assert status([]) == 0
    text = capsys.readouterr().out
    assert text.count(SPELLED) == 9
    assert "python '\\u001b[2J' --hub_token '***'" in text
    assert status(["--json"]) == 0
    monkeypatch.setattr(adapters, "_call", lambda *_: {"data": [{"id": EVIL, "model": EVIL}], "id": EVIL})
    assert adapters.adapters(["list"]) == adapters.adapters(["load", "x"]) == 0
    shown = capsys.readouterr().out
    assert not set(EVIL) & set(shown) - set("[2J]0;pwnedab31mc")
    assert shown.count(SPELLED) == 3
    line = StatusLine(io.StringIO(), live=False, interval=1)
    line.show({"requests": 0, "tokens": 0, "running": 0, "waiting": 0, "errors": 0, "resumed": 0}, {EVIL: "1/1"})
    assert SPELLED in line.stream.getvalue()  # type: ignore[attr-defined]

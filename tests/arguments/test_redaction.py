"""Secrets are masked by name, by look and by value, wherever they would be printed, logged, saved or shown."""

from __future__ import annotations

import json
import logging
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from rayswift import redaction
from rayswift.arguments import make_arguments, redact_text
from rayswift.redaction import is_secret, mask_files, redact, remember

SECRET = "correct horse/battery"
SHOWS = ("abc123", "hunter2-x", "zyx987")  # what may be left of none of the texts below


@pytest.fixture(autouse=True)
def nothing_known(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Each test begins with a process that knows no secret, and ends with the logs as they were."""
    factory = logging.getLogRecordFactory()
    monkeypatch.setattr(redaction, "_spellings", [])
    yield
    logging.setLogRecordFactory(factory)


@pytest.mark.parametrize(
    "name",
    [
        "api_key", "apiKey", "apikey", "X-Api-Key", "Authorization", "Proxy-Authorization", "hub_token", "hfToken",
        "judge_api_key", "OPENAI_API_KEY", "secretAccessKey", "aws_secret_access_key", "client-secret", "passwd",
        "accessToken", "authtoken", "Set-Cookie", "api_keys", "X-Amz-Security-Token", "--wandb_api_key",
    ],
)  # fmt: skip
def test_names_of_secrets(name: str) -> None:
    assert is_secret(name)


@pytest.mark.parametrize(
    "name",
    ["max_tokens", "eos_token", "pad_token", "image_token", "lazy_tokenize", "ssl_keyfile", "keys", "monkey", "turkey",
     "teacher_tag_key", "tokenizer", "author", "max_new_tokens", "signature"],
)  # fmt: skip
def test_names_of_other_settings(name: str) -> None:
    assert not is_secret(name)


@pytest.mark.parametrize(
    "text",
    [
        "Authorization: Bearer abc123", 'headers={"Authorization": "Basic abc123=="}', "authorization: abc123",
        "HTTP 401 for Bearer abc123", "https://h/d.jsonl?token=abc123&x=1", "https://h/d?x=1&X-Amz-Signature=abc123",
        "https://h/d?sig=abc123#p", "https://u:hunter2-x@h/d", "s3://id:hunter2-x@bucket", "OPENAI_API_KEY=abc123 x",
        "--hub_token=abc123", "run(api_key='abc123 zyx987', n=1)", '{"apiKey": "abc123"}', "{'accessToken': 'abc123'}",
        '{"a": {"client_secret": "abc\\"abc123"}}', '{"api_keys": ["abc123", "zyx987"]}', '{"password": 123456789}',
        json.dumps({"body": json.dumps({"token": "abc123"})}), "ghp_abc123abc123abc123abc123",
    ],
)  # fmt: skip
def test_texts_with_secrets(text: str) -> None:
    shown = redact_text(text)
    assert "***" in shown
    assert not any(secret in shown for secret in (*SHOWS, "123456789"))


@pytest.mark.parametrize(
    "text",
    [
        "--hub_token: ModelScope does not know this token (HTTP 401)", "bearer tokens are needed",
        "authorization failed", "--api_key is empty (a variable that is not set?)", "data/key=7/part.parquet", "https://h/d?page=2&size=10",
        '{"max_tokens": 7, "eos_token": "<|im_end|>", "columns": ["a"]}', "rows.jsonl#500", "https://host:8000/v1",
        "the monkey=7 and n=3", '{"role": "user", "content": "hi"}',
    ],
)  # fmt: skip
def test_texts_without_secrets_stay(text: str) -> None:
    assert redact_text(text) == text


@pytest.mark.parametrize("text", ['"' * 60_000, "\\" * 60_000, '{"key": "' + "\\" * 60_000, "a=" * 30_000,
                                  "?a=" * 20_000, "://a:" * 12_000, "Bearer " * 9_000, '"key":[' * 9_000])  # fmt: skip
def test_no_text_takes_long(text: str) -> None:
    import time

    start = time.perf_counter()
    redact_text(text)
    assert time.perf_counter() - start < 1


def test_nested_settings_by_name() -> None:
    given = {
        "model": "m", "extra": {"headers": {"Authorization": "Bearer x"}, "list": [{"apiKey": "x", "n": 1}]}, "key": 7,
        "token": None, "api_key": ["x"], "url": "https://h/?token=x",
    }  # fmt: skip
    assert redact(given) == {
        "model": "m", "extra": {"headers": {"Authorization": "***"}, "list": [{"apiKey": "***", "n": 1}]}, "key": "***",
        "token": None, "api_key": "***", "url": "https://h/?token=***",
    }  # fmt: skip


def test_a_known_secret_is_masked_by_value_wherever_it_stands() -> None:
    text = f"no model {SECRET}; {json.dumps(SECRET)}; https://h/correct%20horse%2Fbattery?q=correct+horse%2Fbattery"
    assert redact_text(text) == text
    make_arguments("deploy", model="m", api_key=[SECRET, "k"])
    assert redact_text(text) == 'no model ***; "***"; https://h/***?q=***'
    assert redact_text("look") == "look"  # short keys are no secrets by value


@pytest.mark.parametrize(
    ("command", "settings"),
    [
        ("sample", {"model": "m", "dataset": ["d"], "judge_api_key": SECRET}),
        ("infer", {"model": "m", "model_kwargs": {"headers": {"x-api-key": SECRET}}}),
        ("deploy", {"models": {"small": {"model": "m", "model_kwargs": {"hfToken": SECRET}}}}),
        ("sft", {"model": "m", "dataset": ["https://u:correct%20horse%2Fbattery@h/d.jsonl"]}),
        ("sft", {"model": "m", "dataset": [f"https://h/d.jsonl?token={SECRET.replace(' ', '%20')}"]}),
    ],
)  # fmt: skip
def test_every_setting_makes_its_secrets_known(command: str, settings: dict[str, Any]) -> None:
    args = make_arguments(command, **settings)
    assert "correct" not in redact_text(f"said {SECRET}")
    assert "horse" not in json.dumps(args.to_dict()) + repr(args)


def test_secrets_of_the_environment_are_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DASHSCOPE_API_KEY", SECRET)
    make_arguments("infer", model="m")
    assert redact_text(f"said {SECRET}") == "said ***"


def test_logs_of_every_library_are_masked(caplog: pytest.LogCaptureFixture) -> None:
    args = make_arguments("sft", model="m", dataset=["d"], hub_token=SECRET)
    redaction._spellings.clear()
    pickle.loads(pickle.dumps(args))  # as a worker gets it
    log = logging.getLogger("some.library")
    log.warning("GET https://h/?t=%s for %d", SECRET, 7)
    try:
        raise OSError(f"refused: {SECRET}")
    except OSError:
        log.exception("failed")
    assert "GET https://h/?t=*** for 7" in caplog.text
    assert "OSError: refused: ***" in caplog.text
    assert SECRET not in caplog.text


def test_prompts_are_kept_word_for_word(tmp_path: Path) -> None:
    """A model was trained with them: only a known secret in them is masked."""
    system = 'Answer as {"key": "value", "token": "abc"}, key=value, Authorization: Bearer x1.'
    args = make_arguments("sft", model="m", dataset=["d"], system=system)
    args.save(tmp_path)
    saved = json.loads((tmp_path / "args.json").read_text())
    assert saved["system"] == system
    remember({"api_key": "Bearer x1"})
    assert make_arguments("sft", model="m", dataset=["d"], system=system).to_dict()["system"].endswith("***.")


def test_what_another_program_wrote_is_masked(tmp_path: Path) -> None:
    (tmp_path / "configs").mkdir()
    (tmp_path / "outside").write_text(SECRET)
    work = tmp_path / "configs"
    (work / "task.yaml").write_text(f"api_key: {SECRET}\nmodel: m\n")
    (work / "log.bin").write_bytes(b"\xff\xfe\r\n" + SECRET.encode())
    (work / "link").symlink_to(tmp_path / "outside")
    remember({"api_key": SECRET})
    mask_files(work)
    assert (work / "task.yaml").read_text() == "api_key: ***\nmodel: m\n"
    assert (work / "log.bin").read_bytes() == b"\xff\xfe\r\n***"
    assert (tmp_path / "outside").read_text() == SECRET


@pytest.mark.skipif(not os.path.exists("/proc/self/cmdline"), reason="ps reads it elsewhere")
def test_a_secret_does_not_stand_in_the_list_of_processes() -> None:
    show = "print(open('/proc/self/cmdline').read().replace(chr(0), ' '))"
    code = f"import sys; from rayswift.cli.main import main; main(); {show}; print(sys.argv)"
    words = ["sft", "--hub_token", "abc123-long-enough", "--model_kwargs", '{"api_key": "hunter2-x"}', "--seed=7"]
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, timeout=60)
    listed, argv = done.stdout.splitlines()
    assert not any(secret in listed for secret in SHOWS)
    assert "sft --hub_token ***" in listed
    assert "--seed=7" in listed
    assert argv == str(["-c", *words])


def test_what_a_server_says_of_a_key_does_not_hold_it() -> None:
    """Answers that failed are in result files and on the page."""
    import httpx
    import openai

    from rayswift.generate.endpoint import explain

    client = openai.OpenAI(base_url="http://u:hunter2-x@h/v1", api_key="k")
    make_arguments("infer", model="m", base_url="http://u:hunter2-x@h/v1", api_key=SECRET)
    request: Any = httpx.Request("POST", "http://h")
    response: Any = httpx.Response(400, request=request)
    error = openai.BadRequestError("x", response=response, body={"message": f"Incorrect key provided: {SECRET}"})
    assert str(explain(error, client, "m")) == "Incorrect key provided: ***"
    assert str(explain(error, client, None)) == "--base_url http://***@h/v1: Incorrect key provided: ***"
    lost = openai.APIConnectionError(request=request)
    assert "hunter2" not in str(explain(lost, client, "m"))

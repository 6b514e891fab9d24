"""Rows with pictures: they reach models that take them, and are refused by name and count elsewhere."""

from __future__ import annotations

import base64
import contextlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fake_endpoint import fake_endpoint

from rayswift.arguments import make_arguments
from rayswift.errors import UserError
from rayswift.generate.media import with_files
from rayswift.generate.types import Endpoint, prompt_of
from rayswift.inference import command
from rayswift.sampling import engines, sample

PNG = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNkYPhfDwAChwGA60e6kgAAAABJRU5ErkJggg=="
)
U, A = "user", "assistant"


@pytest.fixture
def rows(tmp_path: Path) -> str:
    """A row with a picture of its own, one with two, one of text alone."""
    (tmp_path / "dot.png").write_bytes(PNG)
    dot, far = str(tmp_path / "dot.png"), "https://example.org/b.jpg"
    path = tmp_path / "rows.jsonl"
    path.write_text(
        "".join(
            json.dumps(row) + "\n"
            for row in (
                {"messages": [{"role": U, "content": "What is <image>?"}], "images": [dot]},
                {"messages": [{"role": U, "content": "Which is bigger?"}], "images": [dot, far]},
                {"messages": [{"role": U, "content": "And without?"}, {"role": A, "content": "Nothing."}]},
            )
        )
    )
    return str(path)


DOT = {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{base64.b64encode(PNG).decode()}"}}
FAR = {"type": "image_url", "image_url": {"url": "https://example.org/b.jpg"}}
ASKED: list[Any] = [
    [{"type": "text", "text": "What is "}, DOT, {"type": "text", "text": "?"}],
    [DOT, FAR, {"type": "text", "text": "Which is bigger?"}],
    "And without?",
]


def test_files_stand_where_their_marks_are() -> None:
    row = {"images": [{"path": "https://h/1"}, {"path": "https://h/2"}], "audios": [{"path": "data:audio/wav;base64,"}]}
    messages = [
        {"role": "system", "content": "See <video>."},
        {"role": U, "content": "a"},
        {"role": A, "content": "b"},
        {"role": U, "content": "<image>c<audio>"},
    ]
    system, first, answer, last = with_files(messages, row)
    assert (system, answer) == (messages[0], messages[2])
    image = {"type": "image_url", "image_url": {"url": "https://h/1"}}
    assert first["content"] == [image, {"type": "text", "text": "a"}]
    assert [part["type"] for part in last["content"]] == ["image_url", "text", "audio_url"]
    assert with_files(messages, {"images": []}) == messages
    with pytest.raises(UserError, match="the messages have 2 <image> and the row 1 images"):
        with_files([{"role": U, "content": "<image><image>"}], {"images": [{"path": "https://h/1"}]})
    with pytest.raises(UserError, match=r"no\.png: no such image"):
        with_files([{"role": U, "content": ""}], {"images": [{"path": "no.png"}]})
    kept = {"messages": [*messages[:3]], "images": [{"path": "https://h/1"}]}
    assert prompt_of(kept)[-1]["content"] == [image, {"type": "text", "text": "a"}]


def test_an_endpoint_gets_the_pictures_and_a_row_whose_picture_is_missing_is_refused(
    rows: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    with Path(rows).open("a") as file:
        file.write(json.dumps({"query": "Lost?", "images": ["lost.png"]}) + "\n")
    with fake_endpoint(lambda body: [{"content": "A dot."}]) as (base_url, asked):
        args = make_arguments("infer", base_url=base_url, val_dataset=[rows], result_path=str(tmp_path / "out.jsonl"))
        results = command.infer(args)
    assert [body["messages"][-1]["content"] for body in sorted(asked, key=lambda body: str(body["messages"]))] == [
        ASKED[2], *sorted(ASKED[:2], key=str)
    ]  # fmt: skip
    assert [row["response"] for row in results or ()] == ["A dot."] * 3 + [""]
    assert results and results[0]["messages"][0]["content"] == "What is <image>?"  # the row as it is in the file
    assert "lost.png: no such image" in results[3]["error"]
    assert "1 of 4 rows have no answer, the first: lost.png" in caplog.text


@contextlib.contextmanager
def deployed(args: Any, specs: list[Any]) -> Iterator[Endpoint]:
    """In place of a deployment of vLLM: it is asked the same."""
    assert [spec.engine for spec in specs] == ["vllm"]
    with fake_endpoint(lambda body: [{"content": f"seed {body.get('seed')}"}]) as (base_url, asked):
        yield Endpoint(base_url, None, "fake")
    SEEN.extend(body["messages"][-1]["content"] for body in asked)


SEEN: list[Any] = []


def pictured(model: str, folder: Path) -> str:
    """A model whose configuration says that it takes pictures."""
    shutil.copytree(model, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"vision_config": {"depth": 1}}))
    return str(folder)


def test_vllm_gets_the_pictures_if_its_model_takes_them(
    rows: str, tiny_dir: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(command, "running_deployment", deployed)
    monkeypatch.setattr(engines, "running_deployment", deployed)
    model = pictured(tiny_dir, tmp_path / "vl")
    SEEN.clear()
    shared = {"model": model, "use_gpu": False}
    command.infer(
        make_arguments("infer", val_dataset=[rows], infer_backend="vllm", result_path=str(tmp_path / "o"), **shared)
    )
    assert sorted(SEEN, key=str) == sorted(ASKED, key=str)
    SEEN.clear()
    settings = {"sampler_engine": "vllm", "num_return_sequences": 1, "output_dir": str(tmp_path)}
    made = sample(make_arguments("sample", dataset=[rows], **settings, **shared))
    assert sorted(SEEN, key=str) == sorted(ASKED, key=str)
    kept = [json.loads(line) for line in Path(made["output_file"]).read_text().splitlines()]
    assert [row["images"][0]["path"][-7:] for row in kept[:2]] == ["dot.png"] * 2
    assert len({row["messages"][-1]["content"] for row in kept}) == 3  # each with its own seed


def test_where_no_picture_can_go_such_rows_are_refused_with_their_count(
    rows: str, tiny_dir: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    args = {"model": tiny_dir, "max_new_tokens": 4, "use_gpu": False}
    results = command.infer(make_arguments("infer", val_dataset=[rows], result_path=str(tmp_path / "o"), **args))
    assert [("images" in row.get("error", ""), bool(row["response"])) for row in results or ()] == [
        (True, False), (True, False), (False, True),
    ]  # fmt: skip
    assert "2 of 3 rows have no answer, the first: the row has images, which the engine transformers" in caplog.text
    caplog.clear()
    with pytest.raises(UserError, match="no prompts in it"):
        sample(make_arguments("sample", dataset=[f"{rows}#2"], sampler_engine="vllm", output_dir=str(tmp_path), **args))
    assert "2 rows cannot be prompts and are left out, the first:" in caplog.text
    assert "rows.jsonl:1: the row has images, which tiny-llama does not take" in caplog.text

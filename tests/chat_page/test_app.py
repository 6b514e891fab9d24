"""The chat page without a browser: what it sends, in which language it speaks, and what is refused."""

from __future__ import annotations

import base64
import itertools
import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from rayswift.arguments import make_arguments
from rayswift.chat_page import app
from rayswift.chat_page.command import media_offered
from rayswift.chat_page.messages import openai_messages
from rayswift.errors import UserError
from rayswift.generate.endpoint import EndpointEngine
from rayswift.generate.media import media_of
from rayswift.generate.types import SamplingParams

PNG = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
)


def text(words: str) -> list[dict[str, str]]:
    """Gradio's content of a message with only text."""
    return [{"type": "text", "text": words}]


def test_a_conversation_is_sent_as_it_was_held() -> None:
    history = [
        {"role": "user", "content": text("hi"), "metadata": None},
        {"role": "assistant", "content": text("hello")},
        {"role": "user", "content": "and"},
        {"role": "assistant", "content": text("")},
    ]
    assert openai_messages(history, "now?", "Be brief.") == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "hello"},
        {"role": "user", "content": "and"},
        {"role": "user", "content": "now?"},
    ]
    assert openai_messages([], "now?", "  ") == [{"role": "user", "content": "now?"}]


def test_uploads_are_sent_inside_the_message(tmp_path: Path) -> None:
    picture = tmp_path / "dot.png"
    picture.write_bytes(PNG)
    (message,) = openai_messages([], {"text": "what is it?", "files": [str(picture)]})
    image, words = message["content"]
    assert words == {"type": "text", "text": "what is it?"}
    kind, _, data = image["image_url"]["url"].partition(";base64,")
    assert (image["type"], kind, base64.b64decode(data)) == ("image_url", "data:image/png", PNG)
    earlier = [{"role": "user", "content": [{"type": "file", "file": {"path": str(picture)}}]}]
    assert openai_messages(earlier, "again")[0]["content"] == [image]
    (tmp_path / "notes.zip").write_bytes(b"")
    with pytest.raises(UserError, match=r"notes\.zip"):
        openai_messages([], {"text": "", "files": [str(tmp_path / "notes.zip")]})


def test_upload_is_offered_for_what_the_model_takes(smollm2_dir: str) -> None:
    assert media_of({"vision_config": {}, "video_token_id": 3}) == ("image", "video")
    assert media_of({"audio_config": {}}) == ("audio",)
    assert media_offered(make_arguments("app", model=smollm2_dir), smollm2_dir) == ()
    assert media_offered(make_arguments("app", model=smollm2_dir, is_multimodal=True), smollm2_dir) == ("image",)
    assert media_offered(make_arguments("app", base_url="http://h/v1", is_multimodal=True), None) == ("image",)


@pytest.fixture(scope="module")
def endpoint(served: Any) -> EndpointEngine:
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    return EndpointEngine.connect(served.base_url, api_key=served.api_key)


@pytest.mark.parametrize(("lang", "label"), [("en", "System prompt"), ("zh", "系统提示词")])
def test_the_page_speaks_the_language_and_lists_the_served_models(
    endpoint: EndpointEngine, lang: str, label: str
) -> None:
    from rayswift.chat_page.page import TEXTS, build_page

    assert TEXTS["en"].keys() == TEXTS["zh"].keys()
    page = build_page(endpoint, SamplingParams(temperature=0.5), title="Bot", lang=lang, system="Be kind.")
    components = {c["props"].get("elem_id"): c["props"] for c in page.get_config_file()["components"]}
    assert (components["system"]["label"], components["system"]["value"]) == (label, "Be kind.")
    assert components["model"]["choices"] == [("small", "small")]
    assert (components["temperature"]["value"], components["own_sampling"]["value"]) == (0.5, False)
    assert page.analytics_enabled is False


def test_an_answer_grows_and_an_error_is_a_note(endpoint: EndpointEngine) -> None:
    from rayswift.chat_page.page import answerer

    answer = answerer(endpoint, SamplingParams(), stream=True)
    grown = list(answer("What is the capital of France?", [], "small", "", 10, False, 0.0, 1.0))
    assert len(grown) > 1
    texts = [text for (text,) in grown]
    assert all(later.startswith(earlier) for earlier, later in itertools.pairwise(texts))
    assert texts[-1] == "The capital of France is Paris."
    whole = answerer(endpoint, SamplingParams(), stream=False)
    assert list(whole("What is the capital of France?", [], "small", "", 10, False, 0.0, 1.0)) == grown[-1:]
    ((note,),) = answer("hi", [], "none", "", 10, True, 0.0, 1.0)
    assert re.search("--model none: .* it has small", note.content)
    asked = [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": note.content, "metadata": note.metadata},
    ]
    assert openai_messages(asked, "again") == [{"role": "user", "content": "again"}]


def test_the_page_takes_no_large_uploads_and_nothing_of_foreign_pages(endpoint: EndpointEngine) -> None:
    from gradio.routes import App
    from starlette.testclient import TestClient

    from rayswift.chat_page.command import LARGEST_UPLOAD, serve
    from rayswift.chat_page.page import build_page

    page = build_page(endpoint, SamplingParams(), title="Bot", media=["image"])
    launched: dict[str, Any] = {}

    def launch(**options: Any) -> tuple[None, str, None]:
        launched.update(options)
        signal.raise_signal(signal.SIGTERM)
        return None, "http://127.0.0.1:7860/", None

    page.launch, before = launch, signal.getsignal(signal.SIGTERM)
    try:
        serve(page, make_arguments("app", base_url="http://h/v1", allowed_origins=["https://chat.example.com"]))
    finally:
        signal.signal(signal.SIGTERM, before)
    page.max_file_size = launched["max_file_size"]
    client = TestClient(App.create_app(page, app_kwargs=launched["app_kwargs"]), base_url="http://127.0.0.1:7860")
    for headers, status in (
        ({}, 200), ({"Origin": "http://127.0.0.1:7860"}, 200), ({"Host": "evil.example.com"}, 403),
        ({"Host": "chat.example.com", "Origin": "https://chat.example.com"}, 200),
        ({"Origin": "http://evil.example.com"}, 403), ({"Origin": "null"}, 403),
    ):  # fmt: skip
        assert client.get("/config", headers=headers).status_code == status, headers
        one = {"files": ("dot.png", PNG)}
        assert client.post("/gradio_api/upload", files=one, headers=headers).status_code == status, headers
    large = client.post("/gradio_api/upload", files={"files": ("dot.png", bytes(LARGEST_UPLOAD + 1))})
    assert large.status_code == 413


def test_a_taken_port_is_refused_at_once_with_the_next_free_one() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        command = [sys.executable, "-m", "rayswift", "app", "--base_url", "http://127.0.0.1:9/v1"]
        done = subprocess.run(
            [*command, "--server_port", str(port)], check=False, capture_output=True, text=True, timeout=60
        )
    assert done.returncode == 2
    assert f"--server_port {port}: already in use" in done.stderr
    assert "is free" in done.stderr
    assert done.stderr.count("\n") == 1


def test_without_gradio_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'rayswift\[app\]'"):
        app(make_arguments("app", base_url="http://127.0.0.1:9/v1"))


def test_an_endpoint_that_is_not_there_is_one_line() -> None:
    with pytest.raises(UserError, match="no server answers there"):
        app(make_arguments("app", base_url="http://127.0.0.1:9/v1", server_port=17999))

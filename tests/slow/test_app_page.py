"""``rayswift app`` in a browser, as a person uses it: ask, see it stream, stop, switch language, change adapter.

Needs Chromium: ``apt-get install chromium`` (Debian; ``fonts-noto-cjk`` for Chinese in the screenshot).
"""

from __future__ import annotations

import re
import signal
import socket
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from chromium import ask, chromium_page
from command_line import start, wait_for
from serving import ENGINE, free_port

pytestmark = pytest.mark.slow

SCREENSHOT = Path(__file__).resolve().parents[2] / "docs" / "images" / "app.png"


@pytest.fixture(scope="module")
def address(smollm2_dir: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A page over its own deployment of the model and one adapter; stopped by SIGTERM, which must end it cleanly."""
    folder = tmp_path_factory.mktemp("app")
    port, log = free_port(), folder / "app.log"
    process = start(
        "app", "--model", smollm2_dir, "--adapters", f"loud={make_adapter(smollm2_dir, folder)}", "--temperature", "0",
        "--server_port", str(port), "--studio_title", "SmolLM2", *ENGINE,
        log=log, VLLM_CPU_KVCACHE_SPACE="1", HF_HUB_OFFLINE="1",
    )  # fmt: skip
    url = f"http://127.0.0.1:{port}/"

    def shown() -> bool:
        assert process.poll() is None, log.read_text(errors="replace")[-4000:]
        return f"The page is at {url}" in log.read_text(errors="replace")

    try:
        wait_for(shown, 400, "the page")
        yield url
        process.send_signal(signal.SIGTERM)
        assert process.wait(90) == 0, log.read_text(errors="replace")[-4000:]
    finally:
        process.kill()


def make_adapter(model: str, folder: Path) -> str:
    """A random LoRA adapter strong enough to change every answer."""
    import torch
    from peft import LoraConfig, get_peft_model

    from rayswift.modeling.loading import load_model

    torch.manual_seed(0)
    config = LoraConfig(task_type="CAUSAL_LM", r=8, target_modules=["down_proj"], layers_to_transform=[29])
    peft_model = get_peft_model(load_model(model), config)
    for name, parameter in peft_model.named_parameters():
        if "lora_" in name:
            parameter.data.normal_(std=3)
    peft_model.save_pretrained(folder / "loud")
    return str(folder / "loud")


@pytest.fixture
def page(address: str, tmp_path: Path) -> Iterator[Any]:
    """The page in a fresh Chromium."""
    with chromium_page(address, tmp_path / "profile") as tab:
        yield tab


def answers(page: Any) -> list[str]:
    """The texts of the model so far."""
    return [text.strip() for text in page.locator("#conversation .message.bot").all_inner_texts()]


def last_answer(page: Any) -> str:
    """The newest text of the model; waits until it stays the same for two seconds."""
    before, since = "", time.monotonic()
    while time.monotonic() - since < 2:
        now = answers(page)[-1] if answers(page) else ""
        if now != before or not now:
            before, since = now, time.monotonic()
        time.sleep(0.1)
    return before


def test_a_person_asks_stops_switches_language_and_adapter(page: Any) -> None:
    # Ask, and see the answer grow.
    ask(page, "Explain in a few sentences what the sea is.")
    seen: list[str] = []
    wait_for(lambda: answers(page), 60, "the first words")
    while not seen or seen[-1] != seen[max(0, len(seen) - 15)] or len(seen) < 15:
        seen.append(answers(page)[-1])
        time.sleep(0.1)
    growing = {text for text in seen if text and seen[-1].startswith(text)}
    assert len(growing) > 5, seen

    # Stop: the text stays as it is, and the box takes the next question.
    ask(page, "Count from 1 to 500, one number per line.")
    wait_for(lambda: len(answers(page)) == 2 and len(answers(page)[1]) > 20, 60, "the second answer")
    page.locator("#question .stop-button").click()
    stopped = last_answer(page)
    assert "500" not in stopped

    # Switch the language: every label follows, the conversation stays.
    assert "System prompt" in page.locator("#system").inner_text()
    page.get_by_label("中文").click()
    page.locator("#system").get_by_text("系统提示词").wait_for()
    assert re.search("温度", page.locator("#temperature").inner_text())
    assert len(answers(page)) == 2
    SCREENSHOT.parent.mkdir(exist_ok=True)

    # Clear, ask the base and then the adapter the same: they answer differently.
    def ask_anew(question: str) -> str:
        page.locator("#conversation").get_by_label(re.compile("Clear")).click()
        wait_for(lambda: not answers(page), 20, "an empty conversation")
        ask(page, question)
        wait_for(lambda: answers(page), 60, "an answer")
        return last_answer(page)

    base = ask_anew("What is the capital of France?")
    assert "Paris" in base
    page.screenshot(path=SCREENSHOT)
    page.locator("#model input").click()
    page.get_by_role("option", name="loud").click()
    page.locator("#max_new_tokens input[type=number]").fill("12")
    loud = ask_anew("What is the capital of France?")
    assert loud != base

    # Retry asks again: greedy, so the same text.
    page.get_by_label(re.compile("Retry")).click()
    assert last_answer(page) == loud

    assert page.errors == []
    assert {url.split("/")[2] for url in page.asked if "://" in url} == {page.url.split("/")[2]}  # nothing leaves


def test_an_error_of_the_server_is_shown_and_the_next_question_works(page: Any) -> None:
    ask(page, "word " * 3000)  # longer than the context
    page.get_by_text(re.compile("context length is 2048")).wait_for()
    ask(page, "What is the capital of France?")
    wait_for(lambda: any("Paris" in text for text in answers(page)), 60, "an answer after the error")


def test_two_people_are_answered_side_by_side(page: Any, address: str) -> None:
    other = page.context.new_page()
    other.goto(address)
    other.locator("#question textarea").wait_for()
    ask(page, "Count from 1 to 300, one number per line.")
    ask(other, "What is the capital of France?")
    wait_for(lambda: any("Paris" in text for text in answers(other)), 60, "the second person's answer")
    assert page.locator("#question .stop-button").is_visible()  # the first is still being answered
    page.locator("#question .stop-button").click()


def test_the_browser_is_told_to_ask_no_other_server(page: Any, address: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as elsewhere:
        url = f"http://127.0.0.1:{elsewhere.getsockname()[1]}/"
        assert page.evaluate("url => fetch(url).then(() => 'asked', () => 'refused')", url) == "refused"
        elsewhere.settimeout(0.5)
        with pytest.raises(TimeoutError):
            elsewhere.accept()
    html = urllib.request.urlopen(address, timeout=30).read().decode()
    assert '"analytics_enabled":false' in html.replace(" ", "")

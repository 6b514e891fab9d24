"""What a person sees of an answer in a browser: HTML as text, maths as maths, thoughts folded. No model is needed."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from chromium import ask, chromium_page
from command_line import start, wait_for
from fake_endpoint import fake_endpoint
from serving import free_port

pytestmark = pytest.mark.slow

ANSWER = (
    "Put it into a <template> element.\n\nThe <b>rest</b> is **bold**.\n\n```html\n<b>code</b>\n```\n\n"
    "Inline \\( x^2 + 1 \\), and displayed:\n\n\\[ \\frac{a}{b} \\]\n\n<script>window.broken = 1</script>The end."
)
SAID = {
    "apart": [{"reasoning": "First I think <i>hard</i>."}, {"content": ANSWER}],
    "inline": [{"content": f"<think>\nFirst I think <i>hard</i>.\n</think>\n\n{ANSWER}"}],
}


@pytest.fixture(scope="module")
def talk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """The address of the page over a server that says what it is asked for, and what that server was asked."""
    port, log = free_port(), tmp_path_factory.mktemp("app") / "app.log"
    with fake_endpoint(lambda body: SAID[body["messages"][-1]["content"].partition("<")[0]]) as (base_url, asked):
        process = start("app", "--base_url", base_url, "--server_port", str(port), log=log)
        try:
            wait_for(lambda: "The page is at" in log.read_text(errors="replace"), 120, "the page")
            yield f"http://127.0.0.1:{port}/", asked
            process.send_signal(signal.SIGTERM)
            assert process.wait(60) == 0
        finally:
            process.kill()


@pytest.mark.parametrize("where", ["apart", "inline"])
def test_an_answer_is_shown_as_it_was_written(talk: Any, where: str, tmp_path: Path) -> None:
    address, asked = talk
    with chromium_page(address, tmp_path / "profile") as page:
        ask(page, f"{where}<template>?")
        bot = page.locator("#conversation .message.bot")
        bot.get_by_text("The end.").wait_for()
        text = bot.last.inner_text()
        page.screenshot(path=tmp_path / f"{where}.png")
        assert "Put it into a <template> element." in text
        assert "The <b>rest</b> is bold." in text
        assert page.locator("#conversation .message.bot strong").all_inner_texts() == ["bold"]
        assert "<b>code</b>" in page.locator("#conversation pre code").inner_text()
        assert "<script>window.broken = 1</script>The end." in text
        assert page.evaluate("window.broken") is None
        assert page.locator("#conversation .katex").count() == 2
        assert page.locator("#conversation .katex-display").count() == 1
        assert f"{where}<template>?" in page.locator("#conversation .message.user").inner_text()
        # The thoughts are there, folded until they are asked for.
        thoughts = page.get_by_text("First I think <i>hard</i>.")
        assert not thoughts.is_visible()
        page.locator("#conversation").get_by_text("Thoughts").click()
        thoughts.wait_for()
        # The next question has the first as they were written.
        ask(page, f"{where}")
        wait_for(lambda: bot.get_by_text("The end.").count() == 2, 60, "the second answer")
        question, answer, _ = asked[-1]["messages"]
        assert question["content"] == f"{where}<template>?"
        said = SAID[where]
        assert answer["content"] == said[-1]["content"]
        assert answer.get("reasoning_content") == said[0].get("reasoning")
        assert page.errors == []

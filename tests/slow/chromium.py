"""The chat page in a real browser. Needs Chromium: ``apt-get install chromium`` (Debian)."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

FLAGS = [
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
]  # fmt: skip


@contextlib.contextmanager
def chromium_page(address: str, profile: Path) -> Iterator[Any]:
    """The page in a fresh Chromium. ``page.asked``: addresses it asked for; ``page.errors``: what went wrong in it."""
    from playwright.sync_api import sync_playwright

    chromium = shutil.which("chromium")
    assert chromium, "Chromium is not installed: apt-get update && apt-get install -y chromium"
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch_persistent_context(
            profile, executable_path=chromium, args=FLAGS, viewport={"width": 1280, "height": 800}
        )
        tab: Any = browser.pages[0]
        tab.asked, tab.errors = [], []
        tab.on("request", lambda request: tab.asked.append(request.url))
        tab.on("pageerror", lambda error: tab.errors.append(str(error)))
        tab.set_default_timeout(60_000)
        tab.goto(address)
        tab.locator("#question textarea").wait_for()
        yield tab
        browser.close()


def ask(page: Any, question: str) -> None:
    """Type a question and send it."""
    box = page.locator("#question textarea")
    box.fill(question)
    box.press("Enter")

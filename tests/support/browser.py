"""A real browser for pages: Chromium by Playwright, where both are there.

with open_browser(path, width=390, dark=True) as shown:
    shown.page.evaluate(...)
    shown.told      # everything that the console said, and every request that left the file
"""

import contextlib
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest


@dataclass
class Shown:
    """A page in a browser."""

    page: Any
    told: list[str] = field(default_factory=list)


@contextlib.contextmanager
def open_browser(path: Path, *, width: int, dark: bool = False) -> Iterator[Shown]:
    """Opens a file; skips the test where there is no browser."""
    sync_api = pytest.importorskip("playwright.sync_api", reason="needs playwright: pip install playwright")
    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if found is None:
        pytest.skip("needs Chromium (Debian, Ubuntu: apt install chromium)")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=found, args=["--no-sandbox"])
        try:
            scheme = "dark" if dark else "light"
            context = browser.new_context(viewport={"width": width, "height": 844}, color_scheme=scheme)
            shown = Shown(context.new_page())
            shown.page.on("console", lambda message: shown.told.append(message.text))
            shown.page.on("pageerror", lambda error: shown.told.append(str(error)))
            shown.page.on("request", lambda asked: _note(shown, asked.url, path))
            shown.page.goto(path.as_uri())
            yield shown
        finally:
            browser.close()


def _note(shown: Shown, url: str, path: Path) -> None:
    if url != path.as_uri() and not url.startswith("data:"):
        shown.told.append(f"request: {url}")

"""A real browser: the distribution's Chromium, driven by Playwright."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

REQUIRED = "CLIPTUNE_TEST_BROWSER"
"""Set where a browser must be there, as in CI: a test that cannot have one fails instead of being skipped."""


def _missing(reason: str) -> None:
    if os.environ.get(REQUIRED):
        pytest.fail(f"{REQUIRED} is set, but {reason}")
    pytest.skip(reason)


@contextmanager
def open_browser() -> Iterator[Any]:
    """Start Chromium; give Playwright's `Browser`."""
    path = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if path is None:
        _missing("there is no chromium")
    try:
        from playwright.sync_api import sync_playwright  # noqa: PLC0415
    except ImportError:
        _missing("playwright is not installed")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser
        browser.close()


class Watched:
    """A page in a context of its own that notes what goes wrong and where its requests go.

    Args:
        browser: of `open_browser`.
        options: of the context: `viewport`, `color_scheme`, ...
    """

    def __init__(self, browser: Any, **options: Any) -> None:
        self.context = browser.new_context(bypass_csp=False, **options)
        self.page = self.context.new_page()
        self.messages: list[str] = []
        self.requests: list[str] = []
        self.page.on("console", lambda message: self.messages.append(f"{message.type}: {message.text}"))
        self.page.on("pageerror", lambda error: self.messages.append(f"error: {error}"))
        self.page.on("request", lambda request: self.requests.append(request.url))

    def violations(self) -> list[str]:
        """Return what axe finds wrong with the page as it is now, a line each."""
        from axe_core_python.sync_playwright import Axe  # noqa: PLC0415

        found = Axe().run(self.page)["violations"]
        return [f"{each['id']}: {node['html'][:200]}" for each in found for node in each["nodes"]]

    def width(self) -> int:
        """Return how wide the page is, in pixels; more than its window if anything stands out."""
        width: int = self.page.evaluate("() => document.documentElement.scrollWidth")
        return width

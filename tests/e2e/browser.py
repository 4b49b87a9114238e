"""One headless Chromium for many pages, each opened from disk, the network off, with its policy enforced."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from playwright import sync_api as playwright

from tests.reports.parsed import Page

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
DEADLINE_MS = 60_000
PHONE_WIDTH = 390

# Until what is packed is unpacked and every chart that can be seen is drawn, or has failed.
_SETTLED = """
async (deadline) => {
  await window.kvfarm?.ready;
  const begun = performance.now();
  const open = (figure) => !figure.closest("details:not([open])");
  const figures = (state) => [...document.querySelectorAll(`figure[data-state="${state}"]`)];
  while (figures("drawing").length || figures("waiting").some(open)) {
    if (performance.now() - begun > deadline) throw new Error("charts are not drawn in time");
    await new Promise((done) => setTimeout(done, 10));
  }
}
"""


class Tab:
    """An open page. ``page`` is Playwright's; console: what was written there, and uncaught errors."""

    def __init__(self, page: playwright.Page) -> None:
        self.page = page
        self.console: list[str] = []
        page.on("console", lambda message: self.console.append(f"{message.type}: {message.text}"))
        page.on("pageerror", lambda error: self.console.append(f"uncaught: {error}"))
        page.on("request", self._asked)

    def _asked(self, request: playwright.Request) -> None:
        if not request.url.startswith(("file:", "data:", "blob:")):
            self.console.append(f"asked the network for {request.url}")

    def settle(self) -> None:
        """Wait until the page is as a reader sees it."""
        self.page.evaluate(_SETTLED, DEADLINE_MS)

    @property
    def dom(self) -> Page:
        """The DOM as it is now."""
        return Page(self.page.content())

    @property
    def errors(self) -> str:
        """What the page's own error collector holds."""
        return self.page.locator("html").get_attribute("data-errors") or ""


class Chromium:
    def __init__(self, browser: playwright.Browser) -> None:
        self._browser = browser

    @contextmanager
    def open(self, page: Path, fragment: str = "", *, width: int = 1280, dark: bool = False) -> Iterator[Tab]:
        """``page`` at ``fragment``, once all that can be seen is drawn."""
        context = self._browser.new_context(
            viewport={"width": width, "height": 2000}, color_scheme="dark" if dark else "light", offline=True
        )
        context.set_default_timeout(DEADLINE_MS)
        try:
            tab = Tab(context.new_page())
            tab.page.goto(page.as_uri() + fragment)
            tab.settle()
            yield tab
        finally:
            context.close()


@contextmanager
def chromium() -> Iterator[Chromium]:
    """Started now. Playwright runs an asyncio loop in this thread until the end of the block."""
    found = [path for path in map(shutil.which, BROWSERS) if path]
    if not found:
        pytest.fail(f"sought one of {', '.join(BROWSERS)} on PATH, found none: apt-get install chromium")
    quiet = ("--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-sync", "--disable-dev-shm-usage")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(
            executable_path=found[0], args=[*quiet, "--disable-background-networking"], timeout=DEADLINE_MS
        )
        try:
            yield Chromium(browser)
        finally:
            browser.close()

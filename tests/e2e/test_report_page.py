"""The report opened from disk in a real browser, with its policy enforced."""

from __future__ import annotations

import html as markup
import os
import shutil
import signal
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from reports.page import render
from tests.reports.parsed import Element, Page
from tests.reports.sample import leg, run, sample_run

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
DEADLINE_S = 120.0
PHONE_WIDTH = 390


@dataclass(frozen=True)
class Opened:
    """The DOM after all scripts ran, and what the browser wrote to its console."""

    dom: Page
    console: list[str]

    @property
    def errors(self) -> str:
        """What the page's own error collector holds."""
        return self.dom.one("html").attributes.get("data-errors", "")


def _unpacked(dom: Page) -> bool:
    return not dom.all("script", class_="packed")


def browse(
    page: Path,
    profile: Path,
    fragment: str = "",
    options: tuple[str, ...] = (),
    done: Callable[[Page], bool] = _unpacked,
) -> Opened:
    """Opens ``page`` (at ``fragment``) in headless Chromium and closes it again; options: of Chromium.

    done: whether the page has come to its end. Its clock is virtual, and on a busy machine that runs out
    before Chromium's other threads have unpacked everything; then it is opened again, three times in all.
    """
    for _ in range(3):
        opened = _open(page, profile, fragment, options)
        if done(opened.dom):
            break
    return opened


def _open(page: Path, profile: Path, fragment: str, options: tuple[str, ...]) -> Opened:
    found = [path for path in map(shutil.which, BROWSERS) if path]
    if not found:
        pytest.fail(f"sought one of {', '.join(BROWSERS)} on PATH, found none: apt-get install chromium")
    command = [
        found[0],
        *("--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-sync"),
        *("--disable-background-networking", "--disable-component-update", "--disable-dev-shm-usage"),
        *(f"--user-data-dir={profile}", "--window-size=1280,2000", "--virtual-time-budget=8000"),
        *options,
        *("--enable-logging=stderr", "--dump-dom", page.as_uri() + fragment),
    ]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        dom, log = process.communicate(timeout=DEADLINE_S)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
    assert process.returncode == 0, log
    return Opened(Page(dom.strip()), [line for line in log.splitlines() if ":CONSOLE" in line])


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return render(sample_run(), tmp_path_factory.mktemp("report"))


@pytest.fixture(scope="module")
def opened(page: Path, tmp_path_factory: pytest.TempPathFactory) -> Opened:
    return browse(page, tmp_path_factory.mktemp("profile"))


def inside_figures(dom: Page) -> dict[str, list[Element]]:
    """Elements from each figure's start to the next one's, by the figure's id."""
    starts = [i for i, e in enumerate(dom.elements) if e.tag == "figure"]
    ends = [*starts[1:], len(dom.elements)]
    return {
        dom.elements[start].attributes["id"]: dom.elements[start:end]
        for start, end in zip(starts, ends, strict=True)
    }


def test_every_chart_is_drawn_with_marks(opened: Opened) -> None:
    figures = inside_figures(opened.dom)
    assert len(figures) == 15
    marks = {
        "itl": "mark-rect",
        "ecdf": "mark-line",
        "ttft": "mark-symbol",
        "rate": "mark-rect",
        "memory": "mark-rect",
    }
    for key, elements in figures.items():
        assert elements[0].attributes["data-state"] == "drawn", key
        assert "svg" in {e.tag for e in elements}, key
        (mark, *_) = [i for i, e in enumerate(elements) if marks[key.split("-")[1]] in e.classes]
        drawn = elements[mark + 1]
        assert drawn.tag == "path", key
        assert drawn.attributes["d"], key


def test_folded_charts_are_drawn_when_they_are_opened(tmp_path: Path) -> None:
    legs = tuple(leg(f"phone-{number}") for number in range(4))
    opened = browse(render(run(legs=legs), tmp_path), tmp_path / "profile", fragment="#m2-itl")
    states = {e.attributes["id"]: e.attributes["data-state"] for e in opened.dom.all("figure")}
    assert {states[key] for key in states if key.startswith(("m0", "m2"))} == {"drawn"}
    assert {states[key] for key in states if key.startswith(("m1", "m3"))} == {"waiting"}
    assert opened.errors == ""


def test_the_browser_has_nothing_to_complain_about(opened: Opened) -> None:
    assert opened.errors == ""
    assert opened.console == []


def test_copy_buttons_appear_with_script(opened: Opened) -> None:
    buttons = opened.dom.all("button", class_="copy")
    assert len(buttons) == 3
    assert not [b for b in buttons if "hidden" in b.attributes]


def test_a_script_that_is_not_ours_is_blocked_and_told(page: Path, tmp_path: Path) -> None:
    source = page.read_text(encoding="utf-8")
    evil = tmp_path / "evil.html"
    evil.write_text(
        source.replace("</main>", '<script>document.title = "taken"</script></main>'), encoding="utf-8"
    )
    opened = browse(evil, tmp_path / "profile")
    assert opened.dom.one("title").words.startswith("FAILED")
    assert "blocked: script-src" in opened.errors
    assert opened.console


def test_a_phone_scrolls_tables_not_the_page(page: Path, tmp_path: Path) -> None:
    """Headless Chromium opens no window this narrow, so the page stands in a frame of a phone's width."""
    source = markup.escape(page.read_text(encoding="utf-8"))
    frame = tmp_path / "frame.html"
    frame.write_text(
        f'<!doctype html><html><iframe style="width:{PHONE_WIDTH}px;height:900px;border:0" srcdoc="{source}">'
        "</iframe><script>onload = () => { const inner = document.querySelector('iframe').contentDocument;"
        "const tables = [...inner.querySelectorAll('.scroll')].filter((e) => e.scrollWidth > e.clientWidth);"
        "document.documentElement.dataset.width = inner.documentElement.scrollWidth;"
        "document.documentElement.dataset.scrolling = tables.length;"
        "document.querySelector('iframe').remove(); }</script></html>",
        encoding="utf-8",
    )
    measured = browse(frame, tmp_path / "profile").dom.one("html").attributes
    assert int(measured["data-width"]) <= PHONE_WIDTH
    assert int(measured["data-scrolling"]) > 0

"""The run's report opened from disk in a real browser, with its policy enforced."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from reports.page import render
from tests.e2e.browser import Chromium, Tab
from tests.reports.parsed import Element, Page
from tests.reports.sample import leg, run, sample_run


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return render(sample_run(), tmp_path_factory.mktemp("report"))


@pytest.fixture(scope="module")
def opened(page: Path, browser: Chromium) -> Iterator[Tab]:
    with browser.open(page) as tab:
        yield tab


def inside_figures(dom: Page) -> dict[str, list[Element]]:
    """Elements from each figure's start to the next one's, by the figure's id."""
    starts = [i for i, e in enumerate(dom.elements) if e.tag == "figure"]
    ends = [*starts[1:], len(dom.elements)]
    return {
        dom.elements[start].attributes["id"]: dom.elements[start:end]
        for start, end in zip(starts, ends, strict=True)
    }


def test_every_chart_is_drawn_with_marks(opened: Tab) -> None:
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


def test_folded_charts_are_drawn_when_they_are_opened(browser: Chromium, tmp_path: Path) -> None:
    legs = tuple(leg(f"phone-{number}") for number in range(4))
    with browser.open(render(run(legs=legs), tmp_path), fragment="#m2-itl") as opened:
        states = {e.attributes["id"]: e.attributes["data-state"] for e in opened.dom.all("figure")}
        assert {states[key] for key in states if key.startswith(("m0", "m2"))} == {"drawn"}
        assert {states[key] for key in states if key.startswith(("m1", "m3"))} == {"waiting"}
        opened.page.locator("details:has(#m3-itl) > summary").click()
        opened.settle()
        assert opened.dom.one("figure", id="m3-itl").attributes["data-state"] == "drawn"
        assert opened.errors == ""


def test_copy_buttons_appear_with_script(opened: Tab) -> None:
    buttons = opened.dom.all("button", class_="copy")
    assert len(buttons) == 3
    assert not [b for b in buttons if "hidden" in b.attributes]


def test_a_script_that_is_not_ours_is_blocked_and_told(page: Path, browser: Chromium, tmp_path: Path) -> None:
    source = page.read_text(encoding="utf-8")
    evil = tmp_path / "evil.html"
    evil.write_text(
        source.replace("</main>", '<script>document.title = "taken"</script></main>'), encoding="utf-8"
    )
    with browser.open(evil) as opened:
        assert opened.page.title().startswith("FAILED")
        assert "blocked: script-src" in opened.errors
        assert opened.console

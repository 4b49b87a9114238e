"""Every page of reports in a real browser: for people who do not see it, do not use a mouse, read it on a
phone, or have a large farm. axe-core judges it, light and dark.
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from reports import ablation_page, comparison_page, gate_night_page, gate_page, page, trend_page
from reports.results import NotPlanned
from tests.e2e.browser import PHONE_WIDTH, Chromium, Tab
from tests.reports.gate_sample import large_gate, sample_calibration, sample_gate
from tests.reports.large import CELLS, DEVICES, large_run, large_trend
from tests.reports.night_sample import earlier_night, sample_night
from tests.reports.parsed import Page
from tests.reports.sample import LOST, SMALL, leg, mutation, run, sample_run
from tests.reports.test_ablation import results as ablation
from tests.reports.test_trend import ATTACK, noisy, series

MOST_BYTES = 1_500_000
HOSTILE = " <img src=x onerror=alert(1)>"
NIGHTS = [
    series(*noisy(20), *noisy(4, 29.0), device=f"phone{ATTACK}", tags={3: ("v1",)}),
    series(*noisy(24), device="host"),
]

# Each takes the page as it is and says what it found.
AXE = """
async (rules) => {
  const options = { resultTypes: ["violations"], ...(rules && { runOnly: rules }) };
  const found = await axe.run(document, options);
  return found.violations.map(
    (rule) => `${rule.id}: ${rule.nodes[0].html.slice(0, 160)} ${rule.nodes[0].failureSummary}`,
  );
}
"""
NAMES = """
([table, column]) => [...document.querySelectorAll("table.numbers")[table].tBodies[0].rows].map(
  (row) => row.cells[column].textContent.trim(),
)
"""
FIRST_SORTABLE = """
() => {
  const tables = [...document.querySelectorAll("table.numbers")];
  const table = tables.findIndex((one) => one.querySelector(".sort"));
  return [table, [...tables[table].tHead.rows[0].cells].findIndex((cell) => cell.querySelector(".sort"))];
}
"""
MUTE = """
() => [...document.querySelectorAll("svg:not([aria-hidden])")].filter((picture) => {
  const named = picture.closest("[aria-label], [aria-hidden]");
  return !named || !(named.hasAttribute("aria-hidden") || named.getAttribute("aria-label"));
}).length
"""
JUMPS = '() => [...document.querySelectorAll("[tabindex]")].filter((one) => one.tabIndex > 0).length'
UNFOLD = '() => { for (const details of document.querySelectorAll("details")) details.open = true; }'
WIDTH = "() => document.documentElement.scrollWidth"
SCROLLING = """
() => [...document.querySelectorAll(".scroll")].filter((one) => one.scrollWidth > one.clientWidth).length
"""


def run_report() -> str:
    """With all that it can show."""
    before = sample_run()
    again = replace(before.checks[3], retries=("RunnerDied: sought a frame",))
    lost = replace(before.devices[2], quarantined="adb: device offline")
    full = replace(
        before,
        checks=(*before.checks[:3], again, *before.checks[4:]),
        devices=(*before.devices[:2], lost),
        legs=(*before.legs, leg(workload="prompt 1024 + 64 new", prompt_tokens=1024)),
        not_planned=(NotPlanned(LOST, SMALL, "farm.toml"),),
        mutation=mutation("abc"),
    )
    return page.html(full, NIGHTS)


PAGES: dict[str, Callable[[], str]] = {
    "run": run_report,
    "trend": lambda: trend_page.html(NIGHTS),
    "comparison": lambda: comparison_page.html(sample_run(), run(run_id="after"), ("v1", "v2")),
    "ablation": lambda: ablation_page.html(ablation()),
    "gate": lambda: gate_page.html(sample_gate(), NIGHTS),
    "calibration": lambda: gate_page.html(sample_calibration()),
    "night": lambda: gate_night_page.html(sample_night(), (sample_night(), earlier_night())),
}
SORTED = [name for name in PAGES if name != "ablation"]  # its tables are in the order of the steps


def axe() -> str:
    """axe.min.js out of the package that carries it."""
    spec = importlib.util.find_spec("axe_core_python")
    assert spec is not None
    assert spec.origin is not None
    return (Path(spec.origin).parent / "axe.min.js").read_text(encoding="utf-8")


@pytest.fixture(scope="module", params=PAGES)
def opened(
    request: pytest.FixtureRequest, browser: Chromium, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Tab]:
    """A page as it is when it is opened; each test leaves it so, or further unfolded."""
    file = tmp_path_factory.mktemp(request.param) / "index.html"
    file.write_text(PAGES[request.param](), encoding="utf-8")
    with browser.open(file) as tab:
        yield tab


def test_the_browser_has_nothing_to_complain_about(opened: Tab) -> None:
    assert opened.errors == ""
    assert opened.console == []


def test_hostile_names_stay_text(opened: Tab) -> None:
    assert opened.page.locator("img").count() == 0
    assert opened.page.locator("script:not([type])").count() <= 3  # our own two, and the chart library


def test_every_chart_is_drawn(opened: Tab) -> None:
    opened.page.evaluate(UNFOLD)
    opened.settle()
    dom = opened.dom
    assert {e.attributes.get("data-state", "drawn") for e in dom.all("figure")} <= {"drawn"}
    assert len(dom.all("svg")) >= len(dom.all("figure"))


def test_every_picture_has_words_and_the_order_of_the_keyboard_is_the_pages(opened: Tab) -> None:
    assert opened.page.evaluate(MUTE) == 0
    assert opened.page.evaluate(JUMPS) == 0


def test_axe_finds_nothing(opened: Tab) -> None:
    opened.page.evaluate(UNFOLD)
    opened.settle()
    opened.page.evaluate(axe())
    assert opened.page.evaluate(AXE) == []
    opened.page.emulate_media(color_scheme="dark")
    assert opened.page.evaluate(AXE, ["color-contrast"]) == []
    opened.page.emulate_media(color_scheme="light")


def test_a_phone_scrolls_tables_not_the_page(opened: Tab) -> None:
    opened.page.set_viewport_size({"width": PHONE_WIDTH, "height": 900})
    assert opened.page.evaluate(WIDTH) <= PHONE_WIDTH
    assert opened.page.evaluate(SCROLLING) > 0
    opened.page.set_viewport_size({"width": 1280, "height": 2000})


@pytest.mark.parametrize("opened", SORTED, indirect=True)
def test_tables_sort_from_the_keyboard_and_say_so(opened: Tab) -> None:
    table, column = where = opened.page.evaluate(FIRST_SORTABLE)
    heading = opened.page.locator("table.numbers").nth(table).locator("thead th").nth(column)
    heading.locator(".sort").focus()
    told: list[Any] = []
    for _ in range(2):
        opened.page.keyboard.press("Enter")
        told.append((opened.page.evaluate(NAMES, where), heading.get_attribute("aria-sort")))
    (up, ascending), (down, descending) = told
    assert (ascending, descending) == ("ascending", "descending")
    assert up == sorted(up)
    assert len(set(up)) == 1 or up != down
    assert sorted(down) == up


# -- a large farm --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return page.render(large_run(HOSTILE), tmp_path_factory.mktemp("large"), large_trend(HOSTILE))


@pytest.fixture(scope="module")
def large_opened(large: Path, browser: Chromium) -> Iterator[Tab]:
    """The large page at a link to one device's checks, which are packed and folded."""
    with browser.open(large, "#checks-phone-05-img-src-x-onerror-alert-1") as tab:
        yield tab


def test_twenty_devices_with_forty_cells_each_fit_into_one_file(large: Path) -> None:
    """With sixty nights of each behind it."""
    assert large.stat().st_size < MOST_BYTES
    assert [path.name for path in large.parent.iterdir()] == ["index.html"]


def test_a_large_page_unpacks_whole_and_complains_of_nothing(large_opened: Tab) -> None:
    assert large_opened.errors == ""
    assert large_opened.console == []
    dom = large_opened.dom
    assert not dom.all("script", class_="packed")
    rows = [e for e in dom.all("tr") if re.match("cell-phone", e.attributes.get("id", ""))]
    assert len(rows) == len({row.attributes["id"] for row in rows}) == len(DEVICES) * CELLS
    assert len(dom.all("figure")) > 5 * len(DEVICES)
    assert not dom.all("img")
    assert f"phone-05{HOSTILE}" in {e.text for e in dom.all(class_="device")}


def test_a_link_opens_what_is_packed_and_folded(large_opened: Tab) -> None:
    folded = large_opened.page.locator("details#checks-phone-06-img-src-x-onerror-alert-1")
    target = large_opened.page.locator("details#checks-phone-05-img-src-x-onerror-alert-1")
    assert target.get_attribute("open") is not None
    assert folded.get_attribute("open") is None


def test_a_large_page_tells_those_without_script_where_the_data_are(large: Path) -> None:
    said = [e.words for e in Page(large.read_text(encoding="utf-8")).all("noscript")]
    assert any("results.json" in words for words in said)


@pytest.fixture(scope="module")
def large_gate_page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every cell's line over sixty nights on it as well."""
    return gate_page.render(large_gate(suffix=HOSTILE), tmp_path_factory.mktemp("gate"), large_trend(HOSTILE))


def test_a_large_gate_fits_into_one_file(large_gate_page: Path) -> None:
    assert large_gate_page.stat().st_size < MOST_BYTES


def test_a_link_to_a_cell_of_a_large_gate_opens_it(large_gate_page: Path, browser: Chromium) -> None:
    with browser.open(large_gate_page, "#c41") as tab:
        assert (tab.errors, tab.console) == ("", [])
        dom = tab.dom
        assert "open" in dom.one("details", id="c41").attributes
        assert "open" not in dom.one("details", id="c40").attributes
        assert tab.page.locator("details#c41").evaluate("(cell) => cell.getBoundingClientRect().top") < 200
        assert not dom.all("script", class_="packed")
        cells = dom.all("tr", class_="passed")
        assert len(cells) == len(DEVICES) * 42
        assert not dom.all("img")
        assert f"phone-0{HOSTILE}" in {e.text for e in dom.all(class_="device")}

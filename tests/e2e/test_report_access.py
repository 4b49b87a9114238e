"""Every page of reports for people who do not see it, do not use a mouse, or have a large farm.

axe-core judges the pages in a real browser, light and dark; a probe sorts a table and follows the
keyboard's order. All pages of one colour scheme are frames of one browser start.
"""

from __future__ import annotations

import base64
import hashlib
import html as markup
import importlib.util
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from reports import comparison_page, page, trend_page
from reports.results import NotPlanned
from tests.e2e.test_report_page import Opened, browse
from tests.reports.large import CELLS, DEVICES, large_run, large_trend
from tests.reports.parsed import Page
from tests.reports.sample import LOST, SMALL, leg, mutation, run, sample_run
from tests.reports.test_trend import ATTACK, noisy, series

MOST_BYTES = 1_500_000
HOSTILE = " <img src=x onerror=alert(1)>"

# Axe's rules on landmarks and headings take each frame for a whole page, which it is.
PROBE = """
addEventListener("load", async () => {
  await window.kvfarm.ready;
  await new Promise((done) => setTimeout(done, 2000)); // charts
  for (const details of document.querySelectorAll("details")) details.open = true;
  await new Promise((done) => setTimeout(done, 2000));
  const found = await axe.run(document, { resultTypes: ["violations"] });
  const told = { errors: document.documentElement.dataset.errors ?? "" };
  told.violations = found.violations.map(
    (rule) => `${rule.id}: ${rule.nodes[0].html.slice(0, 160)} ${rule.nodes[0].failureSummary}`,
  );
  const table = [...document.querySelectorAll("table.numbers")].find((one) => one.querySelector(".sort"));
  const column = [...table.tHead.rows[0].cells].findIndex((cell) => cell.querySelector(".sort"));
  const button = table.tHead.rows[0].cells[column].querySelector(".sort");
  const names = () => [...table.tBodies[0].rows].map((row) => row.cells[column].textContent.trim());
  button.focus();
  told.focused = document.activeElement === button;
  button.click();
  told.up = [names(), button.parentElement.getAttribute("aria-sort")];
  button.click();
  told.down = [names(), button.parentElement.getAttribute("aria-sort")];
  told.mute = [...document.querySelectorAll("svg:not([aria-hidden])")].filter((picture) => {
    const named = picture.closest("[aria-label], [aria-hidden]");
    return !named || !(named.hasAttribute("aria-hidden") || named.getAttribute("aria-label"));
  }).length;
  told.jumps = [...document.querySelectorAll("[tabindex]")].filter((element) => element.tabIndex > 0).length;
  parent.document.documentElement.setAttribute(`data-${NAME}`, JSON.stringify(told));
});
"""


def axe() -> str:
    """axe.min.js out of the package that carries it."""
    spec = importlib.util.find_spec("axe_core_python")
    assert spec is not None
    assert spec.origin is not None
    return (Path(spec.origin).parent / "axe.min.js").read_text(encoding="utf-8")


def pages() -> dict[str, str]:
    """Each page of this room that needs no gate, with all that it can show."""
    nights = [
        series(*noisy(20), *noisy(4, 29.0), device=f"phone{ATTACK}", tags={3: ("v1",)}),
        series(*noisy(24), device="host"),
    ]
    before, after = sample_run(), run(run_id="after")
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
    return {
        "run": page.html(full, nights),
        "trend": trend_page.html(nights),
        "comparison": comparison_page.html(before, after, ("v1", "v2")),
    }


def probed(source: str, name: str) -> str:
    """``source`` with axe and the probe in it, which its policy then knows."""
    scripts = (axe(), f'const NAME = "{name}";{PROBE}')
    hashes = (base64.b64encode(hashlib.sha256(s.encode()).digest()).decode() for s in scripts)
    allowed = " ".join(f"'sha256-{digest}'" for digest in hashes)
    source = source.replace("script-src ", f"script-src {allowed} ", 1)
    return source.replace("</body>", "".join(f"<script>{script}</script>" for script in scripts) + "</body>")


@pytest.fixture(scope="module", params=["light", "dark"])
def judged(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the probe told, by page."""
    folder = tmp_path_factory.mktemp(request.param)
    sources = pages()
    frames = "".join(
        f'<iframe style="width:1280px;height:900px" srcdoc="{markup.escape(probed(source, name))}"></iframe>'
        for name, source in sources.items()
    )
    file = folder / "frames.html"
    file.write_text(f"<!doctype html><html><body>{frames}</body></html>", encoding="utf-8")
    scheme = {"dark": "0", "light": "1"}[request.param]
    look = (f"--blink-settings=preferredColorScheme={scheme}",)

    def told(dom: Page) -> dict[str, str]:
        return {name[5:]: said for name, said in dom.one("html").attributes.items() if name[5:] in sources}

    opened = browse(
        file, folder / "profile", options=look, done=lambda dom: told(dom).keys() == sources.keys()
    )
    return {name: json.loads(said) for name, said in told(opened.dom).items()}


@pytest.mark.parametrize("name", ["run", "trend", "comparison"])
def test_axe_finds_nothing(judged: dict[str, Any], name: str) -> None:
    assert judged[name]["errors"] == ""
    assert judged[name]["violations"] == []


@pytest.mark.parametrize("name", ["run", "trend", "comparison"])
def test_tables_sort_from_the_keyboard_and_say_so(judged: dict[str, Any], name: str) -> None:
    told = judged[name]
    assert told["focused"]
    (up, ascending), (down, descending) = told["up"], told["down"]
    assert (ascending, descending) == ("ascending", "descending")
    assert up == sorted(up)
    assert len(set(up)) == 1 or up != down
    assert sorted(down) == up


@pytest.mark.parametrize("name", ["run", "trend", "comparison"])
def test_every_picture_has_words_and_the_order_of_the_keyboard_is_the_pages(
    judged: dict[str, Any], name: str
) -> None:
    assert judged[name]["mute"] == 0
    assert judged[name]["jumps"] == 0


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return page.render(large_run(HOSTILE), tmp_path_factory.mktemp("large"), large_trend(HOSTILE))


@pytest.fixture(scope="module")
def opened(large: Path, tmp_path_factory: pytest.TempPathFactory) -> Opened:
    """The large page at a link to one device's checks, which are packed and folded."""
    return browse(
        large, tmp_path_factory.mktemp("profile"), fragment="#checks-phone-05-img-src-x-onerror-alert-1"
    )


def test_twenty_devices_with_forty_cells_each_fit_into_one_file(large: Path) -> None:
    """With sixty nights of each behind it."""
    assert large.stat().st_size < MOST_BYTES
    assert [path.name for path in large.parent.iterdir()] == ["index.html"]


def test_a_large_page_unpacks_whole_and_complains_of_nothing(opened: Opened) -> None:
    assert opened.errors == ""
    assert opened.console == []
    assert not opened.dom.all("script", class_="packed")
    rows = [e for e in opened.dom.all("tr") if re.match("cell-phone", e.attributes.get("id", ""))]
    assert len(rows) == len({row.attributes["id"] for row in rows}) == len(DEVICES) * CELLS
    assert len(opened.dom.all("figure")) > 5 * len(DEVICES)


def test_a_link_opens_what_is_packed_and_folded(opened: Opened) -> None:
    target = opened.dom.one("details", id="checks-phone-05-img-src-x-onerror-alert-1")
    assert "open" in target.attributes
    assert "open" not in opened.dom.one("details", id="checks-phone-06-img-src-x-onerror-alert-1").attributes


def test_hostile_names_stay_text_when_they_are_unpacked(opened: Opened) -> None:
    assert not opened.dom.all("img")
    assert f"phone-05{HOSTILE}" in {e.text for e in opened.dom.all(class_="device")}


def test_a_large_page_tells_those_without_script_where_the_data_are(large: Path) -> None:
    said = [e.words for e in Page(large.read_text(encoding="utf-8")).all("noscript")]
    assert any("results.json" in words for words in said)

"""Every page as paper has it: Chromium lays it out for an A4 sheet, from a screen that is dark."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from reports import ablation_page, gate_night_page, gate_page, page
from tests.e2e.browser import Chromium
from tests.reports.gate_sample import sample_calibration, sample_gate
from tests.reports.night_sample import earlier_night, sample_night
from tests.reports.sample import sample_run
from tests.reports.test_ablation import results as ablation
from tests.reports.test_trend import noisy, series

SHEET = 688  # CSS px: the width of A4 within the margins of style.css
PAGES: dict[str, Callable[[Path], Path]] = {
    "run": lambda folder: page.render(sample_run(), folder, [series(*noisy(24))]),
    "gate": lambda folder: gate_page.render(sample_gate(), folder, [series(*noisy(24))]),
    "calibration": lambda folder: gate_page.render(sample_calibration(), folder),
    "ablation": lambda folder: ablation_page.render(ablation(), folder),
    "night": lambda folder: gate_night_page.render(
        sample_night(), [sample_night(), earlier_night()], folder, "", "../"
    ),
}

# What a reader of the paper would miss; each entry says which element and why.
FAULTS = """
() => {
  const faults = [];
  const told = (element, why) => faults.push(`${why}: ${element.outerHTML.slice(0, 120)}`);
  const shown = (selector) => [...document.querySelectorAll(selector)].filter((e) => e.checkVisibility());
  for (const element of shown("main *")) {
    const hidden = element.closest(".hidden, script, style");
    if (!hidden && element.getBoundingClientRect().right > innerWidth + 1) told(element, "cut off");
  }
  for (const cell of shown("th, td")) {
    if (cell.scrollWidth > cell.clientWidth + 1) told(cell, "does not wrap");
    if (getComputedStyle(cell).position === "sticky") told(cell, "sticks");
  }
  for (const whole of shown("figure, tr")) {
    if (getComputedStyle(whole).breakInside !== "avoid") told(whole, "may be split");
  }
  const luminance = (colour) => {
    const [red, green, blue] = colour.match(/[\\d.]+/g).map(Number);
    return (red + green + blue) / 3;
  };
  for (const card of [document.body, ...shown(".card, .verdict, .coverage")]) {
    if (luminance(getComputedStyle(card).backgroundColor) < 200) told(card, "dark");
  }
  if (luminance(getComputedStyle(document.body).color) > 80) told(document.body, "pale text");
  if (shown("nav, .copy, .jump").length) faults.push("buttons and links to sections are printed");
  return faults;
}
"""


@pytest.mark.parametrize("name", PAGES)
def test_paper_loses_nothing(name: str, browser: Chromium, tmp_path: Path) -> None:
    with browser.open(PAGES[name](tmp_path), width=SHEET, dark=True) as tab:
        tab.page.emulate_media(media="print")
        tab.page.evaluate("dispatchEvent(new Event('beforeprint'))")  # as printing does: everything unfolds
        tab.settle()
        assert tab.page.evaluate(FAULTS) == []
        assert tab.page.locator("details:not([open])").count() == 0

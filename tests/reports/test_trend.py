"""The trend: what it says of nights, and its page."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from reports.trend import MOST_CHARTED, Night, Series, TrendCell, trend_view
from reports.trend_page import html, render
from tests.reports.parsed import Page

START = datetime(2026, 9, 1, 2, tzinfo=UTC)
ATTACK = "</script><img src=x onerror=alert(1)>\"'"


def nights(*values: float, **each: Any) -> tuple[Night, ...]:
    """``each``: a field of Night by the night's number, e.g. tags={3: ("v1",)}."""
    made = []
    for number, value in enumerate(values):
        fields = {name: known[number] for name, known in each.items() if number in known}
        made.append(Night(f"run-{number}", (START + timedelta(days=number)).isoformat(), value, **fields))
    return tuple(made)


def series(*values: float, device: str = "host", **each: Any) -> Series:
    return Series(device, "int4", "tiny", "prompt 8 + 4 new", "ITL", "ms", nights(*values, **each))


def noisy(count: int, level: float = 25.0, seed: int = 1) -> list[float]:
    random = np.random.default_rng(seed)
    return [level * float(np.exp(random.normal(0, 0.01))) for _ in range(count)]


def cell(one: Series) -> TrendCell:
    view = trend_view([one])
    assert view is not None
    return view.cells[0]


def test_one_night_is_no_trend() -> None:
    assert trend_view([series(25.0)]) is None
    with pytest.raises(ValueError, match="no trend"):
        html([series(25.0)])


def test_a_cell_that_got_worse_heads_the_list_and_the_sentence() -> None:
    worse = series(*noisy(20), *noisy(4, 29.0), device="phone")
    view = trend_view([series(*noisy(24, seed=2)), worse])
    assert view is not None
    assert view.sentence == "Within the last 7 nights 1 cell got worse, of 2 cells with enough nights."
    (change,) = view.cells[0].changes
    assert view.cells[0].series.device == "phone"
    assert (change.run_id, change.day, change.word, change.recent) == ("run-20", "21 Sep 2026", "worse", True)
    assert change.change.startswith("+")


def test_a_change_of_long_ago_is_shown_and_is_no_news() -> None:
    (change,) = cell(series(*noisy(10), *noisy(14, 21.0), tags={15: ("v1.4",)})).changes
    assert (change.word, change.recent, change.tags) == ("better", False, "v1.4")


def test_a_night_that_is_not_valid_is_drawn_hollow_and_decides_nothing() -> None:
    values = noisy(12)
    values[5:8] = [60.0, 60.0, 60.0]
    found = cell(series(*values, valid={5: False, 6: False, 7: False}))
    assert found.changes == ()
    assert found.counted == 9
    assert found.chart is not None
    assert found.chart.count("night void") == 3
    assert "3 nights not VALID" in found.note


def test_a_device_that_slows_down_as_a_whole_is_no_change_where_the_canary_tells() -> None:
    values = [*noisy(10), *noisy(10, 30.0)]
    canary = dict(enumerate([1.0] * 10 + [1.2] * 10))
    assert cell(series(*values)).changes
    normalised = cell(series(*values, canary=canary))
    assert normalised.changes == ()
    assert normalised.note == "divided by the same night's canary"


def test_one_night_without_canary_leaves_the_line_as_measured() -> None:
    canary = dict.fromkeys(range(1, 20), 1.0)
    assert "no canary" in cell(series(*noisy(20), canary=canary)).note


def test_a_simulated_device_says_so_wherever_it_is_named() -> None:
    page = Page(html([replace(series(*noisy(20), *noisy(4, 29.0)), simulated="a virtual phone")]))
    assert all("host (simulated)" in e.words for e in page.all("th", scope="row"))
    assert [e.words for e in page.all(class_="simulated")] == ["simulated"]
    assert "host (simulated)" in page.one("svg", role="img").attributes["aria-label"]


def test_few_nights_say_so() -> None:
    view = trend_view([series(25.0, 26.0)])
    assert view is not None
    assert view.sentence == "No cell has the 7 valid nights that change points need."
    assert view.cells[0].chart is not None


def test_only_so_many_cells_are_drawn_large_and_all_stand_in_the_table() -> None:
    view = trend_view([series(*noisy(8, seed=i), device=f"d{i}") for i in range(MOST_CHARTED + 5)])
    assert view is not None
    assert sum(each.chart is not None for each in view.cells) == MOST_CHARTED
    assert len(view.cells) == MOST_CHARTED + 5


def test_the_page_has_a_figure_a_row_and_words_for_each_change(tmp_path: Path) -> None:
    worse = series(*noisy(20), *noisy(4, 29.0), device=f"phone{ATTACK}", tags={3: (f"v1{ATTACK}",)})
    page = Page(render([worse, series(*noisy(24))], tmp_path).read_text(encoding="utf-8"))
    assert len(page.all("figure")) == 2
    pictures = [e for e in page.all("svg") if e.attributes.get("role") == "img"]
    assert "worse" in pictures[0].attributes["aria-label"]
    assert not page.all("img")
    assert {e.attributes["scope"] for e in page.all("th")} <= {"col", "row"}
    assert len(page.all("caption")) == len(page.all("table")) == 2
    links = {e.attributes["href"][1:] for e in page.all("a") if e.attributes["href"].startswith("#")}
    assert links <= {e.attributes.get("id") for e in page.elements}

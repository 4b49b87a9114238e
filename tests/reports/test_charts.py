"""The charts' specs: right data, no network, colours that follow the page."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from reports.charts import MOST_POINTS, Chart, chart_groups, config, library, thinned
from reports.results import LegResult, SampleInfo
from reports.view import build_view
from tests.reports.sample import AFTER, BEFORE, HOST, MIB, SMALL, leg, run, samples


def charts(*legs: LegResult) -> dict[str, Chart]:
    (group,) = chart_groups(build_view(run(legs=legs)).measures)
    return {chart.key.split("-")[1]: chart for chart in group.charts}


def values(chart: Chart, layer: int | None = None) -> list[dict[str, Any]]:
    """The rows a chart (or one layer of it) is drawn from."""
    holder: dict[str, Any] = chart.spec if layer is None else chart.spec["layer"][layer]
    data: dict[str, Any] = holder.get("data") or chart.spec["data"]
    rows = data["values"] if "values" in data else chart.spec["datasets"][data["name"]]
    return list(rows)


def test_each_group_has_every_chart() -> None:
    assert set(charts(leg())) == {"itl", "ecdf", "ttft", "rate", "memory"}


def test_the_strip_draws_every_gap_and_its_quantiles() -> None:
    gaps = tuple(float(v) for v in range(1, 142))
    chart = charts(leg(samples=(SampleInfo(9.0, gaps),)))["itl"]
    assert values(chart, 0) == [{"recipe": AFTER, "ms": list(gaps)}]
    assert values(chart, 1) == [
        {"recipe": AFTER, "ms": 71.0, "quantile": "p50"},
        {"recipe": AFTER, "ms": 134.0, "quantile": "p95"},
    ]


def test_the_strip_has_no_quantile_that_the_table_has_not() -> None:
    chart = charts(leg(samples=(SampleInfo(9.0, (1.0, 2.0)),)))["itl"]
    assert [row["quantile"] for row in values(chart, 1)] == ["p50"]


def test_the_ecdf_rises_from_zero_to_one() -> None:
    chart = charts(leg(samples=(SampleInfo(9.0, (4.0, 1.0, 2.0, 3.0)),)))["ecdf"]
    assert values(chart) == [
        {"recipe": AFTER, "ms": [1.0, 1.0, 2.0, 3.0, 4.0], "share": [0.0, 0.25, 0.5, 0.75, 1.0]}
    ]


def test_ttft_shows_raw_repeats_and_the_median() -> None:
    made = leg(samples=tuple(SampleInfo(ms, (5.0,)) for ms in (30.0, 10.0, 20.0)))
    chart = charts(made)["ttft"]
    assert values(chart, 0) == [{"recipe": AFTER, "ms": [10.0, 20.0, 30.0]}]
    assert values(chart, 1) == [{"recipe": AFTER, "ms": 20.0}]


def test_bars_carry_speed_and_memory() -> None:
    made = leg(samples=(SampleInfo(9.0, (20.0, 30.0)),), peak_rss_bytes=1024 * MIB, kv_bytes=26 * MIB)
    found = charts(made)
    assert values(found["rate"]) == [{"recipe": AFTER, "value": 40.0, "label": "40.0"}]
    assert values(found["memory"]) == [{"recipe": AFTER, "value": 1024.0, "label": "1 GiB, KV 26 MiB"}]


def test_a_recipe_keeps_its_colour_in_every_chart() -> None:
    found = charts(leg(recipe=BEFORE), leg(recipe=AFTER), leg(recipe=SMALL, validity="NOISY"))
    order = [AFTER, BEFORE, f"{SMALL} (noisy)"]  # the run lists AFTER first
    scales = [found["ecdf"].spec["encoding"]["color"]["scale"]]
    scales += [
        found[kind].spec["layer"][0]["encoding"]["color"]["scale"]
        for kind in ("itl", "ttft", "rate", "memory")
    ]
    for scale in scales:
        assert scale == {"domain": order, "range": ["var(--series-1)", "var(--series-2)", "var(--series-3)"]}


def test_lines_differ_by_dash_as_well_as_by_colour() -> None:
    spec = charts(leg(recipe=BEFORE), leg(recipe=AFTER), leg(recipe=SMALL))["ecdf"].spec
    dashes = spec["encoding"]["strokeDash"]["scale"]["range"]
    assert len({tuple(dash) for dash in dashes}) == 3


def test_every_chart_has_words_for_those_who_cannot_see_it() -> None:
    for chart in charts(leg(recipe=BEFORE), leg(recipe=AFTER)).values():
        assert chart.spec["description"] == chart.text
        for said in (chart.title, HOST, BEFORE, AFTER):
            assert said in chart.text


@pytest.mark.parametrize("gaps", [(), (25.0,), (25.0, 25.0), (0.0, 0.0)])
def test_few_or_equal_samples_still_make_charts(gaps: tuple[float, ...]) -> None:
    for chart in charts(leg(samples=(SampleInfo(9.0, gaps),))).values():
        json.dumps(chart.spec, allow_nan=False)


def test_thinning_keeps_the_extremes_and_the_shape() -> None:
    many = np.random.default_rng(3).normal(25, 2, 5000)
    kept = thinned(many.tolist())
    assert len(kept) == MOST_POINTS
    assert (kept[0], kept[-1]) == (round(many.min(), 3), round(many.max(), 3))
    assert np.median(kept) == pytest.approx(np.median(many), abs=0.02)
    assert thinned([3.0, 1.0, 2.0]) == [1.0, 2.0, 3.0]


def test_specs_load_nothing() -> None:
    for chart in charts(leg(samples=samples(700, 25))).values():
        text = json.dumps({key: value for key, value in chart.spec.items() if key != "$schema"})
        assert "url" not in text
        assert "http" not in text


def test_colours_come_from_the_style_sheet() -> None:
    text = json.dumps(config())
    assert "#" not in text
    assert "var(--ink)" in text


def test_the_library_can_stand_in_a_script_element() -> None:
    assert "</script" not in library().lower()
    assert "<!--" not in library()
    assert library().count("window.vegaEmbed=") == 1

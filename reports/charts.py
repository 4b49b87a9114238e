"""Latency charts as Vega-Lite specs, built by Altair, and the one script that draws them.

The specs name CSS variables where they mean a colour: charts drawn as SVG then follow light,
dark and print without a redraw. Shape or dash repeats what colour says.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import altair as alt
import numpy as np
import numpy.typing as npt
import vl_convert
from altair.utils.schemapi import debug_mode

from reports import stats, text
from reports.measurements import MeasureGroup, MeasureRow

MOST_POINTS = 200  # drawn points per recipe and chart; a page with every raw gap of a farm would be huge
ALL_POINTS = 24_000  # of all rows of a page together, in one kind of chart
FEWEST_POINTS = 40  # enough for the shape of a distribution
SERIES = 8  # colours in style.css
ROW_HEIGHT = 30  # px for each recipe
TALL = 170  # px, the least for the two wide charts: they stand side by side
DASHES = ([1, 0], [6, 3], [2, 2], [8, 3, 2, 3], [1, 0], [6, 3], [2, 2], [8, 3, 2, 3])

Spec = dict[str, Any]


@dataclass(frozen=True)
class Chart:
    """One figure. ``text`` is what a reader without the picture gets."""

    key: str
    title: str
    caption: str
    text: str
    wide: bool
    spec: Spec


@dataclass(frozen=True)
class ChartGroup:
    """The charts of one MeasureGroup."""

    measures: MeasureGroup
    charts: tuple[Chart, ...]


def chart_groups(groups: Sequence[MeasureGroup]) -> tuple[ChartGroup, ...]:
    """Charts for every group, in the groups' order."""
    rows = sum(len(group.rows) for group in groups)
    most = min(MOST_POINTS, max(FEWEST_POINTS, ALL_POINTS // max(1, rows)))
    # Altair checks every part of every chart against its schema, which doubles the time of a large farm.
    with debug_mode(False):
        return tuple(ChartGroup(group, _charts(group, most)) for group in groups)


@cache
def library() -> str:
    """Vega, Vega-Lite and Vega-Embed in one script that sets ``window.vegaEmbed``.

    In a function of its own: the bundle's short top-level names would otherwise be global.
    """
    bundle = str(vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;"))
    return f'(()=>{{"use strict";{bundle}}})();'


def thinned(samples: Sequence[float], most: int = MOST_POINTS) -> list[float]:
    """Sorted ``samples``, at most ``most`` of them; the smallest and the largest are kept."""
    ordered = np.sort(np.asarray(samples, dtype=np.float64))
    return [round(float(value), 3) for value in ordered[_ranks(len(ordered), most)]]


def _ranks(count: int, most: int) -> npt.NDArray[np.intp]:
    """Evenly spaced ranks in [0, count), at most ``most`` of them."""
    return np.linspace(0, count - 1, min(count, most)).round().astype(np.intp)


def _charts(group: MeasureGroup, most: int) -> tuple[Chart, ...]:
    """most: points for each recipe in a chart."""
    sampled = (make(group, most) for make in (_itl_strip, _itl_ecdf, _ttft))
    return (*sampled, _rate(group), _memory(group))


def _chart(
    group: MeasureGroup, kind: str, title: str, caption: str, chart: Any, wide: bool, tell: Callable[..., str]
) -> Chart:
    spec = chart.properties(width="container").to_dict(validate=False)
    spec["autosize"] = {"type": "fit-x", "contains": "padding"}
    told = "; ".join(f"{row.label}: {tell(row)}" for row in group.rows)
    alternative = f"{title}, {group.device.label}, {group.workload}. {told}"
    spec["description"] = alternative
    return Chart(f"{group.key}-{kind}", title, caption, alternative, wide, spec)


def _order(group: MeasureGroup) -> list[str]:
    return [row.label for row in group.rows]


def _recipe_axis(group: MeasureGroup) -> Any:
    axis = alt.Axis(title=None, labelLimit=150, ticks=False, domain=False, labelPadding=8)
    return alt.Y("recipe:N", sort=_order(group), axis=axis)


def _time_axis(
    title: str, group: MeasureGroup, times: Callable[[stats.LegStats], stats.Latency], ticks: int
) -> Any:
    """From below the smallest to above the largest sample, never narrower than 4 % of it."""
    samples = [value for row in group.rows for value in times(row.stats).samples] or [0.0]
    low, high = min(samples), max(samples)
    margin = max(0.05 * (high - low), 0.02 * high)
    scale = alt.Scale(domain=[round(low - margin, 4), round(high + margin, 4)], zero=False, nice=False)
    return alt.X("ms:Q", title=title, scale=scale, axis=alt.Axis(tickCount=ticks))


def _colour(group: MeasureGroup, legend: Any = None) -> Any:
    order = _order(group)
    colours = [f"var(--series-{i % SERIES + 1})" for i in range(len(order))]
    return alt.Color("recipe:N", sort=order, scale=alt.Scale(domain=order, range=colours), legend=legend)


def _height(group: MeasureGroup) -> int:
    return ROW_HEIGHT * len(group.rows) + 6


def _data(rows: list[dict[str, Any]]) -> Any:
    # A tuple: Altair copies lists, every point of them, whenever it copies a chart.
    return alt.InlineData(values=tuple(rows))


def _flat(rows: list[dict[str, Any]], *lists: str) -> Any:
    """A chart of ``rows`` whose ``lists`` hold one number a mark: a tenth of the JSON of one row a mark."""
    return alt.Chart(_data(rows)).transform_flatten(list(lists))


def _itl_strip(group: MeasureGroup, most: int) -> Chart:
    gaps = [{"recipe": row.label, "ms": thinned(row.stats.itl.samples, most)} for row in group.rows]
    marks = [
        {"recipe": row.label, "ms": round(value, 4), "quantile": name}
        for row in group.rows
        for name, value in (("p50", row.stats.itl.median), ("p95", row.stats.itl.p95))
        if value is not None
    ]
    x = _time_axis("ms between tokens", group, lambda s: s.itl, ticks=8)
    y = _recipe_axis(group)
    tip = [alt.Tooltip("recipe:N"), alt.Tooltip("ms:Q", format=".3f")]
    ticks = (
        _flat(gaps, "ms")
        .mark_tick(thickness=1, opacity=0.45, size=22)
        .encode(x, y, _colour(group), tooltip=tip)
    )
    quantiles = (
        alt.Chart(_data(marks))
        .mark_point(filled=True, size=90, opacity=1, color="var(--ink)", stroke="var(--card)", strokeWidth=1)
        .encode(
            x,
            y,
            shape=alt.Shape(
                "quantile:N",
                scale=alt.Scale(domain=["p50", "p95"], range=["diamond", "triangle-left"]),
                legend=alt.Legend(title=None, orient="top", symbolFillColor="var(--ink)"),
            ),
            tooltip=[*tip, alt.Tooltip("quantile:N")],
        )
    )
    return _chart(
        group,
        "itl",
        "Inter-token latency",
        "One tick for each gap between two tokens; diamond p50, triangle p95.",
        (ticks + quantiles).properties(height=max(TALL, _height(group))),
        True,
        lambda row: _told(row.stats.itl),
    )


def _told(times: stats.Latency) -> str:
    """A Latency in words."""
    shown = [("lowest", times.low), ("p50", times.median), ("p95", times.p95), ("highest", times.high)]
    parts = [f"{name} {text.milliseconds(value)}" for name, value in shown if value is not None]
    return f"{', '.join(parts)}, n {times.n:,}"


def _itl_ecdf(group: MeasureGroup, most: int) -> Chart:
    steps = [_ecdf(row, most) for row in group.rows]
    order = _order(group)
    legend = alt.Legend(title=None, orient="top", columns=2, labelLimit=160, symbolType="stroke")
    dashes = alt.StrokeDash(
        "recipe:N",
        sort=order,
        scale=alt.Scale(domain=order, range=[DASHES[i % len(DASHES)] for i in range(len(order))]),
        legend=legend,
    )
    lines = (
        _flat(steps, "ms", "share")
        .mark_line(interpolate="step-after", strokeWidth=2)
        .encode(
            _time_axis("ms between tokens", group, lambda s: s.itl, ticks=8),
            alt.Y("share:Q", title=None, axis=alt.Axis(format=".0%", tickCount=5)),
            _colour(group, legend),
            dashes,
        )
    )
    return _chart(
        group,
        "ecdf",
        "Share of gaps at most this long",
        "Empirical distribution: the further left and the steeper, the better.",
        lines.properties(height=max(TALL, _height(group))),
        True,
        lambda row: _told(row.stats.itl),
    )


def _ecdf(row: MeasureRow, most: int) -> dict[str, Any]:
    """Points (ms, share of samples <= ms) as two lists, with one point more for the rise from zero."""
    count = row.stats.itl.n
    times = thinned(row.stats.itl.samples, most)
    shares = [round((int(rank) + 1) / count, 4) for rank in _ranks(count, most)]
    return {"recipe": row.label, "ms": times[:1] + times, "share": [0.0] * bool(times) + shares}


def _ttft(group: MeasureGroup, most: int) -> Chart:
    repeats = [{"recipe": row.label, "ms": thinned(row.stats.ttft.samples, most)} for row in group.rows]
    medians = [
        {"recipe": row.label, "ms": round(median, 4)}
        for row in group.rows
        if (median := row.stats.ttft.median) is not None
    ]
    x = _time_axis("ms", group, lambda s: s.ttft, ticks=3)
    y = _recipe_axis(group)
    tip = [alt.Tooltip("recipe:N"), alt.Tooltip("ms:Q", format=".2f")]
    dots = _flat(repeats, "ms").mark_circle(size=64, opacity=0.7).encode(x, y, _colour(group), tooltip=tip)
    middle = (
        alt.Chart(_data(medians))
        .mark_tick(thickness=2.5, size=20, color="var(--ink)", opacity=1)
        .encode(x, y, tooltip=tip)
    )
    return _chart(
        group,
        "ttft",
        "Time to first token",
        "One dot for each repeat; the bar is the median.",
        (dots + middle).properties(height=_height(group)),
        False,
        lambda row: _told(row.stats.ttft),
    )


def _bars(group: MeasureGroup, values: list[dict[str, Any]], room: float) -> Any:
    """Horizontal bars from zero, labelled at their end; ``room``: the axis over the longest bar."""
    most = max((v["value"] for v in values), default=1) or 1
    x = alt.X("value:Q", scale=alt.Scale(domain=[0, most * room], nice=False), axis=None)
    tip = [alt.Tooltip("recipe:N"), alt.Tooltip("label:N")]
    base = alt.Chart(_data(values)).encode(x, _recipe_axis(group), tooltip=tip)
    bars = base.mark_bar(height={"band": 0.55}, cornerRadiusEnd=3).encode(_colour(group))
    labels = base.mark_text(align="left", dx=5, color="var(--ink)").encode(text="label:N")
    return (bars + labels).properties(height=_height(group))


def _rate(group: MeasureGroup) -> Chart:
    values = [
        {"recipe": row.label, "value": round(rate, 3), "label": text.number(rate)}
        for row in group.rows
        if (rate := row.stats.tokens_per_s) is not None
    ]
    return _chart(
        group,
        "rate",
        "Decode speed",
        "Tokens/s after the first token; longer is better.",
        _bars(group, values, 1.3),
        False,
        lambda row: f"{text.number(row.stats.tokens_per_s)} tokens/s",
    )


def _weight(row: MeasureRow) -> str:
    return f"{text.byte_size(row.stats.peak_rss_bytes)}, KV {text.byte_size(row.stats.kv_bytes)}"


def _memory(group: MeasureGroup) -> Chart:
    values = [
        {
            "recipe": row.label,
            "value": round(row.stats.peak_rss_bytes / (1 << 20), 2),
            "label": _weight(row),
        }
        for row in group.rows
    ]
    return _chart(
        group,
        "memory",
        "Memory",
        "Peak RSS of the runner, with its KV cache.",
        _bars(group, values, 3.4),
        False,
        _weight,
    )


def config() -> Spec:
    """The look that all charts share; given to Vega-Embed beside each spec."""
    font = "system-ui, -apple-system, 'Segoe UI', Roboto, sans-serif"
    quiet = {"labelColor": "var(--muted)", "titleColor": "var(--muted)", "labelFontSize": 11.5}
    axis = {
        **quiet,
        "titleFontSize": 11.5,
        "titleFontWeight": "normal",
        "gridColor": "var(--line)",
        "domainColor": "var(--line)",
        "tickColor": "var(--line)",
    }
    return {
        "background": "transparent",
        "font": font,
        "view": {"stroke": None},
        "axis": axis,
        "axisY": {"labelColor": "var(--ink)", "labelFontSize": 12},
        "legend": {**quiet, "labelColor": "var(--ink)", "symbolStrokeWidth": 2},
        "text": {"fontSize": 11.5},
    }

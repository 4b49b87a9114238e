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
import vl_convert

from reports import stats, text
from reports.measurements import MeasureGroup, MeasureRow

MOST_POINTS = 400  # drawn points per recipe and chart; a page with every raw gap of a farm would be huge
SERIES = 8  # colours in style.css
ROW_HEIGHT = 30  # px for each recipe
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
    return tuple(ChartGroup(group, _charts(group)) for group in groups)


@cache
def library() -> str:
    """Vega, Vega-Lite and Vega-Embed in one script that sets ``window.vegaEmbed``.

    In a function of its own: the bundle's short top-level names would otherwise be global.
    """
    bundle = str(vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;"))
    return f'(()=>{{"use strict";{bundle}}})();'


def thinned(samples: Sequence[float], most: int = MOST_POINTS) -> list[float]:
    """Sorted ``samples``, at most ``most`` of them at evenly spaced ranks, smallest and largest kept."""
    ordered = np.sort(np.asarray(samples, dtype=np.float64))
    if len(ordered) > most:
        ordered = ordered[np.linspace(0, len(ordered) - 1, most).round().astype(int)]
    return [round(float(value), 4) for value in ordered]


def _charts(group: MeasureGroup) -> tuple[Chart, ...]:
    makers = (_itl_strip, _itl_ecdf, _ttft, _rate, _memory)
    return tuple(make(group) for make in makers)


def _chart(
    group: MeasureGroup, kind: str, title: str, caption: str, chart: Any, wide: bool, tell: Callable[..., str]
) -> Chart:
    spec = chart.properties(width="container").to_dict()
    spec["autosize"] = {"type": "fit-x", "contains": "padding"}
    spec["config"] = _config()
    told = "; ".join(f"{row.label}: {tell(row)}" for row in group.rows)
    alternative = f"{title}, {group.device.label}, {group.workload}. {told}"
    spec["description"] = alternative
    return Chart(f"{group.key}-{kind}", title, caption, alternative, wide, spec)


def _order(group: MeasureGroup) -> list[str]:
    return [row.label for row in group.rows]


def _recipe_axis(group: MeasureGroup) -> Any:
    axis = alt.Axis(title=None, labelLimit=150, ticks=False, domain=False, labelPadding=8)
    return alt.Y("recipe:N", sort=_order(group), axis=axis)


def _colour(group: MeasureGroup, legend: Any = None) -> Any:
    order = _order(group)
    colours = [f"var(--series-{i % SERIES + 1})" for i in range(len(order))]
    return alt.Color("recipe:N", sort=order, scale=alt.Scale(domain=order, range=colours), legend=legend)


def _height(group: MeasureGroup) -> int:
    return ROW_HEIGHT * len(group.rows) + 6


def _data(rows: list[dict[str, Any]]) -> Any:
    return alt.Data(values=rows)


def _itl_strip(group: MeasureGroup) -> Chart:
    gaps = [{"recipe": r.label, "ms": v} for r in group.rows for v in thinned(r.stats.itl.samples)]
    marks = [
        {"recipe": row.label, "ms": round(value, 4), "quantile": name}
        for row in group.rows
        for name, value in (("p50", row.stats.itl.median), ("p95", row.stats.itl.p95))
        if value is not None
    ]
    x = alt.X("ms:Q", title="ms between tokens", scale=alt.Scale(zero=False, nice=True))
    y = _recipe_axis(group)
    tip = [alt.Tooltip("recipe:N"), alt.Tooltip("ms:Q", format=".3f")]
    ticks = (
        alt.Chart(_data(gaps))
        .mark_tick(thickness=1, opacity=0.45, size=16)
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
        (ticks + quantiles).properties(height=_height(group)),
        True,
        lambda row: _told(row.stats.itl),
    )


def _told(times: stats.Latency) -> str:
    """A Latency in words."""
    shown = [("lowest", times.low), ("p50", times.median), ("p95", times.p95), ("highest", times.high)]
    parts = [f"{name} {text.milliseconds(value)}" for name, value in shown if value is not None]
    return f"{', '.join(parts)}, n {times.n:,}"


def _itl_ecdf(group: MeasureGroup) -> Chart:
    steps = [step for row in group.rows for step in _ecdf(row)]
    order = _order(group)
    legend = alt.Legend(title=None, orient="top", columns=2, labelLimit=160, symbolType="stroke")
    dashes = alt.StrokeDash(
        "recipe:N",
        sort=order,
        scale=alt.Scale(domain=order, range=[DASHES[i % len(DASHES)] for i in range(len(order))]),
        legend=legend,
    )
    lines = (
        alt.Chart(_data(steps))
        .mark_line(interpolate="step-after", strokeWidth=2)
        .encode(
            alt.X("ms:Q", title="ms between tokens", scale=alt.Scale(zero=False)),
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
        lines.properties(height=max(170, _height(group))),
        True,
        lambda row: _told(row.stats.itl),
    )


def _ecdf(row: MeasureRow) -> list[dict[str, Any]]:
    """Points (x, share of samples <= x), at most MOST_POINTS of them."""
    ordered = np.sort(np.asarray(row.stats.itl.samples, dtype=np.float64))
    count = len(ordered)
    ranks = np.arange(count)
    if count > MOST_POINTS:
        ranks = np.linspace(0, count - 1, MOST_POINTS).round().astype(int)
    return [
        {
            "recipe": row.label,
            "ms": round(float(ordered[rank]), 4),
            "share": round((int(rank) + 1) / count, 4),
        }
        for rank in ranks
    ]


def _ttft(group: MeasureGroup) -> Chart:
    repeats = [{"recipe": r.label, "ms": v} for r in group.rows for v in thinned(r.stats.ttft.samples)]
    medians = [{"recipe": r.label, "ms": r.stats.ttft.median} for r in group.rows if r.stats.ttft.n]
    x = alt.X("ms:Q", title="ms", scale=alt.Scale(zero=False, nice=True), axis=alt.Axis(tickCount=4))
    y = _recipe_axis(group)
    tip = [alt.Tooltip("recipe:N"), alt.Tooltip("ms:Q", format=".2f")]
    dots = (
        alt.Chart(_data(repeats)).mark_circle(size=64, opacity=0.7).encode(x, y, _colour(group), tooltip=tip)
    )
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


def _bars(group: MeasureGroup, values: list[dict[str, Any]], title: str) -> Any:
    """Horizontal bars from zero with the label at the bar's end."""
    most = max((v["value"] for v in values), default=1) or 1
    x = alt.X(
        "value:Q",
        title=title,
        scale=alt.Scale(domain=[0, most * 1.5], nice=False),
        axis=alt.Axis(tickCount=3),
    )
    y = _recipe_axis(group)
    base = alt.Chart(_data(values)).encode(x, y, tooltip=[alt.Tooltip("recipe:N"), alt.Tooltip("label:N")])
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
        "Tokens per second after the first token; longer is better.",
        _bars(group, values, "tokens/s"),
        False,
        lambda row: f"{text.number(row.stats.tokens_per_s)} tokens/s",
    )


def _memory(group: MeasureGroup) -> Chart:
    values = [
        {
            "recipe": row.label,
            "value": round(row.stats.peak_rss_bytes / (1 << 20), 2),
            "label": f"{text.byte_size(row.stats.peak_rss_bytes)}, KV {text.byte_size(row.stats.kv_bytes)}",
        }
        for row in group.rows
    ]
    return _chart(
        group,
        "memory",
        "Memory",
        "Peak resident memory of the runner, MiB, and its KV cache; shorter is better.",
        _bars(group, values, "peak RSS, MiB"),
        False,
        lambda row: (
            f"peak RSS {text.byte_size(row.stats.peak_rss_bytes)}, KV cache {text.byte_size(row.stats.kv_bytes)}"
        ),
    )


def _config() -> Spec:
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

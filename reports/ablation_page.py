"""The page of an ablation: one HTML file in the report's own dress."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import altair as alt
from markupsafe import Markup

from reports import text
from reports.ablation import METRICS, DeviceAblation, Metric, StepRow, ablations, headline, percent
from reports.charts import Chart, config, library
from reports.page import asset, environment, packed_library, policy, script, write_page
from reports.results import RunResults

ROW_HEIGHT = 34  # px for each step
WORSE, BETTER, WHOLE = "worse", "better", "whole"
COLOURS = {WHOLE: "var(--series-8)", BETTER: "var(--pass)", WORSE: "var(--fail)"}


def render(results: RunResults, folder: Path) -> Path:
    """Writes ``folder``/index.html, replacing an older one, and returns its path.

    Raises:
        OSError: ``folder`` cannot be made or written.
    """
    return write_page(html(results), folder)


def html(results: RunResults) -> str:
    """The page as text."""
    assert results.ablation is not None, "not an ablation"
    found = ablations(results)
    scripts = [script("page.js"), asset("charts.js")]
    return (
        environment()
        .get_template("ablation.html.j2")
        .render(
            results=results,
            head=headline(results, found),
            shown=[i for i in range(len(METRICS)) if any(_has(device, i) for device in found)],
            info=results.ablation,
            started=text.moment(results.started_at),
            elapsed=text.elapsed(results.started_at, results.finished_at),
            workload=next((leg.workload for leg in results.legs), ""),
            devices=[(device, waterfalls(device, f"a{number}")) for number, device in enumerate(found)],
            metrics=METRICS,
            percent=percent,
            byte_size=text.byte_size,
            chart_config=config(),
            policy=policy([*scripts, library()]),
            library=Markup(packed_library()),
            style=Markup(asset("style.css")),
            scripts=[Markup(script) for script in scripts],
        )
    )


def waterfalls(device: DeviceAblation, key: str) -> tuple[Chart, ...]:
    """One chart for each metric that was measured: whole bars first and last, each step's change between."""
    return tuple(
        _waterfall(metric, index, device, f"{key}-{metric.key}")
        for index, metric in enumerate(METRICS)
        if _has(device, index)
    )


def _has(device: DeviceAblation, index: int) -> bool:
    """Whether every step has this metric."""
    return all(row.figures[index].values for row in device.rows)


def _waterfall(metric: Metric, index: int, device: DeviceAblation, key: str) -> Chart:
    bars = _bars(metric, index, device.rows)
    order = [bar["step"] for bar in bars]
    most = max(max(bar["low"], bar["high"], bar["from"], bar["to"]) for bar in bars)
    y = alt.Y(
        "step:N",
        sort=order,
        axis=alt.Axis(title=None, labelLimit=150, ticks=False, domain=False, labelPadding=8),
    )
    scale = alt.Scale(domain=[0, most * 2], nice=False)
    axis = alt.Axis(tickCount=4)
    colour = alt.Color(
        "change:N", scale=alt.Scale(domain=list(COLOURS), range=list(COLOURS.values())), legend=None
    )
    tip = [alt.Tooltip("step:N"), alt.Tooltip("label:N", title=metric.title), alt.Tooltip("spread:N")]
    base = alt.Chart(alt.InlineData(values=tuple(bars))).encode(y, tooltip=tip)
    x = alt.X("from:Q", title=metric.unit, scale=scale, axis=axis)
    spans = base.mark_bar(height={"band": 0.6}, cornerRadius=2).encode(x, alt.X2("to:Q"), colour)
    spread = base.mark_rule(color="var(--ink)", strokeWidth=1.5, opacity=0.75).encode(
        alt.X("low:Q", scale=scale), alt.X2("high:Q")
    )
    labels = base.mark_text(align="left", dx=7, color="var(--ink)").encode(
        alt.X("end:Q", scale=scale), text="label:N"
    )
    spec = (spans + spread + labels).properties(width="container", height=ROW_HEIGHT * len(bars)).to_dict()
    spec["autosize"] = {"type": "fit-x", "contains": "padding"}
    told = "; ".join(f"{bar['step']}: {bar['label']}" for bar in bars)
    spec["description"] = f"{metric.title} on {device.device}. {told}"
    better = "longer" if metric.higher_is_better else "shorter"
    caption = (
        f"{metric.unit}; {better} is better. Green: what a step gained, red: what it cost; "
        "the line is the spread of its legs."
    )
    return Chart(key, metric.title, caption, spec["description"], True, spec)


def _bars(metric: Metric, index: int, rows: Sequence[StepRow]) -> list[dict[str, Any]]:
    """Each step from where the one before it ended; the naive step and the full engine from zero."""
    bars = []
    before = 0.0
    for number, row in enumerate(rows):
        figure = row.figures[index]
        now = figure.middle or 0.0
        gain = row.gains[index]
        change = WHOLE if gain is None else BETTER if gain >= 0 else WORSE
        label = metric.show(now) if gain is None else f"{text.number(now)}  {percent(gain)}"
        bars.append(_bar(row.step.title, before if number else 0.0, now, change, label, figure.values))
        before = now
    last = rows[-1].figures[index]
    whole = metric.improvement(rows[0].figures[index].middle or math.nan, last.middle or math.nan)
    bars.append(
        _bar("Full engine", 0.0, before, WHOLE, f"{text.number(before)}  {percent(whole)}", last.values)
    )
    return bars


def _bar(
    step: str, start: float, end: float, change: str, label: str, values: tuple[float, ...]
) -> dict[str, Any]:
    low, high = min(values), max(values)
    return {
        "step": step,
        "from": round(start, 3),
        "to": round(end, 3),
        "end": round(max(start, end, high), 3),
        "low": round(low, 3),
        "high": round(high, 3),
        "change": change,
        "label": label,
        "spread": f"{text.number(low)}–{text.number(high)}, {text.plural(len(values), 'leg')}",
    }

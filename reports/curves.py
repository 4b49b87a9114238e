"""How speed follows the workload: prompt length, context depth, and time under sustained load.

One group for each device and model that was measured with more than one length, or sustained.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import altair as alt

from reports import stats, text
from reports.charts import DASHES, SERIES, Chart
from reports.devices import DeviceView, unique
from reports.results import LegResult, RunResults, SustainedInfo

HEIGHT = 240  # px
MOST_POINTS = 300  # of one sustained line

Series = Callable[[SustainedInfo], Sequence[tuple[float, float]]]


@dataclass(frozen=True)
class CurveGroup:
    """The curves of one device and model, and what its sustained runs came to, in words."""

    key: str
    device: DeviceView
    model: str
    charts: tuple[Chart, ...]
    sustained: tuple[tuple[str, str], ...]  # recipe, sentence


def curve_groups(results: RunResults, devices: dict[str, DeviceView]) -> tuple[CurveGroup, ...]:
    """Groups in the devices' order; none for what was measured with one workload only."""
    pairs = dict.fromkeys((leg.device, leg.model) for leg in results.legs)
    groups: list[CurveGroup] = []
    for device, model in sorted(pairs, key=lambda pair: list(devices).index(pair[0])):
        key = f"c{len(groups)}"
        legs = [leg for leg in results.legs if (leg.device, leg.model) == (device, model)]
        usable = [leg for leg in legs if leg.validity != "INVALID"]
        charts = tuple(_charts(usable, key, devices[device].label))
        if charts:
            told = tuple((leg.recipe, _settled(leg.sustained)) for leg in usable if leg.sustained)
            groups.append(CurveGroup(key, devices[device], model, charts, told))
    return tuple(groups)


def _charts(legs: Sequence[LegResult], key: str, device: str) -> Iterable[Chart]:
    bursts = [leg for leg in legs if leg.sustained is None]
    sustained = [leg for leg in legs if leg.sustained is not None]
    order = unique(leg.recipe for leg in legs)
    shallow = [leg for leg in bursts if leg.depth == 0]
    ttft = _points(shallow, lambda leg: leg.prompt_tokens, _ttft)
    if _lengths(ttft) > 1:
        yield _curve(
            f"{key}-prompt",
            "Time to first token against prompt length",
            "Median over legs; lower is better.",
            ("prompt, tokens", "ms"),
            ttft,
            order,
            device,
        )
    rates = _points(bursts, lambda leg: leg.depth + leg.prompt_tokens, _rate)
    if _lengths(rates) > 1:
        yield _curve(
            f"{key}-depth",
            "Decode speed against context depth",
            "Depth: tokens in the cache when the first new token comes. Higher is better.",
            ("context, tokens", "tokens/s"),
            rates,
            order,
            device,
        )
    if sustained:
        yield from _sustained(key, sustained, order, device)


def _points(
    legs: Sequence[LegResult],
    at: Callable[[LegResult], int],
    value: Callable[[list[LegResult]], float | None],
) -> list[dict[str, Any]]:
    """One point for each recipe and length, all its legs pooled."""
    cells: dict[tuple[str, int], list[LegResult]] = {}
    for leg in legs:
        cells.setdefault((leg.recipe, at(leg)), []).append(leg)
    return [
        {"recipe": recipe, "x": x, "y": round(y, 3), "legs": text.plural(len(found), "leg")}
        for (recipe, x), found in sorted(cells.items(), key=lambda cell: cell[0][1])
        if (y := value(found)) is not None
    ]


def _ttft(legs: list[LegResult]) -> float | None:
    return stats.leg_stats(legs).ttft.median


def _rate(legs: list[LegResult]) -> float | None:
    return stats.leg_stats(legs).tokens_per_s


def _lengths(points: list[dict[str, Any]]) -> int:
    return len({point["x"] for point in points})


def _curve(
    key: str,
    title: str,
    caption: str,
    axes: tuple[str, str],
    points: list[dict[str, Any]],
    order: list[str],
    device: str,
) -> Chart:
    x = alt.X("x:Q", title=axes[0], scale=alt.Scale(zero=False, padding=12), axis=alt.Axis(tickCount=6))
    y = alt.Y("y:Q", title=axes[1], scale=alt.Scale(zero=True), axis=alt.Axis(tickCount=5))
    tip = [alt.Tooltip("recipe:N"), alt.Tooltip("x:Q", title=axes[0]), alt.Tooltip("y:Q", title=axes[1])]
    base = alt.Chart(alt.InlineData(values=tuple(points))).encode(x, y, *_series(order))
    lines = base.mark_line(strokeWidth=2)
    dots = base.mark_point(filled=True, size=50, opacity=1).encode(tooltip=[*tip, alt.Tooltip("legs:N")])
    told = [
        f"{recipe}: "
        + ", ".join(f"{p['x']:,} tokens {text.number(p['y'])}" for p in points if p["recipe"] == recipe)
        for recipe in order
    ]
    return _chart(key, title, caption, lines + dots, f"{title} ({axes[1]}) on {device}. {'; '.join(told)}")


def _sustained(key: str, legs: Sequence[LegResult], order: list[str], device: str) -> Iterable[Chart]:
    speed = [
        {"recipe": leg.recipe, "x": round(x, 1), "y": round(y, 3)}
        for leg in legs
        if leg.sustained
        for x, y in _thinned(_speeds(leg.sustained))
    ]
    yield _over_time(
        f"{key}-sustained",
        "Sustained decode speed",
        "Generations back to back until the speed settled or time was up.",
        ("tokens/s", speed),
        order,
        device,
        legs,
    )
    sensors = text.joined(unique(leg.sustained.sensor for leg in legs if leg.sustained))
    series: tuple[tuple[str, str, str, str, Series], ...] = (
        ("temperature", "Temperature meanwhile", f"Of {sensors}, the hottest.", "°C", _temperatures),
        ("clock", "Clock meanwhile", "Of the fastest core.", "MHz", _clocks),
    )
    for name, title, caption, unit, of in series:
        values = [
            {"recipe": leg.recipe, "x": round(x, 1), "y": round(y, 1)}
            for leg in legs
            if leg.sustained
            for x, y in _thinned(of(leg.sustained))
        ]
        if values:
            yield _over_time(f"{key}-{name}", title, caption, (unit, values), order, device, legs)


def _speeds(info: SustainedInfo) -> Sequence[tuple[float, float]]:
    return tuple(zip(info.seconds, info.tokens_per_s, strict=True))


def _temperatures(info: SustainedInfo) -> Sequence[tuple[float, float]]:
    return info.temperatures_c


def _clocks(info: SustainedInfo) -> Sequence[tuple[float, float]]:
    return info.clocks_mhz


def _over_time(
    key: str,
    title: str,
    caption: str,
    values: tuple[str, list[dict[str, Any]]],
    order: list[str],
    device: str,
    legs: Sequence[LegResult],
) -> Chart:
    unit, points = values
    x = alt.X("x:Q", title="s since the start", axis=alt.Axis(tickCount=6))
    y = alt.Y("y:Q", title=unit, scale=alt.Scale(zero=False, padding=8), axis=alt.Axis(tickCount=5))
    lines = (
        alt.Chart(alt.InlineData(values=tuple(points))).mark_line(strokeWidth=2).encode(x, y, *_series(order))
    )
    told = "; ".join(f"{leg.recipe}: {_settled(leg.sustained)}" for leg in legs if leg.sustained)
    return _chart(key, title, caption, lines, f"{title} ({unit}) on {device}. {told}")


def _series(order: list[str]) -> tuple[Any, Any]:
    """Colour and dash of each recipe: either alone tells them apart."""
    legend = alt.Legend(title=None, orient="top", columns=2, labelLimit=220, symbolType="stroke")
    colours = [f"var(--series-{i % SERIES + 1})" for i in range(len(order))]
    dashes = [DASHES[i % len(DASHES)] for i in range(len(order))]
    return (
        alt.Color("recipe:N", sort=order, scale=alt.Scale(domain=order, range=colours), legend=legend),
        alt.StrokeDash("recipe:N", sort=order, scale=alt.Scale(domain=order, range=dashes), legend=legend),
    )


def _chart(key: str, title: str, caption: str, chart: Any, told: str) -> Chart:
    spec = chart.properties(width="container", height=HEIGHT).to_dict()
    spec["autosize"] = {"type": "fit-x", "contains": "padding"}
    spec["description"] = told
    return Chart(key, title, caption, told, True, spec)


def _thinned(points: Sequence[tuple[float, float]]) -> Sequence[tuple[float, float]]:
    step = max(1, -(-len(points) // MOST_POINTS))
    return points[::step]


def _settled(info: SustainedInfo) -> str:
    """``41.2 → 36.0 tok/s (−12.6 %) after 3 min 05 s, settled``."""
    change = f"{100 * (info.last / info.first - 1):+.1f} %".replace("-", "−") if info.first else text.MISSING
    lasted = text.seconds(info.seconds[-1]) if info.seconds else "0 s"
    end = "settled" if info.settled else "not settled when time was up"
    return f"{text.number(info.first)} → {text.number(info.last)} tok/s ({change}) after {lasted}, {end}"

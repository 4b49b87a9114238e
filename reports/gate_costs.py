"""What a token costs on each side of a gate, and how speed follows the workload. From VALID legs, pooled."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from reports import stats, svg, text
from reports.ceiling import Share, bandwidths, reads_line
from reports.conditions import energy_line
from reports.gate_results import Arm
from reports.results import EnergyInfo, LegResult

ARMS: tuple[Arm, ...] = ("baseline", "candidate")
Track = tuple[str, str, str]  # device, comparison, workload


@dataclass(frozen=True)
class CostRow:
    """One side of one device, comparison and workload."""

    track: str
    side: Arm
    load: str
    decode: str
    ceiling: Share
    kv: str
    reads: str
    energy: str


@dataclass(frozen=True)
class SpeedCharts:
    """The lines of one device and comparison that was measured with more than one length."""

    title: str
    charts: tuple[tuple[str, str, Markup], ...]  # title, caption, picture


def tracks(legs: Sequence[LegResult]) -> dict[Track, dict[Arm, list[LegResult]]]:
    """VALID timed legs by device, comparison and workload, then side."""
    found: dict[Track, dict[Arm, list[LegResult]]] = {}
    for leg in legs:
        place = leg.place
        if place is None or place.arm == "canary" or leg.memory_pass or leg.validity != "VALID":
            continue
        sides = found.setdefault((leg.device, place.comparison, place.workload), {})
        sides.setdefault(place.arm, []).append(leg)
    return found


def cost_rows(legs: Sequence[LegResult]) -> tuple[CostRow, ...]:
    found, speeds = tracks(legs), bandwidths(legs)
    several = len({comparison for _, comparison, _ in found}) > 1
    rows = []
    for (device, comparison, workload), sides in found.items():
        for arm in ARMS:
            if mine := sides.get(arm):
                pooled = stats.leg_stats(mine, speeds.get(device))
                rows.append(
                    CostRow(
                        track=_named(device, comparison if several else "", workload),
                        side=arm,
                        load=text.milliseconds(pooled.load_ms),
                        decode=_rate(pooled.tokens_per_s),
                        ceiling=pooled.ceiling,
                        kv=text.byte_size(pooled.kv_bytes),
                        reads=reads_line(mine[0].reads) if mine[0].reads else text.MISSING,
                        energy=_energy(mine),
                    )
                )
    return tuple(rows)


def _rate(tokens_per_s: float | None) -> str:
    return text.MISSING if tokens_per_s is None else f"{text.number(tokens_per_s)} tok/s"


def _energy(legs: Sequence[LegResult]) -> str:
    """The middle leg's, by net energy; why there is none where no leg has it."""
    asked = [leg.energy for leg in legs if leg.energy != EnergyInfo()]
    if not asked:
        return "not asked for"
    known = sorted((e for e in asked if e.net_j_per_token is not None), key=lambda e: e.net_j_per_token or 0)
    return energy_line(known[len(known) // 2] if known else asked[0])


def speed_charts(legs: Sequence[LegResult]) -> tuple[SpeedCharts, ...]:
    """TTFT against prompt length, decode speed against context depth; none for a single length."""
    by_device: dict[tuple[str, str], dict[Arm, list[list[LegResult]]]] = {}
    for (device, comparison, _), sides in tracks(legs).items():
        for arm, mine in sides.items():
            by_device.setdefault((device, comparison), {}).setdefault(arm, []).append(mine)
    several = len({comparison for _, comparison in by_device}) > 1
    found = []
    for (device, comparison), arms in by_device.items():
        name = _named(device, comparison if several else "")
        charts = (
            _curve(
                arms,
                ("Time to first token against prompt length", "Median over legs; lower is better."),
                ("prompt, tokens", "ms"),
                name,
                lambda mine: mine[0].prompt_tokens if not mine[0].depth else None,
                lambda mine: stats.leg_stats(mine).ttft.median,
            ),
            _curve(
                arms,
                (
                    "Decode speed against context depth",
                    "Tokens in the cache when decoding begins; higher is better.",
                ),
                ("context, tokens", "tokens/s"),
                name,
                lambda mine: mine[0].depth + mine[0].prompt_tokens,
                lambda mine: stats.leg_stats(mine).tokens_per_s,
            ),
        )
        if shown := tuple(chart for chart in charts if chart is not None):
            found.append(SpeedCharts(name, shown))
    return tuple(found)


def _curve(
    arms: dict[Arm, list[list[LegResult]]],
    words: tuple[str, str],
    axes: tuple[str, str],
    name: str,
    at: Callable[[list[LegResult]], int | None],
    of: Callable[[list[LegResult]], float | None],
) -> tuple[str, str, Markup] | None:
    """None where there is only one length. words: title and caption."""
    lines: list[tuple[str, list[tuple[float, float]]]] = []
    for arm in ARMS:
        points = [(x, y) for mine in arms.get(arm, ()) if (x := at(mine)) is not None and (y := of(mine))]
        lines.append((arm, sorted((float(x), y) for x, y in points)))
    if len({x for _, points in lines for x, _ in points}) < 2:
        return None
    told = "; ".join(
        f"{arm}: " + ", ".join(f"{x:,.0f} tokens {text.number(y)}" for x, y in points)
        for arm, points in lines
    )
    picture = svg.curves(lines, axes, f"{words[0]} ({axes[1]}) on {name}. {told}")
    return (*words, picture)


def _named(*parts: str) -> str:
    return " · ".join(part for part in parts if part)

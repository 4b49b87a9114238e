"""Measurements: one table for each device, model and workload; one row for each recipe."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from reports import stats, text
from reports.ceiling import bandwidths
from reports.conditions import during_line, energy_line
from reports.devices import DEVICES_SHOWN_OPEN, DeviceView, unique
from reports.results import BandwidthInfo, EnergyInfo, LegResult, RunResults


@dataclass(frozen=True)
class Metric:
    """``value`` for people; ``detail`` below it; ``cue`` is "best", "worst" or ""."""

    value: str
    detail: str = ""
    cue: str = ""


@dataclass(frozen=True)
class MeasureRow:
    """One recipe of a MeasureGroup, all its legs pooled. ``metrics`` follow the run's columns."""

    anchor: str
    recipe: str
    threads: str
    stats: stats.LegStats
    metrics: tuple[Metric, ...]
    validity: str
    reasons: tuple[str, ...]
    notes: tuple[str, ...]
    conditions: tuple[str, ...]  # during the legs; and energy

    @property
    def label(self) -> str:
        """The recipe for places that hold only text."""
        return self.recipe if self.validity == "VALID" else f"{self.recipe} ({self.validity.lower()})"


@dataclass(frozen=True)
class MeasureGroup:
    """What may be compared: one device, one model, one workload."""

    key: str
    device: DeviceView
    model: str
    workload: str
    rows: tuple[MeasureRow, ...]
    open: bool


@dataclass(frozen=True)
class MetricColumn:
    """A column of the measurement table. ``value`` is what best and worst are decided on."""

    title: str
    value: Callable[[stats.LegStats], float | None]
    show: Callable[[stats.LegStats], Metric]
    higher_is_better: bool = False


def _ms(value: float | None) -> str:
    return text.milliseconds(value)


def _spread(values: stats.Latency) -> str:
    if values.low is None or values.high is None or values.n < 2:
        return f"n {values.n:,}"
    return f"{text.number(values.low)}–{text.number(values.high)}, n {values.n:,}"


def _rate(tokens_per_s: float | None) -> str:
    return text.MISSING if tokens_per_s is None else f"{text.number(tokens_per_s)} tok/s"


def _tail(found: stats.LegStats, value: float | None, q: float) -> Metric:
    if value is None:
        return Metric("n too small", f"n {found.itl.n:,}, needs {stats.samples_needed(q)}")
    return Metric(_ms(value), f"n {found.itl.n:,}")


METRICS = (
    MetricColumn("Load", lambda s: s.load_ms, lambda s: Metric(_ms(s.load_ms))),
    MetricColumn("TTFT", lambda s: s.ttft.median, lambda s: Metric(_ms(s.ttft.median), _spread(s.ttft))),
    MetricColumn("ITL p50", lambda s: s.itl.median, lambda s: Metric(_ms(s.itl.median), f"n {s.itl.n:,}")),
    MetricColumn("ITL p95", lambda s: s.itl.p95, lambda s: _tail(s, s.itl.p95, 0.95)),
    MetricColumn("ITL p99", lambda s: s.itl.p99, lambda s: _tail(s, s.itl.p99, 0.99)),
    MetricColumn(
        "Decode", lambda s: s.tokens_per_s, lambda s: Metric(_rate(s.tokens_per_s)), higher_is_better=True
    ),
    # No best and worst: fewer bytes are the better half of a smaller share.
    MetricColumn("Of bandwidth", lambda s: None, lambda s: Metric(s.ceiling.words, s.ceiling.detail)),
    MetricColumn("Peak RSS", lambda s: s.peak_rss_bytes, lambda s: Metric(text.byte_size(s.peak_rss_bytes))),
    MetricColumn("KV cache", lambda s: s.kv_bytes, lambda s: Metric(text.byte_size(s.kv_bytes))),
)


ENERGY = MetricColumn(
    "Energy, net", lambda s: s.energy_j, lambda s: Metric(_joules(s.energy_j)), higher_is_better=False
)


def columns_of(results: RunResults) -> tuple[MetricColumn, ...]:
    """METRICS, and energy where any leg was asked for it."""
    asked = any(leg.energy != EnergyInfo() for leg in results.legs)
    return (*METRICS, ENERGY) if asked else METRICS


def _joules(value: float | None) -> str:
    return text.MISSING if value is None else f"{value:.3g} J/token"


def measure_groups(
    results: RunResults, devices: dict[str, DeviceView], recipes: list[str]
) -> tuple[MeasureGroup, ...]:
    keys = dict.fromkeys((leg.device, leg.model, leg.workload) for leg in results.legs)
    ordered = sorted(keys, key=lambda key: list(devices).index(key[0]))
    columns = columns_of(results)
    speeds = bandwidths(results.legs)
    anchors: set[str] = set()
    groups: list[MeasureGroup] = []
    for device, model, workload in ordered:
        here = [
            leg for leg in results.legs if (leg.device, leg.model, leg.workload) == (device, model, workload)
        ]
        legs = [[leg for leg in here if leg.recipe == recipe] for recipe in recipes]
        rows = _measure_rows([found for found in legs if found], columns, anchors, speeds.get(device))
        groups.append(
            MeasureGroup(
                key=f"m{len(groups)}",
                device=devices[device],
                model=model,
                workload=workload,
                rows=rows,
                open=len(keys) <= DEVICES_SHOWN_OPEN or not groups,
            )
        )
    return tuple(groups)


def _measure_rows(
    cells: list[list[LegResult]],
    columns: tuple[MetricColumn, ...],
    anchors: set[str],
    bandwidth: BandwidthInfo | None,
) -> tuple[MeasureRow, ...]:
    pooled = [stats.leg_stats(legs, bandwidth) for legs in cells]
    validities = [_validity(legs) for legs in cells]
    values = []
    for column in columns:
        comparable = [
            column.value(s) if v == "VALID" else None for s, v in zip(pooled, validities, strict=True)
        ]
        marks = stats.cues(comparable, column.higher_is_better)
        shown = [column.show(found) for found in pooled]
        values.append([Metric(m.value, m.detail, cue) for m, cue in zip(shown, marks, strict=True)])
    return tuple(
        MeasureRow(
            anchor=text.anchor(
                anchors, "cell", legs[0].device, legs[0].recipe, legs[0].model, legs[0].workload
            ),
            recipe=legs[0].recipe,
            threads=text.joined(unique(str(leg.threads) for leg in legs)),
            stats=found,
            metrics=metrics,
            validity=validity,
            reasons=tuple(unique(reason for leg in legs for reason in leg.reasons)),
            notes=tuple(unique(note for leg in legs for note in leg.notes)),
            conditions=tuple(unique(line for leg in legs for line in _conditions(leg))),
        )
        for legs, found, validity, metrics in zip(
            cells, pooled, validities, zip(*values, strict=True), strict=True
        )
    )


def _conditions(leg: LegResult) -> tuple[str, ...]:
    during = during_line(leg.during)
    energy = "" if leg.energy == EnergyInfo() else f"Energy: {energy_line(leg.energy)}"
    return tuple(line for line in (during, energy) if line)


def _validity(legs: Sequence[LegResult]) -> str:
    return min((leg.validity for leg in legs), key=("INVALID", "NOISY", "VALID").index)

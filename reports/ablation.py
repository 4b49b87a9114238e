"""What each step of an ablation is worth, beside the figures that the seed report published.

Pure: a RunResults with an AblationInfo in, plain dataclasses out. A step's figure is the median over its
legs, each of a process of its own; the spread is the lowest and the highest leg.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Literal

from reports import stats, text
from reports.ablation_results import AblationInfo, AblationStep
from reports.results import EnergyInfo, LegResult, RunResults

Outcome = Literal["reached", "not reached", "unsupported", "not measured"]
MIB = 1 << 20


@dataclass(frozen=True)
class Figure:
    """One metric of one step: a value for each leg, in the order of the rounds."""

    values: tuple[float, ...]

    @property
    def middle(self) -> float | None:
        return median(self.values) if self.values else None


@dataclass(frozen=True)
class Metric:
    """seed: what the seed report published before and after; None where it gave the change only."""

    key: str
    title: str
    unit: str
    value: Callable[[LegResult], float | None]
    higher_is_better: bool
    seed: tuple[float, float] | None
    seed_improvement: float

    def improvement(self, before: float, after: float) -> float:
        """A share: 0.5 is half the time or memory, or half as many tokens/s more."""
        return after / before - 1 if self.higher_is_better else 1 - after / before

    def show(self, value: float | None) -> str:
        return text.MISSING if value is None else f"{text.number(value)} {self.unit}"


def _ttft(leg: LegResult) -> float | None:
    return stats.latency(s.ttft_ms for s in leg.samples).median


def _memory(leg: LegResult) -> float | None:
    return leg.peak_rss_bytes / MIB if leg.memory_pass else None


METRICS = (
    Metric("ttft", "Time to first token", "ms", _ttft, False, (850, 420), 0.506),
    Metric(
        "rate", "Decode speed", "tok/s", lambda leg: stats.decode_rate(leg.samples), True, (8.2, 15.3), 0.866
    ),
    Metric("memory", "Peak memory", "MiB", _memory, False, (446, 295), 0.339),
    Metric("energy", "Energy a token", "J", lambda leg: leg.energy.net_j_per_token, False, None, 0.40),
)


@dataclass(frozen=True)
class StepRow:
    """One step on one device. figures and gains follow METRICS; gain: against the step before."""

    step: AblationStep
    figures: tuple[Figure, ...]
    gains: tuple[float | None, ...]
    kv_bytes: int | None
    threads: str
    legs: int
    valid: int  # of them
    reasons: tuple[str, ...]
    same_tokens: bool | None  # as the naive step; None: one of them has none


@dataclass(frozen=True)
class SeedRow:
    """A row of the seed's table. low, high: the improvement in the worst and in the best round."""

    metric: Metric
    before: float | None
    after: float | None
    improvement: float | None
    low: float | None
    high: float | None
    outcome: Outcome
    steps: str  # which of them did it
    limit: str  # why it was not enough, "" where it was

    @property
    def why(self) -> str:
        return f"{self.steps} {self.limit}".strip()

    @property
    def seed(self) -> str:
        """``850 → 420 ms``."""
        if self.metric.seed is None:
            return text.MISSING
        before, after = self.metric.seed
        unit = "MB" if self.metric.unit == "MiB" else self.metric.unit
        return f"{before:g} → {after:g} {unit}"


@dataclass(frozen=True)
class DeviceAblation:
    """All of one device. unquantised: the full engine with unquantised weights; quantised: what quantising
    them is worth, an improvement for each of METRICS."""

    device: str
    simulated: str
    rows: tuple[StepRow, ...]
    unquantised: StepRow | None
    quantised: tuple[float | None, ...]
    seed: tuple[SeedRow, ...]
    legs: int
    noisy: int

    @property
    def sentence(self) -> str:
        """What the seed's table comes to here, in one sentence."""
        told = []
        for row in self.seed:
            if row.improvement is None:
                told.append(f"{row.metric.title.lower()} {row.outcome}")
            else:
                told.append(
                    f"{row.metric.title.lower()} {_better(row.improvement)} (the seed: "
                    f"{_better(row.metric.seed_improvement)})"
                )
        return text.joined(told)


def _better(share: float) -> str:
    return f"{100 * abs(share):.1f} % {'better' if share >= 0 else 'worse'}"


def percent(share: float | None) -> str:
    """``+50.6 %``; a loss has a minus."""
    return text.MISSING if share is None else f"{100 * share:+.1f} %".replace("-", "−")


@dataclass(frozen=True)
class Headline:
    """What the page says first."""

    state: Literal["passed", "incomplete"]
    word: str
    headline: str
    remarks: tuple[str, ...]


def headline(results: RunResults, found: Sequence[DeviceAblation]) -> Headline:
    """Green only if every row that can be measured is reached, and every leg is there and VALID."""
    rows = [row for device in found for row in device.seed if row.outcome != "unsupported"]
    reached = sum(row.outcome == "reached" for row in rows)
    noisy, missing = sum(d.noisy for d in found), results.planned_legs - len(results.legs)
    remarks = [
        f"{device.device}: {row.metric.title.lower()} is {row.outcome}. {row.limit}"
        for device in found
        for row in device.seed
        if row.outcome != "reached"
    ]
    if noisy:
        remarks.append(f"{noisy} of {len(results.legs)} legs are not VALID: their figures decide nothing.")
    if missing:
        remarks.append(f"{missing} of {results.planned_legs} planned legs are missing.")
    remarks += results.infrastructure
    green = bool(rows) and reached == len(rows) and not noisy and not missing
    return Headline(
        state="passed" if green else "incomplete",
        word="REACHED" if green else "NOISY" if reached == len(rows) and noisy else "NOT ALL REACHED",
        headline=f"{reached} of {len(rows)} of the seed's improvements are reached",
        remarks=tuple(remarks),
    )


def ablations(results: RunResults) -> tuple[DeviceAblation, ...]:
    """One for each device that has legs.

    Raises:
        ValueError: ``results`` are not an ablation's.
    """
    info = results.ablation
    if info is None:
        raise ValueError(f"run {results.run_id} is no ablation")
    simulated = {device.name: device.simulated for device in results.devices}
    names = dict.fromkeys(leg.device for leg in results.legs)
    return tuple(
        _of_device(name, simulated.get(name, ""), [leg for leg in results.legs if leg.device == name], info)
        for name in names
    )


def _of_device(name: str, simulated: str, legs: list[LegResult], info: AblationInfo) -> DeviceAblation:
    naive = _legs(legs, info.steps[0])
    rows: list[StepRow] = []
    for step in info.steps:
        rows.append(_row(step, _legs(legs, step), naive, rows[-1] if rows else None))
    unquantised = (
        _row(info.unquantised, _legs(legs, info.unquantised), naive, None) if info.unquantised else None
    )
    return DeviceAblation(
        device=name,
        simulated=simulated,
        rows=tuple(rows),
        unquantised=unquantised,
        quantised=_gains(unquantised, rows[-1].figures),
        seed=tuple(_seed_row(index, metric, rows, legs, info) for index, metric in enumerate(METRICS)),
        legs=len(legs),
        noisy=sum(leg.validity != "VALID" for leg in legs),
    )


def _legs(legs: Sequence[LegResult], step: AblationStep) -> list[LegResult]:
    """An INVALID leg is no figure at all; a NOISY one is shown, and said to be."""
    return [leg for leg in legs if leg.recipe == step.recipe and leg.validity != "INVALID"]


def _row(
    step: AblationStep, legs: list[LegResult], naive: list[LegResult], before: StepRow | None
) -> StepRow:
    figures = tuple(
        Figure(tuple(v for leg in legs if (v := metric.value(leg)) is not None and math.isfinite(v)))
        for metric in METRICS
    )
    return StepRow(
        step=step,
        figures=figures,
        gains=_gains(before, figures),
        kv_bytes=max((leg.kv_bytes for leg in legs), default=None),
        threads=text.joined([str(n) for n in dict.fromkeys(leg.threads for leg in legs)]),
        legs=len(legs),
        valid=sum(leg.validity == "VALID" for leg in legs),
        reasons=tuple(dict.fromkeys(reason for leg in legs for reason in leg.reasons)),
        same_tokens=_same_tokens(legs, naive),
    )


def _gains(before: StepRow | None, after: Sequence[Figure]) -> tuple[float | None, ...]:
    if before is None:
        return (None,) * len(METRICS)
    return tuple(map(_improvement, METRICS, before.figures, after))


def _same_tokens(legs: Sequence[LegResult], naive: Sequence[LegResult]) -> bool | None:
    ours, theirs = ({leg.provenance.get("tokens", "") for leg in each} for each in (legs, naive))
    return None if not ours or not theirs or "" in ours | theirs else ours == theirs


def _improvement(metric: Metric, before: Figure, after: Figure) -> float | None:
    if not before.middle or after.middle is None:
        return None
    return metric.improvement(before.middle, after.middle)


def _seed_row(
    index: int, metric: Metric, rows: Sequence[StepRow], legs: Sequence[LegResult], info: AblationInfo
) -> SeedRow:
    before, after = rows[0].figures[index], rows[-1].figures[index]
    improvement = _improvement(metric, before, after)
    # Where a leg is missing, the two no longer pair by round.
    paired = len(before.values) == len(after.values)
    pairs = zip(before.values, after.values, strict=True) if paired else ()
    rounds = [metric.improvement(b, a) for b, a in pairs if b]
    if improvement is None:
        supported = metric.key != "energy"
        outcome: Outcome = "not measured" if supported else "unsupported"
        why = "No leg of the naive or of the full step has it." if supported else _unsupported(legs)
        return SeedRow(metric, before.middle, after.middle, None, None, None, outcome, "", why)
    reached = improvement >= metric.seed_improvement
    return SeedRow(
        metric,
        before.middle,
        after.middle,
        improvement,
        min(rounds, default=None),
        max(rounds, default=None),
        "reached" if reached else "not reached",
        _steps(index, rows),
        "" if reached else _limit(metric, rows, info),
    )


def _unsupported(legs: Sequence[LegResult]) -> str:
    """Why the energy ladder gave nothing; that some legs were not asked is no reason where others were."""
    reasons = dict.fromkeys(leg.energy.reason for leg in legs if leg.energy.reason)
    asked = [reason for reason in reasons if reason != EnergyInfo().reason]
    return text.joined(asked or list(reasons))


def _steps(index: int, rows: Sequence[StepRow]) -> str:
    """The steps that gained and cost most."""
    steps = [(row.gains[index] or 0.0, row.step.title) for row in rows[1:]]
    best = [f"{title} {percent(gain)}" for gain, title in sorted(steps, reverse=True)[:3] if gain > 0.01]
    worst = [f"{title} {percent(gain)}" for gain, title in sorted(steps)[:2] if gain < -0.01]
    told = f"Most from {text.joined(best)}." if best else "No step helped."
    return f"{told} Lost by {text.joined(worst)}." if worst else told


def _limit(metric: Metric, rows: Sequence[StepRow], info: AblationInfo) -> str:
    weights = f"{text.byte_size(info.weights_bytes)} of {info.weights} weights"
    if metric.key == "ttft":
        return (
            f"The head is {info.head_share:.0%} of a prompt token's multiply-adds and the only part that a "
            "step here leaves out; the layers' own work stays."
        )
    if metric.key == "rate":
        kv = text.byte_size(rows[0].kv_bytes)
        return (
            f"A token reads {weights} before and after; a step here can only save what the naive step spends "
            f"on its {kv} of cache and on copies."
        )
    if metric.key == "memory":
        return f"{weights} are resident before and after; no step here makes them smaller."
    return ""

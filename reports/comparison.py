"""Two stored runs side by side: ratios with intervals, checks that turned, what only one side has.

Stored numbers were not taken side by side, so nothing here is a verdict: a night's weather is in
every ratio and in no interval. `kvfarm gate` measures both live. Pure: two RunResults in.

The interval is scipy's bootstrap (percentile) of the ratio of geometric means, over legs where both
sides have FEWEST of them, else over repeats, which tells how the repeats scatter and not how
processes do. Measured on two
sides of the same normal noise (400 pairs): an interval named 95 % held the truth in 86 % of them at
5 values a side, 90 % at 8, 92 % at 15; at 3 it would be 81 %, so from 5 on.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
import scipy.stats

from reports.results import CheckResult, LegResult, Outcome, RunResults

FEWEST = 5  # values a side for an interval
LEVEL = 0.95
RESAMPLES = 1999
NOTABLE = 0.05  # share: as for best and worst in a run's table, repeat runs differ by less

Floats = npt.NDArray[np.float64]
Cell = tuple[str, str, str, str]  # device, recipe, model, workload
Word = Literal["worse", "better", "alike", "too few", "equal", "differs"]


@dataclass(frozen=True)
class Measure:
    """What is compared of a cell. by_leg: one value a leg; of_repeats: several, {} where there is one.

    exact: bytes that code decides, compared as they are. Smaller is better in all of them.
    """

    key: str
    title: str
    unit: str
    by_leg: Callable[[LegResult], float | None]
    of_repeats: Callable[[LegResult], Sequence[float]] = lambda leg: ()
    exact: bool = False


@dataclass(frozen=True)
class Ratio:
    """One number on both sides; change = b / a - 1, positive is worse. counts: values behind a and b."""

    cell: Cell
    measure: Measure
    a: float
    b: float
    counts: tuple[int, int]
    over: str  # "legs", "repeats" or ""
    change: float
    low: float | None
    high: float | None
    word: Word


@dataclass(frozen=True)
class Turned:
    """A check whose outcome is another on side B."""

    device: str
    recipe: str
    title: str
    check: str
    before: Outcome
    after: Outcome
    message: str


@dataclass(frozen=True)
class OneSided:
    """What one side has and the other has not. side: "A" or "B"."""

    side: str
    what: str
    why: str = ""


@dataclass(frozen=True)
class Comparison:
    ratios: tuple[Ratio, ...]
    turned: tuple[Turned, ...]
    checks: int  # compared
    one_sided: tuple[OneSided, ...]
    differs: tuple[tuple[str, str, str], ...]  # what, A, B


def _median(values: Iterable[float]) -> float | None:
    known = [value for value in values if math.isfinite(value)]
    return statistics.median(known) if known else None


def _ttfts(leg: LegResult) -> list[float]:
    return [sample.ttft_ms for sample in leg.samples if math.isfinite(sample.ttft_ms)]


def _itls(leg: LegResult) -> list[float]:
    """Median gap of each repeat."""
    found = (_median(sample.itl_ms) for sample in leg.samples)
    return [value for value in found if value is not None]


MEASURES = (
    Measure("ttft", "TTFT", "ms", lambda leg: _median(_ttfts(leg)), _ttfts),
    Measure("itl", "ITL p50", "ms", lambda leg: _median(_itls(leg)), _itls),
    Measure("load", "Load", "ms", lambda leg: leg.load_ms),
    Measure("memory", "Peak RSS", "bytes", lambda leg: float(leg.peak_rss_bytes)),
    Measure("energy", "Energy, net", "J/token", lambda leg: leg.energy.net_j_per_token),
    Measure("kv", "KV cache", "bytes", lambda leg: float(leg.kv_bytes), exact=True),
)


def compare(a: RunResults, b: RunResults) -> Comparison:
    """``b`` against ``a``."""
    legs_a, legs_b = _cells(a), _cells(b)
    both = [cell for cell in legs_a if cell in legs_b]
    ratios = [
        ratio
        for cell in both
        for measure in MEASURES
        if (ratio := _ratio(cell, measure, legs_a[cell], legs_b[cell])) is not None
    ]
    checks_a, checks_b = _checks(a), _checks(b)
    return Comparison(
        ratios=tuple(sorted(ratios, key=lambda ratio: _ORDER.index(ratio.word))),
        turned=tuple(_turned(checks_a, checks_b)),
        checks=len(checks_a.keys() & checks_b.keys()),
        one_sided=(*_only("A", a, b, checks_a, checks_b), *_only("B", b, a, checks_b, checks_a)),
        differs=tuple(_differs(a, b)),
    )


_ORDER: tuple[Word, ...] = ("worse", "differs", "better", "too few", "alike", "equal")


def _cells(run: RunResults) -> dict[Cell, list[LegResult]]:
    """VALID legs by cell; of a gate, those of its candidate."""
    cells: dict[Cell, list[LegResult]] = {}
    for leg in run.legs:
        if leg.validity == "VALID" and (leg.place is None or leg.place.arm == "candidate"):
            cells.setdefault(_cell(leg), []).append(leg)
    return cells


def _cell(leg: LegResult) -> Cell:
    return (leg.device, leg.recipe, leg.model, leg.workload)


def _ratio(cell: Cell, measure: Measure, a: Sequence[LegResult], b: Sequence[LegResult]) -> Ratio | None:
    """None where a side has no such number."""
    values, over = [_by_leg(measure, side) for side in (a, b)], "legs"
    if not all(values):
        return None
    if min(map(len, values)) < FEWEST:
        repeats = [[value for leg in side for value in measure.of_repeats(leg)] for side in (a, b)]
        values, over = (repeats, "repeats") if all(repeats) else (values, over)
    first, second = (statistics.geometric_mean(side) for side in values)
    change = second / first - 1
    low = high = None
    word: Word
    if measure.exact:
        over, word = "", "equal" if first == second else ("worse" if change > 0 else "better")
    elif min(map(len, values)) < FEWEST:
        word = "too few"
    else:
        low, high = interval(values[0], values[1])
        word = _word(change, low, high)
    counts = (len(values[0]), len(values[1]))
    return Ratio(cell, measure, first, second, counts, over, change, low, high, word)


def _by_leg(measure: Measure, legs: Sequence[LegResult]) -> list[float]:
    found = [value for leg in legs if (value := measure.by_leg(leg)) is not None]
    return [value for value in found if math.isfinite(value) and value > 0]


def _word(change: float, low: float, high: float) -> Word:
    if low > 0 or high < 0:
        return "alike" if abs(change) < NOTABLE else "worse" if change > 0 else "better"
    return "alike"


def interval(a: Sequence[float] | Floats, b: Sequence[float] | Floats) -> tuple[float, float]:
    """Bounds of geometric mean(b) / geometric mean(a) - 1 at LEVEL, two-sided; the same at each call."""
    logs = [np.log(np.asarray(side, dtype=np.float64)) for side in (b, a)]
    if not any(np.ptp(side) for side in logs):
        shift = float(np.expm1(logs[0][0] - logs[1][0]))
        return shift, shift
    found = scipy.stats.bootstrap(
        logs,
        _shift,
        n_resamples=RESAMPLES,
        confidence_level=LEVEL,
        method="percentile",
        rng=np.random.default_rng(0),
    ).confidence_interval
    return float(np.expm1(found.low)), float(np.expm1(found.high))


def _shift(b: Floats, a: Floats, axis: int = -1) -> Floats:
    return np.asarray(b.mean(axis=axis) - a.mean(axis=axis))


CheckKey = tuple[str, str, str]


def _checks(run: RunResults) -> dict[CheckKey, CheckResult]:
    return {(check.device, check.recipe, check.check): check for check in run.checks}


def _turned(a: dict[CheckKey, CheckResult], b: dict[CheckKey, CheckResult]) -> Iterable[Turned]:
    """Those that fail now first, then those that pass again, then the rest."""
    found = [
        Turned(
            after.device,
            after.recipe,
            after.title,
            after.check,
            before.outcome,
            after.outcome,
            before.message if after.outcome == "passed" else after.message,
        )
        for key, after in b.items()
        if (before := a.get(key)) is not None and before.outcome != after.outcome
    ]
    return sorted(found, key=lambda turned: (turned.after != "failed", turned.before != "failed"))


def _only(
    side: str,
    run: RunResults,
    other: RunResults,
    checks: dict[CheckKey, CheckResult],
    others: dict[CheckKey, CheckResult],
) -> Iterable[OneSided]:
    theirs = {device.name for device in other.devices} | {key[0] for key in others}
    ours = {device.name for device in run.devices} | {key[0] for key in checks}
    simulated = {device.name for device in (*run.devices, *other.devices) if device.simulated}

    def label(device: str) -> str:
        return f"{device} (simulated)" if device in simulated else device

    for device in sorted(ours - theirs):
        yield OneSided(side, f"device {label(device)}")
    counts: dict[tuple[str, str], int] = {}
    for device, recipe, check in checks:
        if device in theirs and (device, recipe, check) not in others:
            counts[device, recipe] = counts.get((device, recipe), 0) + 1
    for (device, recipe), count in counts.items():
        yield OneSided(side, f"{count} check{'' if count == 1 else 's'} of {recipe} on {label(device)}")
    usable, theirs_usable = _cells(run), _cells(other)
    validities = {_cell(leg): leg for leg in other.legs}
    for cell in usable:
        if cell[0] in theirs and cell not in theirs_usable:
            leg = validities.get(cell)
            why = f"measured on the other side, but {leg.validity}: {'; '.join(leg.reasons)}" if leg else ""
            yield OneSided(side, f"measurement of {cell[1]} on {label(cell[0])}, {cell[2]}, {cell[3]}", why)


def _differs(a: RunResults, b: RunResults) -> Iterable[tuple[str, str, str]]:
    """Whatever else is not the same: each may be the cause of what is seen."""
    first, second = _facts(a), _facts(b)
    for name in dict.fromkeys([*first, *second]):
        pair = first.get(name), second.get(name)
        if pair[0] != pair[1] and None not in pair:
            yield name, str(pair[0]), str(pair[1])


def _facts(run: RunResults) -> dict[str, str]:
    facts = {"model": run.model, "reference": run.reference, **run.provenance}
    for device in run.devices:
        facts[f"{device.name}: build"] = device.build
        facts[f"{device.name}: model"] = device.model
        facts |= {f"{device.name}: {name}": version for name, version in device.runtime.items()}
    for recipe in run.recipes:
        facts |= {f"{recipe.name}: {name}": setting for name, setting in recipe.settings.items()}
    for leg in run.legs:
        if artifact := leg.provenance.get("artifact"):
            facts[f"{leg.recipe}, {leg.model}: artifact"] = artifact
    return facts

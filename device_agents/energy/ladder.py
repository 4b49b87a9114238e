"""Joules for each token by the best meter there is: power rails, else the fuel gauge, else none.

Net energy is all that was drawn between a moment of rest before the work and one after it, less what
rest would have drawn. With rest at both ends it does not matter how slowly or smoothly a gauge follows,
as long as what it tells adds up; whether it does, the charge counter says.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Literal

from device_agents.energy import counter
from device_agents.energy.calibration import Calibration
from device_agents.energy.counter import J_PER_UAH_V, Phases
from device_agents.energy.series import (
    Series,
    Unsupported,
    at,
    between,
    check_state,
    counters,
    currents,
    integral,
    mean,
    rails,
    scatter,
    volts,
)
from device_agents.recording.record import Record, Sample

MIN_WINDOW_S = 60.0
MIN_TICKS = 20
_IDLE_LEAST_S = 15.0
_GUARD_S = 1.5
_GAP_MOST_S = 8.0
_CELL_V = 3.9
_STEP_MOST_S = 60.0  # that are waited for a counter to step at rest
# Twice the standard error of net energy may be this much of it, else there is no number. Three times it
# is then at most the 3 % that a number of ours is meant to hold.
UNCERTAIN_MOST = 0.02


@dataclass(frozen=True)
class Window:
    """When the device worked, on its own clock (Sample.at), and what for."""

    start: float
    end: float
    tokens: int


@dataclass(frozen=True)
class Energy:
    """J for each token; None where unsupported, and ``reason`` says why.

    uncertainty: relative, of net, two standard errors. cross_check: charge counted by the counter over
    the charge that current_now adds up to. idle_w: at rest, the recorder running.
    """

    rung: Literal["rails", "gauge", "unsupported"]
    reason: str = ""
    net_j_per_token: float | None = None
    gross_j_per_token: float | None = None
    uncertainty: float | None = None
    idle_w: float | None = None
    tokens: int = 0
    window_s: float = 0.0
    cross_check: float | None = None
    notes: tuple[str, ...] = ()


def unsupported(reason: str) -> Energy:
    return Energy("unsupported", reason)


def idle_needs(calibration: Calibration) -> tuple[float, float]:
    """Seconds of rest to record before the work and after it: until the counter has stepped, if it may."""
    settle = calibration.settle_s
    step_s = calibration.tick_uah * _CELL_V * J_PER_UAH_V / calibration.idle_w
    rest = max(_IDLE_LEAST_S + 10, 1.4 * step_s if step_s <= _STEP_MOST_S else 0.0)
    return settle + _GUARD_S + rest, 2 * settle + rest


def measure(record: Record, calibration: Calibration, window: Window) -> Energy:
    """Never raises: what cannot be said is ``unsupported``, with the reason."""
    try:
        return _measure(record, calibration, window)
    except Unsupported as reason:
        found = unsupported(str(reason))
        return replace(found, tokens=window.tokens, window_s=window.end - window.start)


def _measure(record: Record, calibration: Calibration, window: Window) -> Energy:
    samples = record.samples
    if not samples or window.tokens < 1:
        raise Unsupported(record.note or "nothing was recorded, or no token came")
    phases = _phases(samples, calibration, window)
    gaps = [b.at - a.at for a, b in pairwise(samples)]
    if max(gaps) > _GAP_MOST_S:
        raise Unsupported(f"the recording has a gap of {max(gaps):.0f} s")
    if calibration.meter == "rails":
        return _by_rails(samples, phases, window)
    check_state(samples)
    return _by_gauge(samples, calibration, phases, window)


def _phases(samples: tuple[Sample, ...], calibration: Calibration, window: Window) -> Phases:
    start, end = window.start - _GUARD_S, window.end + 2 * calibration.settle_s
    before = (samples[0].at + calibration.settle_s, start)
    after = (end, samples[-1].at)
    if min(before[1] - before[0], after[1] - after[0]) < _IDLE_LEAST_S:
        raise Unsupported(
            f"sought {_IDLE_LEAST_S:.0f} s of rest before and after the work; the recording has less"
        )
    return Phases(start, end, before, after)


def _by_rails(samples: tuple[Sample, ...], phases: Phases, window: Window) -> Energy:
    energy = rails(samples)
    if energy is None:
        raise Unsupported("the power rails were readable when calibrated, and are not now")
    _long_enough(window, 0)
    slopes = [(at(energy, b) - at(energy, a)) / (b - a) for a, b in (phases.before, phases.after)]
    rest = sum(slopes) / 2
    drawn = at(energy, phases.end) - at(energy, phases.start)
    error = abs(slopes[0] - slopes[1]) / 2 * phases.seconds
    names = ", ".join(sorted(samples[0].rails))
    note = f"of the rails {names}, and of nothing else in the phone"
    return _result("rails", drawn, rest, error / 2, phases, window, None, (note,))


def _by_gauge(
    samples: tuple[Sample, ...], calibration: Calibration, phases: Phases, window: Window
) -> Energy:
    voltage = volts(samples)
    drawn = tuple((time, told * calibration.amperes) for time, told in currents(samples))
    power = tuple((time, amperes * at(voltage, time)) for time, amperes in drawn)
    counted = counters(samples)
    _long_enough(window, _edges_in(counted, window))
    rests = phases.rest(power)
    rest = mean((*rests[0], *rests[1]))
    rest_error = math.hypot(*(scatter(part) / 2 for part in rests))
    _same_rest(rests, rest, integral(power, phases.start, phases.end) - rest * phases.seconds, phases)

    inside = between(power, window.start, window.end)
    noise = scatter(inside) * (window.end - window.start)
    told = integral(power, phases.start, phases.end)
    ratio = counter.check(drawn, counted, phases, calibration.settle_s, noise / told)
    # Work in a rhythm near the gauge's own scatters less than it errs; then the two differ.
    by_gauge = told, math.hypot(noise, abs(ratio - 1) * told / 2)
    by_counter = counter.energy(counted, voltage, phases, rest)
    total, error = min(by_gauge, by_counter, key=lambda estimate: estimate[1])
    notes = ("the counter's energy is told, current_now checked it",) if (total, error) == by_counter else ()
    error = math.hypot(error, rest_error * phases.seconds)
    return _result("gauge", total, rest, error, phases, window, ratio, notes)


def _same_rest(rests: tuple[Series, Series], rest: float, net: float, phases: Phases) -> None:
    """Raises Unsupported when something else began or ended meanwhile."""
    if min(map(len, rests)) < 5:
        raise Unsupported("too few samples of the phone at rest")
    means = [mean(part) for part in rests]
    chance = 3 * math.hypot(*map(scatter, rests))
    if abs(means[0] - means[1]) > chance + 0.15 * rest:
        raise Unsupported(
            f"at rest it drew {means[0]:.2f} W before the work and {means[1]:.2f} W after: something else ran"
        )
    if net <= 0:
        raise Unsupported("the work took no more power than rest")


def _edges_in(counted: Series, window: Window) -> int:
    inside = between(counted, window.start, window.end)
    return sum(a != b for (_, a), (_, b) in pairwise(inside))


def _long_enough(window: Window, ticks: int) -> None:
    seconds = window.end - window.start
    if seconds < MIN_WINDOW_S and ticks < MIN_TICKS:
        raise Unsupported(
            f"the work took {seconds:.0f} s; sought {MIN_WINDOW_S:.0f} s, or {MIN_TICKS} steps of the counter"
        )


def _result(
    rung: Literal["rails", "gauge"],
    drawn: float,
    rest: float,
    error: float,
    phases: Phases,
    window: Window,
    ratio: float | None,
    notes: tuple[str, ...],
) -> Energy:
    net = drawn - rest * phases.seconds
    seconds = window.end - window.start
    if net <= 0:
        raise Unsupported("the work took no more power than rest")
    uncertainty = 2 * error / net
    if uncertainty > UNCERTAIN_MOST:
        raise Unsupported(
            f"uncertain by {uncertainty:.1%}; sought {UNCERTAIN_MOST:.0%} at most: measure longer, "
            "or with a finer gauge"
        )
    return Energy(
        rung,
        net_j_per_token=net / window.tokens,
        gross_j_per_token=(net + rest * seconds) / window.tokens,
        uncertainty=uncertainty,
        idle_w=rest,
        tokens=window.tokens,
        window_s=seconds,
        cross_check=ratio,
        notes=notes,
    )

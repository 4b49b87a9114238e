"""The charge counter: what checks ``current_now``, and mostly tells the energy better than it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise

from device_agents.energy.series import Series, Unsupported, at, between, integral, tick

J_PER_UAH_V = 3.6e-3
# The gauge and the counter may differ by this much, beside what chance explains.
DISAGREE_MOST = 0.02
# What chance may explain: standard error of the counter's steps, and twice that of everything.
_STEPS_ERROR_MOST = 0.01
_CHANCE_MOST = 0.08


@dataclass(frozen=True)
class Phases:
    """Rest before and after the work; all that is drawn because of the work lies within start and end."""

    start: float
    end: float
    before: tuple[float, float]
    after: tuple[float, float]

    def rest(self, series: Series) -> tuple[Series, Series]:
        return between(series, *self.before), between(series, *self.after)

    @property
    def seconds(self) -> float:
        return self.end - self.start


def can_check(counted: Series) -> bool:
    """Whether it stepped often enough for ``check`` to mean something."""
    return sum(a != b for (_, a), (_, b) in pairwise(counted)) >= 20


def check(drawn: Series, counted: Series, phases: Phases, settle_s: float, noise: float) -> float:
    """Charge by the counter over charge by ``current_now``; noise: standard error of the latter, relative.

    Raises:
        Unsupported: they disagree, or the counter is too coarse to tell.
    """
    edges = [(t1, q1) for (t0, q0), (t1, q1) in pairwise(counted) if q1 != q0]
    if not edges:
        raise Unsupported("the charge counter does not move in this recording: nothing checks current_now")
    (first, q_first), (last, q_last) = edges[0], edges[-1]
    step = tick(counted)
    charge = integral(drawn, first, last) / 3600 * 1e6 if last > first else 0.0
    if len(edges) < 2 or charge <= 0 or q_first <= q_last:
        raise Unsupported(
            f"the charge counter counts in steps of about {step:,} µAh: {len(edges)} in this recording, "
            "too few to check current_now; measure longer"
        )
    error = _edge_error(drawn, counted, (first, last), phases, settle_s) / charge
    if error > _STEPS_ERROR_MOST:
        raise Unsupported(
            f"the charge counter counts in steps of {step:,} µAh: it can check current_now "
            f"to {2 * error:.1%} only; measure longer"
        )
    ratio = (q_first - q_last) / charge
    chance = 2 * math.hypot(error, noise)
    if chance > _CHANCE_MOST:
        raise Unsupported(
            f"the load is too uneven for a gauge this slow: current_now is uncertain by {chance:.1%}; "
            "measure longer"
        )
    allowed = DISAGREE_MOST + chance
    if abs(ratio - 1) > allowed:
        raise Unsupported(
            f"the charge counter and current_now disagree: the counter has {ratio:.2f} times the charge"
        )
    return ratio


def _edge_error(
    drawn: Series, counted: Series, edges: tuple[float, float], phases: Phases, settle_s: float
) -> float:
    """µAh: when exactly the counter stepped is not known, nor what a slow gauge has yet to tell."""
    pause = max((b - a for (a, _), (b, _) in pairwise(counted)), default=1.0)
    squares = 0.0
    for edge in edges:
        amperes = at(drawn, edge)
        squares += (amperes * pause) ** 2 / 12
        if phases.start < edge < phases.end:
            squares += (amperes * settle_s / 3) ** 2
    return math.sqrt(squares) / 3600 * 1e6


def energy(counted: Series, voltage: Series, phases: Phases, rest_w: float) -> tuple[float, float]:
    """J by the counter between start and end, and its standard error.

    From a step of the counter in the rest before to one in the rest after, less that rest: when exactly
    it stepped is not known, yet matters little at rest.
    """
    steps = [(t1, q1) for (_, q0), (t1, q1) in pairwise(counted) if q1 != q0]
    first = max((t for t, _ in steps if phases.before[0] <= t <= phases.start), default=None)
    last = min((t for t, _ in steps if phases.end <= t <= phases.after[1]), default=None)
    if first is None or last is None:
        return 0.0, math.inf
    inside = between(counted, first, last)
    total = sum(
        (q0 - q1) * at(voltage, (t0 + t1) / 2) * J_PER_UAH_V for (t0, q0), (t1, q1) in pairwise(inside)
    )
    # How old what is told may be: as old as the shortest pause between changes of anything in it.
    changes = [t1 for (_, v0), (t1, v1) in pairwise(voltage) if v1 != v0]
    late = max(
        min(t1 - t0 for times in ([t for t, _ in steps], changes) for t0, t1 in pairwise(times)),
        max(t1 - t0 for (t0, _), (t1, _) in pairwise(inside)),
    )
    return total - rest_w * (last - first - phases.seconds), rest_w * late / math.sqrt(6)

"""Series over time out of a record: their means, integrals and scatter. Times in s, see Sample.at."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Sequence
from itertools import pairwise

from device_agents.recording.record import Sample

Series = tuple[tuple[float, float], ...]
"""(time, value), times strictly increasing."""

# Of the samples, that many must have what is looked for.
_ENOUGH = 0.5
# Outside of it other rules hold: a gauge near empty or full corrects itself.
_LEVELS = (10.0, 95.0)


class Unsupported(Exception):
    """No number can be given; the message is the reason."""


def at(series: Series, time: float) -> float:
    """Linear between two values, constant beyond the first and the last."""
    index = bisect_left(series, (time, -math.inf))
    if index == 0:
        return series[0][1]
    if index == len(series):
        return series[-1][1]
    (t0, v0), (t1, v1) = series[index - 1], series[index]
    return v0 + (v1 - v0) * (time - t0) / (t1 - t0)


def between(series: Series, start: float, end: float) -> Series:
    return tuple(point for point in series if start <= point[0] <= end)


def integral(series: Series, start: float, end: float) -> float:
    """Trapezoids, with interpolated values at both ends."""
    inner = tuple(p for p in series if start < p[0] < end)
    points = ((start, at(series, start)), *inner, (end, at(series, end)))
    return sum((t1 - t0) * (v0 + v1) / 2 for (t0, v0), (t1, v1) in pairwise(points))


def mean(series: Series) -> float:
    return sum(value for _, value in series) / len(series)


def scatter(series: Series) -> float:
    """The standard error of the mean of what changes from value to value; a slow drift is no scatter.

    A value told twice is one value: a gauge that is read faster than it looks tells nothing new.
    """
    told = [series[0][1], *(b for (_, a), (_, b) in pairwise(series) if a != b)]
    if len(told) < 3:
        return 0.0
    variance = sum((a - b) ** 2 for a, b in pairwise(told)) / (2 * (len(told) - 1))
    return math.sqrt(variance / len(told))


def check_state(samples: Sequence[Sample]) -> None:
    """Raises Unsupported when the battery is not to be believed, or does not alone feed the phone."""
    gauges = [sample.gauge for sample in samples]
    if any(gauge.stopped for gauge in gauges):
        raise Unsupported(
            "`dumpsys battery` prints UPDATES STOPPED: what it tells is old; run `dumpsys battery reset`"
        )
    if any(sample.input_suspended for sample in samples):
        raise Unsupported(
            "power.battery_input.suspended is set: whether a charger feeds the phone is not "
            "known; set it to false"
        )
    if any(gauge.plugged for gauge in gauges):
        raise Unsupported("plugged in: the fuel gauge tells the charger's current less the phone's")
    if any(gauge.charging for gauge in gauges):
        raise Unsupported("charging: the fuel gauge tells the charger's current less the phone's")
    if sum(gauge.plugged is False for gauge in gauges) < _ENOUGH * len(gauges):
        raise Unsupported("whether it is plugged in cannot be read")
    levels = [gauge.percent for gauge in gauges if gauge.percent is not None]
    if levels and not (_LEVELS[0] <= min(levels) and max(levels) <= _LEVELS[1]):
        raise Unsupported(f"the battery is at {levels[0]:.0f} %; a gauge is believed from 10 to 95 %")


def volts(samples: Sequence[Sample]) -> Series:
    found = tuple((s.at, s.gauge.voltage_v) for s in samples if s.gauge.voltage_v is not None)
    return _enough(found, samples, "the battery's voltage cannot be read")


def currents(samples: Sequence[Sample]) -> Series:
    """As told: the model's own unit and sign."""
    found = tuple((s.at, float(s.gauge.current)) for s in samples if s.gauge.current is not None)
    return _enough(found, samples, "current_now cannot be read, or says that it is unknown")


def counters(samples: Sequence[Sample]) -> Series:
    """µAh."""
    return tuple((s.at, float(s.gauge.counter_uah)) for s in samples if s.gauge.counter_uah is not None)


def tick(series: Series) -> int:
    """The step in which a counter counts: the greatest common divisor of its steps; 0: it stands still."""
    return math.gcd(*(int(b - a) for (_, a), (_, b) in pairwise(series)))


def rails(samples: Sequence[Sample]) -> Series | None:
    """J of all rails together; None where there are none. Raises Unsupported when one runs backwards."""
    names = set(samples[0].rails)
    have = [s for s in samples if names and set(s.rails) == names]
    if len(have) < _ENOUGH * len(samples):
        return None
    for before, after in pairwise(have):
        for name in names:
            if after.rails[name][1] < before.rails[name][1]:
                raise Unsupported(f"the rail {name} counts backwards: its meter was reset in between")
    return tuple((s.at, sum(energy for _, energy in s.rails.values()) / 1e6) for s in have)


def _enough(found: Series, samples: Sequence[Sample], otherwise: str) -> Series:
    if len(found) < max(3, _ENOUGH * len(samples)):
        raise Unsupported(otherwise)
    return found

"""What one model's gauge means: found by keeping every core busy and looking at what moves.

Android documents microamperes, negative while discharging (BatteryManager.BATTERY_PROPERTY_CURRENT_NOW);
vendors tell milliamperes, or the other sign, or both. A result is data, and holds for a model and a build.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

from device_agents.energy import counter
from device_agents.energy.counter import Phases
from device_agents.energy.series import (
    Series,
    Unsupported,
    at,
    between,
    check_state,
    counters,
    currents,
    mean,
    rails,
    scatter,
    tick,
    volts,
)
from device_agents.recording.record import Plan, Record

CALIBRATION_PLAN = Plan(max_s=140, burn_after_s=45, burn_s=60)
# What all cores of a phone take more than a phone at rest, W. Outside of it a unit was mistaken.
_BURN_W = (0.3, 40.0)
_IDLE_MOST_W = 8.0
SETTLE_MOST_S = 20.0
_SETTLED = 0.95


@dataclass(frozen=True)
class Calibration:
    """Of one model and build.

    amperes: of one unit of ``current_now`` drawn from the battery, with its sign; 0 when rails are used.
    settle_s: how long after a change of load the meter tells it. tick_uah: the counter's step, 0: it
    stands still. idle_w, burn_w: at rest, and with every core busy.
    """

    model: str
    build: str
    meter: Literal["rails", "gauge"]
    amperes: float
    settle_s: float
    idle_w: float
    burn_w: float
    tick_uah: int = 0


def calibrate(record: Record, model: str, build: str) -> Calibration:
    """From a recording by CALIBRATION_PLAN of a phone that did nothing else.

    Raises:
        Unsupported: neither meter follows the load as power does, or the gauge and the charge counter
            disagree over the burn, which is steadier than any work.
    """
    samples = record.samples
    burning = [sample.at for sample in samples if sample.burning]
    if len(burning) < 20 or burning[0] - samples[0].at < 20:
        raise Unsupported("the calibration's recording is too short; was the device taken away?")
    metered = rails(samples)
    if metered is not None:
        power: Series = tuple((t1, (e1 - e0) / (t1 - t0)) for (t0, e0), (t1, e1) in pairwise(metered))
        idle, burn, settle = _steps(power, burning)
        if _BURN_W[0] <= burn - idle <= _BURN_W[1]:
            return Calibration(model, build, "rails", 0.0, settle, idle, burn)
    check_state(samples)
    told, voltage = currents(samples), volts(samples)
    idle, burn, settle = _steps(told, burning)
    steady = (between(told, 0, burning[0] - 1), _plateau(told, burning))
    if abs(burn - idle) <= 6 * (scatter(steady[0]) + scatter(steady[1])):
        raise Unsupported("current_now does not move when every core is kept busy")
    amperes = unit_and_sign(idle, burn, at(voltage, burning[-1]))
    if settle > SETTLE_MOST_S:
        raise Unsupported(
            f"current_now follows the load only after {settle:.0f} s; sought {SETTLE_MOST_S:.0f} s at most"
        )
    idle_w = idle * amperes * mean(between(voltage, 0, burning[0]))
    burn_w = burn * amperes * at(voltage, burning[-1])
    if not 0 < idle_w <= _IDLE_MOST_W:
        raise Unsupported(f"at rest the gauge tells {idle_w:.2f} W: it is charged, or current_now is off")
    drawn = tuple((time, value * amperes) for time, value in told)
    if counter.can_check(counters(samples)):
        start, end = burning[0], burning[-1] + 2 * settle
        phases = Phases(start, end, (samples[0].at, start), (end, samples[-1].at))
        counter.check(drawn, counters(samples), phases, settle, scatter(steady[1]) / abs(burn))
    return Calibration(model, build, "gauge", amperes, settle, idle_w, burn_w, tick(counters(samples)))


def unit_and_sign(idle: float, burn: float, voltage_v: float) -> float:
    """Amperes drawn from the battery by one unit of ``current_now``.

    The two units are a factor of 1000 apart, so at most one of them makes the step a plausible one.

    Raises:
        Unsupported: none does.
    """
    for ampere in (1e-6, 1e-3):
        if _BURN_W[0] <= abs(burn - idle) * ampere * voltage_v <= _BURN_W[1]:
            return ampere if burn > idle else -ampere
    raise Unsupported(
        f"current_now moves by {abs(burn - idle):g} when every core is kept busy: "
        "plausible neither in microamperes nor in milliamperes"
    )


def _plateau(series: Series, burning: list[float]) -> Series:
    return between(series, burning[-1] - (burning[-1] - burning[0]) / 3, burning[-1])


def _steps(series: Series, burning: list[float]) -> tuple[float, float, float]:
    """At rest, burning, and the seconds that the step back to rest takes to be told.

    Of that step and not of the one before: at rest nothing competes for the cores.
    """
    idle = mean(between(series, burning[0] - 20, burning[0] - 1))
    burn = mean(_plateau(series, burning))
    still_told = (1 - _SETTLED) * abs(burn - idle)
    after = [point for point in series if point[0] > burning[-1]]
    if not after:
        raise Unsupported("the calibration's recording ends with the burn; was the device taken away?")
    for time, value in after:
        if abs(value - idle) <= still_told:
            return idle, burn, time - burning[-1] + 1.0
    return idle, burn, after[-1][0] - burning[-1]

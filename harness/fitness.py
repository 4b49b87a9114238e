"""When a device is fit to start: thresholds of heat and charge, with hysteresis, and how long one waits.

The release gate's are in gate.toml (harness.gate.settings), those of checks and measurements in farm.toml
(harness.inventory); who waits is harness.entry.
"""

from __future__ import annotations

from dataclasses import dataclass

UNTIL_FIT = "until it is fit"  # how such a wait is called in a run's timeline


@dataclass(frozen=True)
class Thresholds:
    """Temperatures of the battery in °C, charge in %, times in s. The thermal status must be 0.

    battery_c, resume_c: fit at or below the first; once it was above, only at or below the second.
    charge_low, charge_resume: fit at or above the first; once it was below, only at or above both.
    charge_high: at most. wait_s: for one start. wait_total_s: for all starts of one device.
    """

    battery_c: float = 35.0
    resume_c: float = 33.0
    charge_low: float = 30.0
    charge_resume: float = 32.0
    charge_high: float = 80.0
    wait_s: float = 60.0
    wait_total_s: float = 600.0


@dataclass(frozen=True)
class WorkThresholds(Thresholds):
    """Before checks and measurements: an ordinary phone, full and on USB, starts at once; a hot or empty one
    gets the time that it takes to cool down or to charge."""

    battery_c: float = 40.0
    resume_c: float = 37.0
    charge_low: float = 15.0
    charge_resume: float = 20.0
    charge_high: float = 100.0
    wait_s: float = 900.0
    wait_total_s: float = 3600.0


def wrong(entry: Thresholds) -> list[str]:
    """What is out of range, in words; of the table ``entry`` of either file."""
    found = []
    if not entry.resume_c <= entry.battery_c or not entry.charge_low < entry.charge_high:
        found.append("entry: sought resume_c <= battery_c and charge_low < charge_high")
    if entry.charge_resume > entry.charge_high:
        found.append("entry: sought charge_resume <= charge_high")
    if min(entry.wait_s, entry.wait_total_s) < 0:
        found.append("entry: sought wait_s and wait_total_s of at least 0")
    return found

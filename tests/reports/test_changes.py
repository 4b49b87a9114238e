"""Change points: what is found, what is not, and how often it is wrong."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import pytest

from reports.changes import MAGNITUDE, NIGHTS, changes

QUIET = np.exp(np.random.default_rng(3).normal(0, 0.01, 60)) * 25.0
SD = 0.02  # of a night, as a share: the reference's noise
SERIES = 400
LENGTH = 90


def stepped(at: int, by: float, values: Sequence[float] = tuple(QUIET)) -> list[float]:
    return [value * (1 + by) ** (index >= at) for index, value in enumerate(values)]


def noise(ar: float, seed: int, series: int = SERIES) -> npt.NDArray[np.float64]:
    """series x LENGTH nights around 25 ms, no change, AR(1) with stationary SD ``SD``."""
    random = np.random.default_rng(seed)
    shocks = random.normal(0, SD * math.sqrt(1 - ar**2), (series, LENGTH))
    logs = np.empty_like(shocks)
    logs[:, 0] = random.normal(0, SD, series)
    for night in range(1, LENGTH):
        logs[:, night] = ar * logs[:, night - 1] + shocks[:, night]
    return 25.0 * np.exp(logs)


@pytest.mark.parametrize("by", [0.08, 0.5, -0.08])
def test_a_lasting_step_is_found_on_its_night(by: float) -> None:
    (found,) = changes(stepped(40, by))
    assert found.index == 40
    assert found.ratio == pytest.approx(by, abs=0.015)


def test_two_nights_at_a_new_level_are_enough_and_one_is_not() -> None:
    step = stepped(58, 0.2)
    assert [change.index for change in changes(step)] == [58]
    assert changes(step[:-1]) == ()


def test_one_bad_night_is_no_change() -> None:
    values = list(QUIET)
    values[30] *= 1.6
    assert changes(values) == ()


def test_a_step_below_the_magnitude_is_left_to_the_gate() -> None:
    assert changes(stepped(30, MAGNITUDE - 0.02)) == ()


def test_there_and_back_is_two_changes() -> None:
    values = [value * (1.15 if 20 <= night < 40 else 1.0) for night, value in enumerate(QUIET)]
    up, down = changes(values)
    assert (up.index, down.index) == (20, 40)
    assert up.ratio > 0 > down.ratio


def test_numbers_that_do_not_scatter_step_too() -> None:
    (found,) = changes([100.0] * 10 + [120.0] * 10)
    assert found.index == 10
    assert (found.before, found.after) == pytest.approx((100, 120))


def test_few_nights_say_nothing() -> None:
    assert changes(stepped(4, 0.5)[: NIGHTS - 1]) == ()


@pytest.mark.parametrize("bad", [0.0, -1.0, math.nan, math.inf])
def test_what_has_no_ratio_is_refused(bad: float) -> None:
    with pytest.raises(ValueError, match="positive finite"):
        changes([1.0, bad])


@pytest.mark.parametrize(("ar", "most"), [(0.0, 0.01), (0.6, 0.03)])
def test_false_alarms_over_ninety_quiet_nights_are_rare(ar: float, most: float) -> None:
    """The rates in reports.changes' docstring: 0.0 % and 1.3 %."""
    alarmed = sum(bool(changes(row)) for row in noise(ar, seed=1))
    assert alarmed / SERIES <= most


@pytest.mark.parametrize(("ar", "most"), [(0.0, 0.02), (0.6, 0.2)])
def test_looking_every_night_does_not_raise_the_alarm_without_end(ar: float, most: float) -> None:
    """Ninety looks at each of 200 series: 0.0 % and 15 %."""
    series = noise(ar, seed=5, series=200)
    alarmed = sum(any(changes(row[:night]) for night in range(NIGHTS, LENGTH + 1)) for row in series)
    assert alarmed / len(series) <= most


def test_a_step_of_eight_percent_is_seen_within_ten_nights() -> None:
    series = noise(0.0, seed=2, series=200)
    series[:, 40:] *= 1.08
    seen = sum(any(abs(change.index - 40) <= 3 for change in changes(row[:50])) for row in series)
    assert seen / len(series) >= 0.95

"""When a device may start: how long it is waited for, what it is waited for, and that hysteresis holds."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from device_agents.api import Vitals
from harness import entry
from harness.entry import Entry
from harness.fitness import WorkThresholds
from harness.gate.settings import EntrySettings


class Clock:
    """Time that only passes when somebody pauses."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def pause(self, seconds: float) -> None:
        self.now += seconds


def waiting(
    vitals: Vitals | Callable[[float], Vitals], clock: Clock, busy: bool = False, **settings: float
) -> Entry:
    """vitals: always the same, or by the time."""

    def read() -> Vitals:
        return vitals if isinstance(vitals, Vitals) else vitals(clock.now)

    rules = EntrySettings(**settings)
    busy_cores = rules.busy_cores if busy else None
    return Entry(read, rules, busy_cores=busy_cores, pause=clock.pause, clock=clock)


def test_a_fit_device_starts_at_once() -> None:
    clock = Clock()
    fit = Vitals(at=0, thermal_status=0, temperatures_c={"battery": 30.0}, battery_percent=60.0)
    assert waiting(fit, clock).wait() == entry.Waited()
    assert clock.now == 0


@pytest.mark.parametrize(
    ("vitals", "told"),
    [
        (Vitals(at=0, thermal_status=2), "thermal status is 2"),
        (Vitals(at=0, temperatures_c={"battery": 36.0}), "the battery has 36.0 °C, over 33.0 °C"),
        (Vitals(at=0, battery_percent=20.0), "the battery is at 20 %, outside 32 to 80 %"),
        (Vitals(at=0, battery_percent=95.0), "the battery is at 95 %"),
    ],
)
def test_waiting_is_bounded_and_flagged(vitals: Vitals, told: str) -> None:
    clock = Clock()
    found = waiting(vitals, clock, wait_s=20.0).wait()
    assert told in found.given_up
    assert found.seconds == pytest.approx(20.0)


def test_all_waiting_of_a_device_is_bounded_too() -> None:
    clock = Clock()
    entrance = waiting(Vitals(at=0, thermal_status=1), clock, wait_s=20.0, wait_total_s=50.0)
    assert [round(entrance.wait().seconds) for _ in range(4)] == [20, 20, 10, 0]


def test_rests_after_void_blocks_double_and_count_as_waiting() -> None:
    """10, 20 and what is left of 50 s; the next leg tells how much later it came."""
    clock = Clock()
    entrance, rested = waiting(Vitals(at=0), clock, wait_total_s=50.0), []
    assert entrance.rest_s(0) == 0
    for void in (1, 2, 3, 4):
        rested.append(entrance.rest_s(void))
        entrance.rest(rested[-1])
    assert rested == [10, 20, 20, 0]
    assert (clock.now, entrance.total_s) == (50, 50)
    assert entrance.wait() == entry.Waited(50)
    assert entrance.wait() == entry.Waited()


def test_without_patience_it_is_only_told() -> None:
    clock = Clock()
    found = waiting(Vitals(at=0, thermal_status=1), clock).wait(patient=False)
    assert (clock.now, found.given_up) == (0, "thermal status is 1, not 0")


def test_a_battery_that_was_hot_must_cool_further() -> None:
    """34 °C would do, had it not been at 36 °C before; it waits for 33 °C."""
    clock = Clock()
    entrance = waiting(lambda now: Vitals(at=now, temperatures_c={"battery": 36.0 - now / 10}), clock)
    found = entrance.wait()
    assert found.given_up == ""
    assert clock.now == pytest.approx(30.0)
    calm = waiting(Vitals(at=0, temperatures_c={"battery": 34.0}), Clock())
    assert calm.wait().seconds == 0


def test_a_battery_that_was_low_must_charge_further() -> None:
    """31 % would do, had it not been at 29 % before; it waits for 32 %."""
    clock = Clock()
    entrance = waiting(lambda now: Vitals(at=now, battery_percent=29.0 + now / 10), clock)
    assert entrance.wait() == entry.Waited(30.0, "", "the battery is at 29 %, outside 30 to 80 %")
    calm = waiting(Vitals(at=0, battery_percent=31.0), Clock())
    assert calm.wait().seconds == 0


@pytest.mark.parametrize(("cores", "fit"), [(0.1, True), (0.5, False)])
def test_a_host_is_fit_while_nobody_else_uses_it(cores: float, fit: bool) -> None:
    clock = Clock()
    entrance = waiting(lambda now: Vitals(at=now, busy_s=100 + cores * now), clock, busy=True, wait_s=5.0)
    found = entrance.wait()
    assert (found.given_up == "") == fit
    if not fit:
        assert "other processes use 0.50 cores" in found.given_up


def test_a_host_that_does_not_tell_is_not_waited_for() -> None:
    assert waiting(Vitals(at=0), Clock(), busy=True).wait() == entry.Waited()


@pytest.mark.parametrize(
    ("percent", "celsius", "starts"),
    [(100.0, 33.0, True), (16.0, 39.0, True), (14.0, 30.0, False), (100.0, 41.0, False)],
)
def test_for_its_checks_an_ordinary_phone_on_usb_starts_at_once(
    percent: float, celsius: float, starts: bool
) -> None:
    vitals = Vitals(at=0, thermal_status=0, temperatures_c={"battery": celsius}, battery_percent=percent)
    assert (Entry(lambda: vitals, WorkThresholds()).unfit() == "") == starts

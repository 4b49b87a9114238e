"""Blocks: their order, what cancels in them, what makes them void; and when a leg may start."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import replace

import pytest

from device_agents.api import Vitals
from harness.gate import blocks, entry
from harness.gate.blocks import POSITIONS, Track
from harness.gate.entry import Entry
from harness.gate.metrics import METRICS, block_datum, tails
from harness.gate.settings import EntrySettings
from reports.gate_results import Place
from reports.results import LegResult, SampleInfo
from tests.harness.test_store import a_leg

TRACK = Track("phone", "gate", "p8+n4")


def leg(position: int, order: str, itl_ms: float, **changes: object) -> LegResult:
    place = Place("gate", "p8+n4", 0, position, blocks.arm_at(order, position))
    made = replace(a_leg(), samples=(SampleInfo(10 * itl_ms, (itl_ms,) * 3),), place=place)
    return replace(made, **changes)  # type: ignore[arg-type]


def block(order: str, *itl_ms: float) -> dict[int, LegResult]:
    """Canary, four legs, canary."""
    return {p: leg(p, order, ms) for p, ms in zip(POSITIONS, (1.0, *itl_ms, 1.0), strict=True)}


def test_orders_are_drawn_evenly_and_the_same_again() -> None:
    drawn = [blocks.order(1, TRACK, index) for index in range(400)]
    assert drawn == [blocks.order(1, TRACK, index) for index in range(400)]
    assert 160 < Counter(drawn)["ABBA"] < 240
    assert drawn != [blocks.order(2, TRACK, index) for index in range(400)]


@pytest.mark.parametrize("order", ["ABBA", "BAAB"])
def test_a_drift_from_leg_to_leg_cancels(order: str) -> None:
    warming = [10 * math.exp(0.02 * i) for i in range(4)]
    found = blocks.read(TRACK, 0, order, block(order, *warming))
    assert found.reasons == ()
    assert found.data["decode"] == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize(("order", "itl"), [("ABBA", (10, 11, 11, 10)), ("BAAB", (11, 10, 10, 11))])
def test_a_slower_candidate_is_positive_in_either_order(order: str, itl: tuple[float, ...]) -> None:
    found = blocks.read(TRACK, 0, order, block(order, *itl))
    assert found.data["decode"] == pytest.approx(math.log(1.1))
    assert found.data["ttft"] == pytest.approx(math.log(1.1))


@pytest.mark.parametrize("drift", [0.031, -0.031])
def test_a_canary_that_moved_voids_the_block(drift: float) -> None:
    legs = block("ABBA", 10, 10, 10, 10)
    legs[4] = leg(4, "ABBA", 1 + drift)
    (reason,) = blocks.read(TRACK, 0, "ABBA", legs).reasons
    assert "canary moved" in reason


def test_a_leg_that_is_not_valid_voids_the_block() -> None:
    legs = block("ABBA", 10, 10, 10, 10)
    legs[2] = replace(legs[2], validity="NOISY", reasons=("load average was 9.0 before the leg",))
    assert blocks.read(TRACK, 0, "ABBA", legs).reasons == ("leg 3: load average was 9.0 before the leg",)


def test_a_block_without_all_its_legs_is_void() -> None:
    legs = block("ABBA", 10, 10, 10, 10)
    del legs[3]
    found = blocks.read(TRACK, 0, "ABBA", legs)
    assert found.reasons == ("1 of 6 legs are missing",)
    assert found.data == {}


def test_a_datum_needs_the_value_in_every_leg() -> None:
    energy = METRICS["energy"]
    assert block_datum(energy, [a_leg()], [a_leg()]) is None


def test_tails_are_told_only_with_enough_samples() -> None:
    few = replace(a_leg(), samples=(SampleInfo(1.0, tuple(map(float, range(1, 64)))),))
    more = replace(a_leg(), samples=(SampleInfo(1.0, tuple(map(float, range(1, 663)))),))
    decode = METRICS["decode"]
    assert [tail.value is not None for tail in tails(decode, "baseline", [few])] == [True, False, False]
    assert [tail.value is not None for tail in tails(decode, "baseline", [more])] == [True, True, True]
    assert tails(decode, "baseline", [few])[2].needed == 662


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

    return Entry(read, EntrySettings(**settings), busy=busy, pause=clock.pause, clock=clock)


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
        (Vitals(at=0, battery_percent=20.0), "the battery is at 20 %, outside 30 to 80 %"),
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

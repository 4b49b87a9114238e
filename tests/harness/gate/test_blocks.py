"""Blocks: their order, what cancels in them, what makes them void."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace

import pytest

from harness.gate import blocks
from harness.gate.blocks import POSITIONS, Track
from harness.gate.metrics import METRICS, block_datum, tails
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

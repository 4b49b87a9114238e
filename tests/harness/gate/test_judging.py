"""The rule of one cell, and of many units of one model."""

from __future__ import annotations

import math

import pytest

from harness.gate.judging import Judged, judge_cells, judge_units, worst
from reports.gate_results import GateVerdict

LEVEL = 0.01 / 3


def judged(values: list[float], margin: float = 0.03, needed: int = 8) -> Judged:
    return judge_cells({"c": values}, {"c": margin}, [["c"]], {"c": needed}, LEVEL)["c"]


def around(mean: float, spread: float = 0.002, count: int = 8) -> list[float]:
    return [math.log1p(mean) + spread * (-1) ** i for i in range(count)]


@pytest.mark.parametrize(
    ("values", "verdict"),
    [
        (around(0.0), "PASS"),
        (around(-0.2), "PASS"),
        (around(0.02), "PASS"),  # worse for certain, and within the margin for certain
        (around(0.05), "REGRESSED"),
        (around(0.03), "REGRESSED"),
        (around(0.029), "INCONCLUSIVE"),
        (around(0.0, spread=0.1), "INCONCLUSIVE"),
        (around(0.05, spread=0.1), "INCONCLUSIVE"),
        (around(0.0)[:7], "INVALID"),
        ([], "INVALID"),
    ],
)
def test_the_rule(values: list[float], verdict: GateVerdict) -> None:
    assert judged(values).verdict == verdict


def test_reasons_have_the_numbers_in_them() -> None:
    assert judged(around(0.05)).reason.startswith("worse by 5.0 %, by 4.7 % at the least (margin 3.0 %)")
    assert "blocks cannot tell it from the margin of 3.0 %" in judged(around(0.0, 0.1)).reason
    assert judged([]).reason == "0 of at least 8 blocks are valid"


def test_a_family_makes_it_harder_to_be_called_worse() -> None:
    data = {"bad": around(0.05, 0.04)} | {f"c{i}": around(0.0, 0.04) for i in range(11)}
    margins, needed = dict.fromkeys(data, 0.03), dict.fromkeys(data, 8)
    alone = judge_cells(data, margins, [], needed, LEVEL)["bad"]
    together = judge_cells(data, margins, [list(data)], needed, LEVEL)["bad"]
    assert alone.p is not None
    assert together.p == pytest.approx(12 * alone.p)


def one(verdict: GateVerdict) -> Judged:
    return Judged(verdict, "as it was", 8)


UNITS = [f"u{i}" for i in range(6)]
GOOD = dict.fromkeys(UNITS, one("PASS"))


def test_units_that_agree_are_judged_by_their_mean() -> None:
    for verdict, mean in (("PASS", -0.01), ("REGRESSED", 0.05)):
        pooled = one(verdict)  # type: ignore[arg-type]
        assert judge_units(pooled, dict.fromkeys(UNITS, mean), GOOD) == pooled


def test_a_loss_that_most_units_do_not_share_is_device_specific() -> None:
    means = dict(zip(UNITS, (0.5, 0.4, 0.3, -0.01, -0.01, -0.01), strict=True))
    found = judge_units(one("REGRESSED"), means, GOOD)
    assert (found.verdict, found.reason) == ("INCONCLUSIVE", "device-specific: only 50 % of units are worse")


def test_one_unit_that_regressed_is_not_outvoted() -> None:
    units = {**GOOD, "u3": one("REGRESSED")}
    found = judge_units(one("PASS"), dict.fromkeys(UNITS, -0.01), units)
    assert found.verdict == "INCONCLUSIVE"
    assert "device-specific: u3 regressed" in found.reason


def test_a_unit_that_was_not_measured_is_not_forgotten() -> None:
    units = {**GOOD, "u3": one("INVALID")}
    found = judge_units(one("PASS"), dict.fromkeys(UNITS, -0.01), units)
    assert (found.verdict, found.reason) == ("INVALID", "not measured on u3")
    few = judge_units(one("PASS"), dict.fromkeys(UNITS[:5], -0.01), GOOD)
    assert (few.verdict, few.reason) == ("INVALID", "5 of at least 6 units were measured")


def test_the_worst_verdict_decides() -> None:
    assert worst(["PASS", "INCONCLUSIVE", "INVALID"]) == "INVALID"
    assert worst(["PASS", "INVALID", "REGRESSED"]) == "REGRESSED"
    assert worst(["PASS", "PASS"]) == "PASS"
    assert worst([]) == "INVALID"

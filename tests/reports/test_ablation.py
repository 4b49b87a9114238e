"""What an ablation comes to: figures, gains, and the seed's table beside them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from reports.ablation import ablations, headline, percent
from reports.ablation_page import html, waterfalls
from reports.ablation_results import AblationInfo, AblationStep
from reports.results import EnergyInfo, LegResult, RunResults, SampleInfo
from tests.reports.parsed import Page
from tests.reports.sample import HOST, MIB, device, leg, run

NAIVE = AblationStep("naive", "Naive", "as it comes", "naive,weights=int4")
LOGITS = AblationStep("logits", "Last-position logits", "one row", "static,weights=int4")
FULL = AblationStep("threads", "Threads", "fast cores", "hybrid-int8kv,weights=int4")
PLAIN = AblationStep("weights", "int4 weights", "float32 against int4", "hybrid-int8kv,weights=float32")
INFO = AblationInfo((NAIVE, LOGITS, FULL), PLAIN, "int4", 600 * MIB, 0.302, rounds=2, planned=8)
UNKNOWN = EnergyInfo(reason="host is a host: no battery")


def one(step: AblationStep, ttft: float, itl: float, mib: float | None = None, **changes: Any) -> LegResult:
    """A leg; with ``mib`` it was weighed, and asked for energy."""
    fields: dict[str, Any] = {
        "samples": (SampleInfo(ttft, (itl,) * 10),),
        "peak_rss_bytes": int((mib or 9999) * MIB),
        "memory_pass": mib is not None,
        "energy": UNKNOWN if mib else EnergyInfo(),
        "provenance": {"tokens": "same"},
    }
    return leg(HOST, step.recipe, **{**fields, **changes})


LEGS = (
    one(NAIVE, 1000, 40, 2000),
    one(LOGITS, 600, 20, 1500),
    one(FULL, 400, 20, 1400),
    one(PLAIN, 800, 100, 4200),
    one(PLAIN, 800, 100),
    one(FULL, 420, 16),
    one(LOGITS, 640, 20),
    one(NAIVE, 1100, 40),
)


def results(legs: tuple[LegResult, ...] = LEGS, **changes: Any) -> RunResults:
    return run(**{"legs": legs, "planned_legs": 8, "checks": (), "ablation": INFO, **changes})


def test_a_figure_is_the_median_over_legs_and_a_gain_against_the_step_before() -> None:
    (found,) = ablations(results())
    naive, logits, full = found.rows
    assert [row.figures[0].middle for row in found.rows] == [1050, 620, 410]
    assert naive.gains == (None, None, None, None)
    assert logits.gains[0] == pytest.approx(1 - 620 / 1050)
    assert logits.gains[1] == pytest.approx(1.0)  # 25 tok/s to 50
    assert full.gains[2] == pytest.approx(1 - 1400 / 1500)


def test_memory_is_of_legs_that_were_weighed() -> None:
    (found,) = ablations(results())
    assert [row.figures[2].values for row in found.rows] == [(2000,), (1500,), (1400,)]


def test_the_seeds_rows() -> None:
    ttft, rate, memory, energy = ablations(results())[0].seed
    assert (ttft.seed, rate.seed, memory.seed, energy.seed) == (
        "850 → 420 ms",
        "8.2 → 15.3 tok/s",
        "446 → 295 MB",
        "–",
    )
    assert [row.outcome for row in (ttft, rate, memory, energy)] == [
        "reached",
        "reached",
        "not reached",
        "unsupported",
    ]
    assert ttft.improvement == pytest.approx(1 - 410 / 1050)
    assert (ttft.low, ttft.high) == pytest.approx((1 - 400 / 1000, 1 - 420 / 1100))
    assert rate.improvement == pytest.approx(56.25 / 25 - 1)
    assert memory.improvement == pytest.approx(0.3)
    assert "600 MiB of int4 weights are resident" in memory.limit
    assert "Last-position logits +25.0 %" in memory.steps
    assert energy.why == "host is a host: no battery"


def test_rounds_are_compared_only_where_every_round_has_both() -> None:
    ttft, *_ = ablations(results(LEGS[:-1]))[0].seed
    assert ttft.improvement == pytest.approx(1 - 410 / 1000)
    assert (ttft.low, ttft.high) == (None, None)


def test_a_loss_is_told_as_one() -> None:
    slower = tuple(
        replace(each, samples=(SampleInfo(2000, (80.0,)),)) if each.recipe == FULL.recipe else each
        for each in LEGS
    )
    (found,) = ablations(results(slower))
    ttft, rate, *_ = found.seed
    assert (ttft.outcome, rate.outcome) == ("not reached", "not reached")
    assert "Lost by Threads" in ttft.steps
    assert "30% of a prompt token's multiply-adds" in ttft.limit
    assert "90.5 % worse (the seed: 50.6 % better)" in found.sentence


def test_an_invalid_leg_is_no_figure_and_a_noisy_one_is_said_to_be() -> None:
    broken = replace(LEGS[0], validity="INVALID", samples=(SampleInfo(1.0, (1.0,)),))
    noisy = replace(LEGS[1], validity="NOISY", reasons=("busy",))
    found = ablations(results((broken, noisy, *LEGS[2:])))
    assert found[0].rows[0].figures[0].values == (1100.0,)
    row = found[0].rows[1]
    assert row.valid == 1
    assert row.reasons == ("busy",)
    said = headline(results((broken, noisy, *LEGS[2:])), found)
    assert said.state == "incomplete"
    assert "2 of 8 legs are not VALID: their figures decide nothing." in said.remarks


def test_tokens_are_compared_with_the_naive_ones() -> None:
    other = tuple(
        replace(each, provenance={"tokens": "other"}) if each.recipe == FULL.recipe else each for each in LEGS
    )
    assert [row.same_tokens for row in ablations(results(other))[0].rows] == [True, True, False]


def test_quantised_weights_stand_apart() -> None:
    (found,) = ablations(results())
    assert found.unquantised is not None
    assert len(found.rows) == 3
    assert found.quantised[1] == pytest.approx(56.25 / 10 - 1)
    (without,) = ablations(results(ablation=replace(INFO, unquantised=None)))
    assert without.unquantised is None
    assert without.quantised == (None,) * 4


def test_green_only_when_all_is_reached_valid_and_there() -> None:
    light = tuple(
        replace(each, peak_rss_bytes=1000 * MIB) if each.recipe == FULL.recipe else each for each in LEGS
    )
    green = results(light)
    assert headline(green, ablations(green)).state == "passed"
    assert headline(green, ablations(green)).headline == "3 of 3 of the seed's improvements are reached"
    for worse in (
        results(LEGS),
        results(light[:-1]),
        results((replace(light[0], validity="NOISY"), *light[1:])),
    ):
        assert headline(worse, ablations(worse)).state == "incomplete"


def test_a_step_without_legs_is_not_measured() -> None:
    legs = tuple(each for each in LEGS if each.recipe != FULL.recipe)
    (found,) = ablations(results(legs))
    assert [row.outcome for row in found.seed[:3]] == ["not measured"] * 3
    assert found.rows[-1].figures[0].middle is None
    assert waterfalls(found, "a0") == ()


def test_percent() -> None:
    assert (percent(0.506), percent(-0.1), percent(None)) == ("+50.6 %", "−10.0 %", "–")


def test_a_run_that_is_no_ablation_has_none() -> None:
    with pytest.raises(ValueError, match="is no ablation"):
        ablations(run())


def test_a_waterfall_goes_from_the_naive_step_to_the_full_engine() -> None:
    (found,) = ablations(results())
    charts = {chart.key: chart for chart in waterfalls(found, "a0")}
    assert set(charts) == {"a0-ttft", "a0-rate", "a0-memory"}
    spec = charts["a0-ttft"].spec
    bars = next(iter(spec["datasets"].values())) if "datasets" in spec else spec["data"]["values"]
    assert [(bar["step"], bar["from"], bar["to"], bar["change"]) for bar in bars] == [
        ("Naive", 0, 1050, "whole"),
        ("Last-position logits", 1050, 620, "better"),
        ("Threads", 620, 410, "better"),
        ("Full engine", 0, 410, "whole"),
    ]
    assert "Full engine: 410  +61.0 %" in charts["a0-ttft"].text


def test_the_page_holds_the_table_and_nothing_a_name_could_break() -> None:
    attack = "</script><img src=x onerror=alert(1)>"
    legs = tuple(replace(each, device=attack) for each in LEGS)
    source = html(results(legs, devices=(device(attack, simulated=attack),)))
    page = Page(source)
    assert page.one("h1").words == "2 of 3 of the seed's improvements are reached"
    assert len(page.all("figure")) == 3
    assert not page.all("img")
    assert "850 → 420 ms" in source
    assert "default-src 'none'" in page.all("meta")[1].attributes["content"]

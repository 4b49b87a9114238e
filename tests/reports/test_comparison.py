"""Two runs side by side: what is compared, what it says, and that it is no verdict."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from reports.comparison import FEWEST, Ratio, compare, interval
from reports.comparison_page import headline, html, render
from reports.results import EnergyInfo, LegResult, RunResults
from tests.reports.parsed import Page
from tests.reports.sample import (
    AFTER,
    BEFORE,
    CHECKS,
    HOST,
    PHONE,
    check,
    device,
    failed_check,
    leg,
    run,
    sample_run,
    samples,
)
from tests.reports.test_page import ATTACK, attacked


def measured(itl_ms: float = 25.0, seed: int = 1, repeats: int = 8, **changes: Any) -> LegResult:
    return leg(samples=samples(745.0, itl_ms, repeats=repeats, seed=seed), **changes)


def of(run_a: RunResults, run_b: RunResults, metric: str) -> Ratio:
    (found,) = (ratio for ratio in compare(run_a, run_b).ratios if ratio.measure.key == metric)
    return found


def test_a_clear_step_is_named_with_its_interval() -> None:
    found = of(run(legs=(measured(),)), run(legs=(measured(27.5, seed=2),)), "itl")
    assert (found.word, found.over, found.counts) == ("worse", "repeats", (8, 8))
    assert found.low is not None
    assert found.high is not None
    assert 0.05 < found.low < 0.10 < found.high < 0.15
    assert of(run(legs=(measured(27.5, seed=2),)), run(legs=(measured(),)), "itl").word == "better"


def test_the_same_again_is_no_clear_change() -> None:
    again = of(run(legs=(measured(),)), run(legs=(measured(seed=3),)), "itl")
    assert again.word == "alike"


def test_legs_are_the_replicates_where_there_are_enough() -> None:
    legs = tuple(measured(25.0 + n / 10, seed=n) for n in range(FEWEST))
    found = of(run(legs=legs), run(legs=legs), "itl")
    assert (found.over, found.counts) == ("legs", (FEWEST, FEWEST))


def test_too_few_repeats_give_a_ratio_and_no_interval() -> None:
    few = run(legs=(measured(repeats=3),))
    found = of(few, few, "ttft")
    assert (found.word, found.low, found.change) == ("too few", None, 0.0)


def test_bytes_of_the_cache_are_compared_exactly() -> None:
    first = run(legs=(measured(kv_bytes=1000),))
    assert of(first, first, "kv").word == "equal"
    assert of(first, run(legs=(measured(kv_bytes=1001),)), "kv").word == "worse"


def test_energy_is_compared_only_where_both_have_it() -> None:
    known = EnergyInfo("rails", "", 0.2, 0.3)
    with_energy, without = run(legs=(measured(energy=known),)), run(legs=(measured(),))
    assert of(with_energy, with_energy, "energy").a == pytest.approx(0.2)
    assert "energy" not in {ratio.measure.key for ratio in compare(with_energy, without).ratios}


def test_only_valid_legs_are_compared_and_the_rest_is_told() -> None:
    noisy = run(legs=(measured(validity="NOISY"),))
    found = compare(run(legs=(measured(),)), noisy)
    assert found.ratios == ()
    (told,) = found.one_sided
    assert told.side == "A"
    assert "NOISY: load average" in told.why


def test_checks_that_turned_red_come_before_those_that_turned_green() -> None:
    names = list(CHECKS)
    before = run(
        checks=(check(name=names[0]), failed_check(HOST, AFTER, name=names[1]), check(name=names[2]))
    )
    after = run(checks=(failed_check(HOST, AFTER, name=names[0]), check(name=names[1]), check(name=names[2])))
    found = compare(before, after)
    assert [(t.check, t.before, t.after) for t in found.turned] == [
        (names[0], "passed", "failed"),
        (names[1], "failed", "passed"),
    ]
    assert found.checks == 3
    assert "1 check fails that did not fail before" in headline(found).lower()


def test_what_one_side_lacks_is_told() -> None:
    more = run(
        devices=(device(HOST), device(PHONE)),
        checks=(check(), check(recipe=BEFORE), check(PHONE)),
        legs=(measured(), measured(recipe=BEFORE)),
    )
    less = run(checks=(check(),), legs=(measured(),))
    told = {(each.side, each.what) for each in compare(less, more).one_sided}
    assert told == {
        ("B", f"device {PHONE}"),
        ("B", f"1 check of {BEFORE} on {HOST}"),
        ("B", f"measurement of {BEFORE} on {HOST}, gemma-3-1b-synth, prompt 128 + 64 new"),
    }


def test_a_simulated_device_says_so_wherever_it_is_named() -> None:
    phone = device(PHONE, "a virtual phone")
    before = run(devices=(phone,), checks=(check(PHONE),), legs=(measured(device=PHONE),))
    after = replace(before, checks=(failed_check(PHONE, AFTER, name="test_decode_equals_reference"),))
    page = Page(html(before, after))
    named = [e.words for tag in ("td", "th") for e in page.all(tag) if PHONE in e.words]
    assert len(named) > 3
    assert all("simulated" in words for words in named)
    told = compare(before, run()).one_sided
    assert told[0].what == f"device {PHONE} (simulated)"


def test_whatever_else_is_not_the_same_is_told() -> None:
    one = run(legs=(leg(provenance={"artifact": "9f2c"}),))
    other = run(
        provenance={**run().provenance, "commit": "deadbee"},
        devices=(device(HOST, build="6.2.0"),),
        legs=(leg(provenance={"artifact": "0000"}),),
    )
    assert compare(one, other).differs == (
        ("commit", "f61b6a9", "deadbee"),
        ("host: build", "6.1.0", "6.2.0"),
        (f"{AFTER}, gemma-3-1b-synth: artifact", "9f2c", "0000"),
    )
    assert compare(run(), run()).differs == ()


def test_the_interval_holds_the_truth_about_as_often_as_its_docstring_says() -> None:
    random = np.random.default_rng(11)
    pairs = [(np.exp(random.normal(0, 0.02, 8)), np.exp(random.normal(0, 0.02, 8))) for _ in range(200)]
    held = sum(low <= 0 <= high for low, high in (interval(a, b) for a, b in pairs))
    assert 0.84 <= held / len(pairs) <= 0.97


def test_numbers_that_do_not_scatter_have_an_interval_of_no_width() -> None:
    assert interval([2.0] * 5, [3.0] * 5) == pytest.approx((0.5, 0.5))


def test_the_page_says_that_it_is_no_verdict_and_how_to_get_one(tmp_path: Path) -> None:
    page = Page(render(sample_run(), run(), ("v1.4", "main"), tmp_path).read_text(encoding="utf-8"))
    verdict = page.one("section", class_="verdict").words
    assert "NO VERDICT" in verdict
    assert "not taken side by side" in verdict
    assert "kvfarm gate --baseline v1.4 --candidate main" in verdict
    assert "A did not finish" in verdict
    assert {e.attributes["scope"] for e in page.all("th")} <= {"col", "row"}
    assert len(page.all("caption")) == len(page.all("table"))


def test_nothing_that_a_device_says_becomes_markup() -> None:
    a = attacked(sample_run())
    page = Page(html(a, replace(a, run_id="other", provenance={"commit": ATTACK}), (ATTACK, "b")))
    assert not page.all("img")
    assert len(page.all("script")) == 1

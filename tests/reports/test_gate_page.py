"""The gate's page says what was found, in words, and nothing but PASS is green."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest

from reports import gate_view, svg
from reports.gate_page import html
from reports.gate_results import GateVerdict
from reports.results import RunResults
from tests.reports.gate_sample import (
    HOSTILE,
    calibration,
    gate_cell,
    gate_info,
    gate_legs,
    large_gate,
    sample_calibration,
    sample_gate,
)
from tests.reports.parsed import Page
from tests.reports.sample import run
from tests.reports.test_trend import noisy, series


@pytest.fixture(scope="module")
def page() -> Page:
    return Page(html(sample_gate()))


def of(verdict: GateVerdict, exit_code: int = 0) -> RunResults:
    return replace(
        run(legs=()),
        gate=gate_info(gate_cell("host", "ttft", verdict, 0.01), verdict=verdict, exit_code=exit_code),
    )


def test_the_verdict_comes_first_with_its_reason(page: Page) -> None:
    top = page.one("section", class_="verdict")
    assert top.classes == {"verdict", "failed"}
    assert "REGRESSED The candidate is worse than the baseline" in top.words
    assert "REGRESSED: host p128+n64 inter-token latency (made up as REGRESSED)" in top.words


def test_planned_against_measured_is_shown(page: Page) -> None:
    cells, every = page.all("div", class_="coverage")
    assert "1 REGRESSED" in cells.words
    assert "1 waived" in cells.words
    assert every.words == "All cells 7 planned 6 measured 1 not measured"


@pytest.mark.parametrize(
    ("verdict", "tone"),
    [("PASS", "passed"), ("REGRESSED", "failed"), ("INCONCLUSIVE", "incomplete"), ("INVALID", "incomplete")],
)
def test_nothing_but_pass_is_green(verdict: GateVerdict, tone: str) -> None:
    shown = Page(html(of(verdict)))
    assert tone in shown.one("section", class_="verdict").classes
    marked = shown.all("td", class_="verdict-cell")
    assert [("passed" in cell.classes) for cell in marked] == [verdict == "PASS"]


def test_a_waived_loss_is_not_green() -> None:
    waived = replace(gate_cell("host", "ttft", "REGRESSED", 0.06), waived="known")
    info = gate_info(waived, verdict="PASS", exit_code=0)
    found = gate_view.summary(info)
    assert (found.word, found.tone, found.headline) == (
        "PASS",
        "incomplete",
        "The candidate passes with 1 waived loss",
    )


def test_an_expired_waiver_is_the_headline_of_a_gate_that_passed() -> None:
    sample = sample_gate().gate
    assert sample is not None
    info = replace(
        gate_info(gate_cell("host", "ttft", "PASS", 0.0), verdict="PASS", exit_code=1), waivers=sample.waivers
    )
    found = gate_view.summary(info)
    assert (found.word, found.tone) == ("WAIVER EXPIRED", "failed")


def test_an_unfinished_gate_says_so() -> None:
    shown = Page(html(replace(of("PASS"), finished_at=None)))
    assert "UNFINISHED The gate did not finish" in shown.one("section", class_="verdict").words


def test_cells_come_worst_first_and_link_to_their_details(page: Page) -> None:
    links = {a.attributes["href"][1:] for a in page.all("a") if re.fullmatch(r"#c\d+", a.attributes["href"])}
    assert links == {d.attributes["id"] for d in page.all("details") if "id" in d.attributes}
    verdicts = [cell.words.split()[1] for cell in page.all("td", class_="verdict-cell")]
    assert verdicts[:4] == ["REGRESSED", "INVALID", "INCONCLUSIVE", "PASS"]


def test_every_chart_says_in_words_what_it_shows(page: Page) -> None:
    pictures = [picture for picture in page.all("svg") if "aria-hidden" not in picture.attributes]
    assert len(pictures) > 5
    assert all(p.attributes["aria-label"] and p.attributes["role"] == "img" for p in pictures)
    strips = page.all("svg", class_="strip")
    assert len(strips) == 1 + 6  # the axis, and every cell that is not exact


def test_a_row_says_what_its_strip_shows(page: Page) -> None:
    (row,) = [r for r in page.all("tr", class_="failed") if "Inter-token latency" in r.words]
    assert "25.5 ms 27.1 ms" in row.words
    assert "+6.2 % +5.2 to +7.2 % 3.0 % 8 (+1 void)" in row.words
    assert "✕ REGRESSED made up as REGRESSED" in row.words


def test_too_few_samples_show_no_tail(page: Page) -> None:
    assert "n too small n 500, needs 662" in page.one("section", id="details").words


def test_void_blocks_are_shown_with_their_reason(page: Page) -> None:
    (void,) = page.all("tr", class_="isvoid")
    assert void.words == "2 ABBA +1.0 % +0.2 % +4.1 % 12 s void the canary moved by +4.1 %, over 3.0 %"


def test_calibration_tells_rate_interval_and_rights(page: Page) -> None:
    words = page.one("section", id="calibration").words
    assert "Of 8 A/A verdicts in 2 runs, 0 called the same code REGRESSED: 0.00 %" in words
    assert "95 % interval 0.00 % to 36.9 %" in words
    assert "taken away blocks of the same code scatter by 6.0 %, over the margin of 3.0 %" in words
    assert "4.1 % · 3.4 %" in words


def test_a_gate_that_was_never_calibrated_says_so() -> None:
    assert gate_view.calibration_sentence(None).startswith("This gate was never calibrated")
    assert "not known" in gate_view.calibration_sentence(replace(calibration(), trials=0))


def test_waivers_are_shown_with_their_state(page: Page) -> None:
    words = page.one("section", id="waivers").words
    assert "mara longer prefill #123 2026-12-20 used" in words
    assert "old #1 2026-01-01 expired" in words


def test_simulated_devices_are_said_to_be(page: Page) -> None:
    assert "pixel-9 is simulated (virtual phone)" in page.one("section", class_="verdict").words


def test_what_devices_and_files_say_is_harmless(page: Page) -> None:
    assert page.all("img") == []
    assert HOSTILE in page.one("html").words
    assert HOSTILE in page.one("section", id="waivers").words


def test_what_a_token_costs_is_told_of_both_sides_and_nothing_that_was_not_measured(page: Page) -> None:
    rows = [row.words for row in page.all("tr") if row.words.startswith(("host · p128", "pixel-9 · p128"))]
    host, other = [row for row in rows if " candidate " in row]
    assert "of 31.0 GB/s" in host  # 620 MB x 39.8 tok/s / 31 GB/s
    assert " 80 % " in host
    assert "591 MiB a token, 19.1 MiB of them cache" in host
    assert "not measured" in other
    assert "GB/s" not in other


def test_speed_is_drawn_over_lengths_where_there_are_several(page: Page) -> None:
    titles = [c.words for c in page.all("figcaption") if "against" in c.words]
    assert titles == [
        "Time to first token against prompt length Median over legs; lower is better.",
        "Decode speed against context depth Tokens in the cache when decoding begins; higher is better.",
    ]
    (ttft,) = [p for p in page.all("svg") if "against prompt length" in p.attributes.get("aria-label", "")]
    assert (
        "on host. baseline: 128 tokens 744, 1,024 tokens 5,941; candidate:" in ttft.attributes["aria-label"]
    )
    one_length = Page(html(replace(sample_gate(), legs=gate_legs("host"))))
    assert not one_length.all("section", id="speed")


def test_correctness_is_told_with_the_mutation_score(page: Page) -> None:
    words = page.one("section", id="correctness").words
    assert "host hybrid,threads=2 19 of 19 11 % 24 Nov 2026, 01:00 UTC, this commit" in words
    assert "18 of 19 Rewinds" in words
    assert "never checked" in words
    assert "2 of 2 known KV-cache bugs" in words
    top = page.one("section", class_="verdict").words
    assert "Checks of the candidate that did not pass: 1 of 19 on pixel-9" in top
    assert f"never checked against the reference on {HOSTILE}" in top


def test_flaky_and_quarantined_are_told(page: Page) -> None:
    words = page.one("section", id="flaky").words
    assert "pixel-9 simulated quarantined 3 lost in a row" in words
    assert f"2 measured RunnerDied: {HOSTILE}" in words


def test_the_trend_is_on_the_page_and_decides_nothing() -> None:
    steps = [series(*noisy(20), *noisy(4, 29.0), tags={3: ("v1",)})]
    results = of("PASS")
    assert "None yet" in Page(html(results)).one("section", id="trend").words
    shown = Page(html(results, steps))
    assert "1 cell got worse" in shown.one("section", id="trend").words
    assert "It informs and never blocks" in shown.one("section", id="trend").words
    assert (
        shown.one("section", class_="verdict").words
        == Page(html(results)).one("section", class_="verdict").words
    )


def test_a_calibration_has_a_page_too() -> None:
    shown = Page(html(sample_calibration()))
    assert "The gate finds no difference where there is none" in shown.one("section", class_="verdict").words
    assert "+5 % · p128+n64" in shown.one("section", id="cells").words


def test_a_large_farm_stays_small_enough() -> None:
    assert len(html(large_gate()).encode()) < 1_500_000


@pytest.mark.parametrize(
    ("low", "high", "found"),
    [(0, 10, [0, 2, 4, 6, 8, 10]), (-5.2, 5.2, [-5, 0, 5]), (3, 3, [3])],
)
def test_ticks_are_round_numbers(low: float, high: float, found: list[float]) -> None:
    assert svg.ticks(low, high, 4 if low < 0 else 5) == found

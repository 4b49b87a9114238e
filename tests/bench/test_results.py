"""What the rounds say: medians over quiet rounds, ratios by round, verdicts, table and JSON."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from bench.contestants import Run
from bench.results import Bench, Spread, Standing, Target, agreement, ceiling_text, json_line, table_text

FIRST = Target("first token", "ttft_ms", "ours", "theirs", at_most=0.7)
RATE = Target("rate", "tokens_per_second", "ours", "theirs", at_least=1.1)
INFORMATION = Target("only shown", "tokens_per_second", "ours", "theirs")


def _run(ttft: float, gap: float, elsewhere: float = 0.0) -> Run:
    return Run(ttft, (gap,) * 4, (1, 2, 3, 4, 5), elsewhere)


def _standing(name: str, *runs: Run, correlation: float = 0.9) -> Standing:
    return Standing(name, 32, 500_000_000, 60.0, 1500.0, 2_000_000_000, correlation, True, runs)


def _bench(ours: list[Run], theirs: list[Run], wanted: int = 3, **more: Any) -> Bench:
    standings = (_standing("ours", *ours, **more), _standing("theirs", *theirs))
    settings = {"threads": 2, "prompt": 8, "new_tokens": 5}
    return Bench({"cpus": 2}, settings, 30e9, standings, (1,) * len(ours), (FIRST, RATE, INFORMATION), wanted)


@pytest.fixture
def bench() -> Bench:
    ours = [_run(600, 20), _run(660, 25), _run(620, 20), _run(9000, 400, elsewhere=0.5)]
    theirs = [_run(1000, 25), _run(1000, 25), _run(1000, 30), _run(1000, 25)]
    return _bench(ours, theirs)


def test_tokens_per_second_leave_the_prompt_out() -> None:
    assert Run(1000.0, (20.0, 30.0), (1, 2, 3), 0.0).tokens_per_second == pytest.approx(40.0)


def test_spread_is_median_and_extremes() -> None:
    assert Spread.of([3.0, 1.0, 2.0, 10.0]) == Spread(2.5, 1.0, 10.0)
    with pytest.raises(ValueError, match="at least one"):
        Spread.of([])


def test_a_round_disturbed_for_one_engine_counts_for_none(bench: Bench) -> None:
    assert bench.quiet_rounds == [0, 1, 2]
    assert bench.ratios(FIRST) == pytest.approx([0.6, 0.66, 0.62])
    assert bench.ratios(RATE) == pytest.approx([1.25, 1.0, 1.5])


def test_the_median_ratio_decides_a_target(bench: Bench) -> None:
    assert (bench.met(FIRST), bench.met(RATE), bench.met(INFORMATION)) == (True, True, True)
    slow = _bench([_run(710, 25)] * 3, [_run(1000, 25)] * 3)
    assert (slow.met(FIRST), slow.met(RATE)) == (False, False)


@pytest.mark.parametrize(
    ("target", "edge", "beyond"), [(FIRST, 0.7, 0.7001), (RATE, 1.1, 1.0999)], ids=["at most", "at least"]
)
def test_a_bound_itself_is_met(target: Target, edge: float, beyond: float) -> None:
    assert target.met(edge)
    assert not target.met(beyond)


def test_too_few_quiet_rounds_decide_nothing() -> None:
    noisy = _bench([_run(600, 20), _run(600, 20, 0.3)], [_run(1000, 25)] * 2, wanted=2)
    assert not noisy.valid
    assert noisy.met(FIRST) is None
    assert "too noisy to say" in table_text(noisy)
    assert "NOISY: 1 of 2 quiet rounds" in table_text(noisy)
    assert len(noisy.ratios(FIRST)) == 2


def test_the_table_has_every_round_and_marks_the_disturbed_one(bench: Bench) -> None:
    lines = table_text(bench).splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("start round"))
    assert lines[start + 1].split() == ["1", "1", "600", "50.0", "1000", "40.0"]
    assert lines[start + 4].split() == ["1", "4", "*", "9000", "2.5", "1000", "40.0"]


def test_the_table_gives_medians_spread_share_of_the_ceiling_and_verdicts(bench: Bench) -> None:
    text = table_text(bench)
    assert "620 (600 to 660)" in text
    assert "50.0 (40.0 to 50.0)" in text
    assert "83%" in text  # 50 of 60 tokens/s
    assert "0.620 (0.600 to 0.660)   sought at most 0.70: met" in text
    assert "NOISY" not in text


def test_the_ceiling_names_bandwidth_bytes_and_rate() -> None:
    text = ceiling_text(30e9, 2, {"ours": 600_000_000})
    assert "30.0 GB/s by 2 threads" in text
    assert "50.0 tokens/s, at 600.0 MB" in text


def test_the_json_is_one_line_with_every_round_and_ratio(bench: Bench) -> None:
    line = json_line(bench)
    assert "\n" not in line
    found = json.loads(line)
    assert found["valid"] is True
    assert found["quiet_rounds"] == [1, 2, 3]
    ours = found["engines"][0]
    assert len(ours["rounds"]) == 4
    assert ours["rounds"][3]["elsewhere"] == 0.5
    assert ours["ttft_ms"] == {"median": 620, "low": 600, "high": 660}
    assert ours["itl_ms"]["p50"] == pytest.approx(20.0)
    ratio = found["ratios"][0]
    assert (ratio["at_most"], ratio["at_least"], ratio["met"]) == (0.7, None, True)
    assert ratio["rounds"] == pytest.approx([0.6, 0.66, 0.62])


def test_what_is_not_a_number_is_null_in_json() -> None:
    bench = _bench([_run(600, 20)] * 3, [_run(1000, 25)] * 3, correlation=float("nan"))
    assert json.loads(json_line(bench))["engines"][0]["correlation"] is None


def test_agreement_is_correlation_and_same_token() -> None:
    reference = np.array([0.0, 1.0, 3.0, 2.0], np.float32)
    for logits, correlation, same in ((2 * reference + 1, 1.0, True), (-reference, -1.0, False)):
        found, top1 = agreement(logits, reference)
        assert found == pytest.approx(correlation)
        assert top1 is same

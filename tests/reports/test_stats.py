"""The statistics, against values worked out by hand."""

from __future__ import annotations

import math

import pytest

from reports.results import SampleInfo
from reports.stats import cues, decode_rate, latency, leg_stats, samples_needed
from tests.reports.sample import leg


def test_quantiles_interpolate_linearly() -> None:
    found = latency(float(v) for v in range(1, 1002))  # 1..1001: quantile q is 1 + 1000 q
    assert (found.low, found.median, found.p95, found.p99, found.high) == pytest.approx(
        (1, 501, 951, 991, 1001)
    )
    assert found.n == 1001


def test_quantiles_between_two_samples() -> None:
    found = latency(float(v) for v in range(1, 141))  # quantile q is 1 + 139 q
    assert (found.median, found.p95) == pytest.approx((70.5, 133.05))


@pytest.mark.parametrize(
    ("n", "p95", "p99"), [(129, False, False), (130, True, False), (661, True, False), (662, True, True)]
)
def test_a_tail_needs_samples_beyond_it(n: int, p95: bool, p99: bool) -> None:
    found = latency([1.0] * n)
    assert (found.p95 is not None, found.p99 is not None) == (p95, p99)


def test_the_floors_are_those_of_mlperf_loadgen() -> None:
    assert [samples_needed(q) for q in (0.9, 0.95, 0.99)] == [64, 130, 662]


def test_no_sample_has_no_quantile() -> None:
    found = latency([])
    assert (found.low, found.median, found.p95, found.p99, found.high) == (None,) * 5


def test_times_that_are_not_finite_are_left_out() -> None:
    assert latency([1.0, math.nan, math.inf, 3.0]).samples == (1.0, 3.0)


def test_decode_rate_is_gaps_over_their_sum() -> None:
    repeats = [SampleInfo(900.0, (20.0, 30.0)), SampleInfo(900.0, (50.0,))]
    assert decode_rate(repeats) == pytest.approx(1000 * 3 / 100)


def test_decode_rate_without_a_gap_is_unknown() -> None:
    assert decode_rate([SampleInfo(5.0, ())]) is None


def test_legs_of_one_cell_are_pooled() -> None:
    first = leg(samples=(SampleInfo(10.0, (1.0, 2.0)),), load_ms=100.0, peak_rss_bytes=5, kv_bytes=3)
    second = leg(samples=(SampleInfo(20.0, (3.0,)),), load_ms=300.0, peak_rss_bytes=7, kv_bytes=3)
    found = leg_stats([first, second])
    assert (found.legs, found.repeats, found.load_ms) == (2, 2, 200.0)
    assert found.ttft.samples == (10.0, 20.0)
    assert found.itl.samples == (1.0, 2.0, 3.0)
    assert (found.peak_rss_bytes, found.kv_bytes) == (7, 3)


def test_best_and_worst() -> None:
    assert cues([3.0, 1.0, 2.0]) == ["worst", "best", ""]
    assert cues([3.0, 1.0, 2.0], higher_is_better=True) == ["best", "worst", ""]


def test_values_within_five_percent_are_not_told_apart() -> None:
    assert cues([100.0, 95.1]) == ["", ""]
    assert cues([100.0, 95.0]) == ["worst", "best"]


def test_what_may_not_be_compared_is_neither_best_nor_worst() -> None:
    assert cues([None, 1.0, 2.0]) == ["", "best", "worst"]
    assert cues([None, 1.0]) == ["", ""]

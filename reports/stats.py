"""The statistics that the report shows, each defined once.

Quantiles are ``numpy.quantile(..., method="linear")``: Hyndman and Fan (1996) type 7, the default
of numpy, R and spreadsheets. A quantile q is given only from so many samples that two or more
beyond it are seen with 99 % confidence, MLPerf LoadGen's floor for early stopping: 64 samples for
p90, 130 for p95, 662 for p99.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np

from reports.ceiling import NOT_MEASURED, Share, share
from reports.results import BandwidthInfo, LegResult, SampleInfo

SMALLEST_CUE = 0.05  # best and worst closer than this are not told apart: repeat runs differ by as much


@dataclass(frozen=True)
class Latency:
    """A set of times in ms. p95 and p99 are None where ``samples`` are too few for them."""

    samples: tuple[float, ...]
    low: float | None
    median: float | None
    p95: float | None
    p99: float | None
    high: float | None

    @property
    def n(self) -> int:
        return len(self.samples)


@cache
def samples_needed(q: float) -> int:
    """The smallest n with P(at most one of n samples lies beyond quantile ``q``) <= 1 %."""

    def unlucky(n: int) -> float:
        return q**n + n * (1 - q) * q ** (n - 1)

    return next(n for n in itertools.count(1) if unlucky(n) <= 0.01)


def quantile(samples: Sequence[float], q: float) -> float | None:
    """Quantile ``q`` by linear interpolation, None for no samples."""
    return float(np.quantile(np.asarray(samples), q, method="linear")) if samples else None


def latency(times: Iterable[float]) -> Latency:
    """Quantiles of ``times`` in ms; times that are not finite are left out."""
    samples = tuple(t for t in times if math.isfinite(t))

    def tail(q: float) -> float | None:
        return quantile(samples, q) if len(samples) >= samples_needed(q) else None

    return Latency(
        samples=samples,
        low=quantile(samples, 0.0),
        median=quantile(samples, 0.5),
        p95=tail(0.95),
        p99=tail(0.99),
        high=quantile(samples, 1.0),
    )


def decode_rate(repeats: Iterable[SampleInfo]) -> float | None:
    """Decode speed in tokens/s: (n - 1) / sum(inter-token latency), pooled over ``repeats``.

    The first of n tokens belongs to the time to first token, so n tokens have n - 1 gaps.
    None if there is no gap.
    """
    gaps = [gap for repeat in repeats for gap in repeat.itl_ms if math.isfinite(gap)]
    total = sum(gaps)
    return 1000 * len(gaps) / total if total > 0 else None


@dataclass(frozen=True)
class LegStats:
    """All legs of one device, recipe, model and workload, pooled.

    Times in ms. load_ms: median over legs. peak_rss_bytes, kv_bytes: the largest leg.
    """

    legs: int
    repeats: int
    load_ms: float | None
    ttft: Latency
    itl: Latency
    tokens_per_s: float | None
    peak_rss_bytes: int
    kv_bytes: int
    energy_j: float | None = None  # net of idle, for each token; median over legs that have it
    ceiling: Share = NOT_MEASURED


def leg_stats(legs: Sequence[LegResult], bandwidth: BandwidthInfo | None = None) -> LegStats:
    """Pools ``legs`` (at least one). bandwidth: of their device."""
    repeats = [sample for leg in legs for sample in leg.samples]
    rate = decode_rate(repeats)
    return LegStats(
        legs=len(legs),
        repeats=len(repeats),
        load_ms=latency(leg.load_ms for leg in legs).median,
        ttft=latency(sample.ttft_ms for sample in repeats),
        itl=latency(gap for sample in repeats for gap in sample.itl_ms),
        tokens_per_s=rate,
        peak_rss_bytes=max(leg.peak_rss_bytes for leg in legs),
        kv_bytes=max(leg.kv_bytes for leg in legs),
        energy_j=latency(
            leg.energy.net_j_per_token for leg in legs if leg.energy.net_j_per_token is not None
        ).median,
        ceiling=share(legs[0].reads, rate, bandwidth),
    )


def cues(values: Sequence[float | None], higher_is_better: bool = False) -> list[str]:
    """ "best", "worst" or "" for each value; all "" unless the extremes differ by SMALLEST_CUE.

    None stands for a value that may not be compared.
    """
    known = [v for v in values if v is not None and math.isfinite(v)]
    if len(known) < 2 or max(known) <= 0 or (max(known) - min(known)) / max(known) < SMALLEST_CUE:
        return ["" for _ in values]
    best, worst = (max(known), min(known)) if higher_is_better else (min(known), max(known))
    return ["best" if v == best else "worst" if v == worst else "" for v in values]

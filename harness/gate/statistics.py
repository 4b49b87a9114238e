"""The gate's statistics: block ratios in, bounds and p-values out. numpy and scipy, nothing of ours.

A block datum is log(candidate / baseline), oriented so that positive is worse. Blocks, not
iterations, are the replicates (Kalibera and Jones 2013). The cap of three looks shares one alpha
by Bonferroni: a sum of three errors of alpha/3 is at most alpha, whatever their dependence.

All functions work on the last axis, so that a simulation judges thousands of gates at once.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import stats

Array = npt.NDArray[np.float64]

ALPHA = 0.01  # of a wrong PASS, and of a wrong REGRESSED, over all looks together
LOOKS = (8, 16, 32)  # valid blocks
MOST_EXACT_SIGNS = 20  # 2^20 sign patterns are enumerated; beyond that they are drawn
MIN_UNITS = 6  # of one model, for an analysis over devices


@dataclass(frozen=True)
class Interval:
    """Mean and one-sided bounds of block data (log ratios), each at the same level."""

    mean: Array
    low: Array
    high: Array
    sd: Array


def interval(data: Any, alpha: float) -> Interval:
    """Student's t bounds of ``data`` [..., n] with n >= 2: each holds with probability 1 - alpha."""
    values = np.asarray(data, dtype=np.float64)
    count = values.shape[-1]
    mean = values.mean(axis=-1)
    sd = values.std(axis=-1, ddof=1)
    half = stats.t.ppf(1 - alpha, count - 1) * sd / math.sqrt(count)
    return Interval(mean, mean - half, mean + half, sd)


def p_worse(data: Any) -> Array:
    """One-sided p of "the mean is not above 0" for ``data`` [..., n]; data without spread is certain."""
    values = np.asarray(data, dtype=np.float64)
    count = values.shape[-1]
    mean, sd = values.mean(axis=-1), values.std(axis=-1, ddof=1)
    with np.errstate(divide="ignore", invalid="ignore"):
        t = np.where(sd > 0, mean / (sd / math.sqrt(count)), np.sign(mean) * np.inf)
    return np.where((sd == 0) & (mean == 0), 1.0, stats.t.sf(t, count - 1))


def holm(p: Any) -> Array:
    """Holm's step-down adjusted p-values of the family on the last axis (Holm 1979)."""
    values = np.asarray(p, dtype=np.float64)
    count = values.shape[-1]
    order = np.argsort(values, axis=-1)
    stepped = np.take_along_axis(values, order, axis=-1) * (count - np.arange(count))
    stepped = np.minimum(np.maximum.accumulate(stepped, axis=-1), 1.0)
    adjusted = np.empty_like(stepped)
    np.put_along_axis(adjusted, order, stepped, axis=-1)
    return adjusted


def sign_flip_p(data: Any, seed: int = 0, draws: int = 100_000) -> float:
    """One-sided p of ``data`` [n] if every block's sign were a coin's: exact up to MOST_EXACT_SIGNS blocks.

    The cross-check of the t-test: it needs no normal distribution, only symmetry. Its smallest value
    with 8 blocks is 1/256.
    """
    values = np.asarray(data, dtype=np.float64)
    count = len(values)
    if count <= MOST_EXACT_SIGNS:
        # Sums over all sign patterns, built up block by block.
        sums = np.zeros(1)
        for value in values:
            sums = np.concatenate([sums + value, sums - value])
        extra = 0
    else:
        rng = np.random.default_rng(seed)
        sums = rng.choice((-1.0, 1.0), (draws, count)) @ values
        extra = 1  # the observed pattern is one of them
    tolerance = 1e-12 * max(1.0, float(np.abs(values).sum()))
    return float((np.count_nonzero(sums >= values.sum() - tolerance) + extra) / (len(sums) + extra))


def look_alpha(alpha: float = ALPHA, looks: int = len(LOOKS)) -> float:
    """What each of ``looks`` looks may spend."""
    return alpha / looks


def detectable(sd: float, blocks: int, alpha: float, margin: float, power: float = 0.95) -> float:
    """The smallest true loss (a ratio - 1) that ``blocks`` call REGRESSED with ``power``, before Holm.

    Both must hold: a lower bound above 0, which takes (t(1 - alpha) + t(power)) standard errors, and an
    estimate of at least ``margin`` (a log ratio), which takes t(power) above it. Normal approximation.
    """
    error = sd / math.sqrt(blocks)
    level, likely = (float(stats.t.ppf(q, blocks - 1)) for q in (1 - alpha, power))
    return math.expm1(max((level + likely) * error, margin + likely * error))


def proportion(count: int, trials: int, confidence: float = 0.95) -> tuple[float, float]:
    """Clopper and Pearson's exact interval of a share; (0, 1) where nothing was tried."""
    if trials == 0:
        return 0.0, 1.0
    found = stats.binomtest(count, trials).proportion_ci(confidence, method="exact")
    return float(found.low), float(found.high)

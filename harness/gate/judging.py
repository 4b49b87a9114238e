"""Block data to verdicts: PASS, REGRESSED, INCONCLUSIVE, INVALID.

PASS is non-inferiority: the burden lies with the release. REGRESSED needs a lower bound above 0
after Holm over all gating cells, and an estimate of at least the margin.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from harness.gate.statistics import MIN_UNITS, Array, holm, interval, p_worse, sign_flip_p
from reports.gate_results import GateVerdict
from reports.gate_view import percent

AGREEING = 2 / 3  # share of units that must have the sign of their mean, else it is no matter of the model
_WORST = ("REGRESSED", "INVALID", "INCONCLUSIVE", "PASS")


@dataclass(frozen=True)
class Judged:
    """One cell at one look. Ratios are candidate / baseline - 1, positive is worse.

    p: of "not worse", Holm-adjusted over the gating cells. low, high: bounds at the look's alpha.
    """

    verdict: GateVerdict
    reason: str
    blocks: int
    estimate: float | None = None
    low: float | None = None
    high: float | None = None
    sd: float | None = None  # of the block data, in log ratios
    p: float | None = None
    sign_flip: float | None = None


def decide(low: Array, high: Array, mean: Array, p: Array, margin: Array, alpha: float) -> Array:
    """The rule itself, for arrays of cells: 0 INCONCLUSIVE, 1 PASS, 2 REGRESSED.

    low, high, mean, margin: log ratios. p: adjusted. alpha: of this look.
    """
    regressed = (p <= alpha) & (low > 0) & (mean >= margin)
    return np.where(regressed, 2, np.where(high < margin, 1, 0))


def judge_cells(
    data: Mapping[str, Sequence[float]],
    margins: Mapping[str, float],
    families: Sequence[Sequence[str]],
    needed: Mapping[str, int],
    level: float,
) -> dict[str, Judged]:
    """Every cell at one look.

    data: block data of each cell. margins: the largest loss (a ratio - 1) that still passes.
    families: cells whose p-values are adjusted together; one in no family is judged alone.
    needed: values without which a cell is INVALID. level: alpha of this look.
    """
    p = {cell: float(p_worse(values)) for cell, values in data.items() if len(values) >= 2}
    for family in families:
        known = [cell for cell in family if cell in p]
        if known:
            p |= dict(zip(known, map(float, holm([p[cell] for cell in known])), strict=True))
    return {
        cell: _judge(values, margins[cell], p.get(cell, 1.0), needed[cell], level)
        for cell, values in data.items()
    }


def _judge(values: Sequence[float], margin: float, p: float, needed: int, alpha: float) -> Judged:
    blocks = len(values)
    if blocks < max(2, needed):
        return Judged("INVALID", f"{blocks} of at least {needed} blocks are valid", blocks)
    found = interval(values, alpha)
    limit = np.asarray(math.log1p(margin))
    code = int(decide(found.low, found.high, found.mean, np.asarray(p), limit, alpha))
    estimate, low, high = (math.expm1(float(x)) for x in (found.mean, found.low, found.high))
    verdict: GateVerdict = ("INCONCLUSIVE", "PASS", "REGRESSED")[code]
    reason = {
        "PASS": f"{percent(high)} at the most (margin {percent(margin, False)})",
        "REGRESSED": f"worse by {percent(estimate, False)}, by {percent(low, False)} at the least "
        f"(margin {percent(margin, False)})",
        "INCONCLUSIVE": f"between {percent(low)} and {percent(high)}: {blocks} blocks cannot tell it from "
        f"the margin of {percent(margin, False)}",
    }[verdict]
    return Judged(verdict, reason, blocks, estimate, low, high, float(found.sd), p, sign_flip_p(values))


def judge_units(pooled: Judged, means: Mapping[str, float], units: Mapping[str, Judged]) -> Judged:
    """The verdict over the units (devices) of one model, of which no single one may tell another story.

    pooled: a t-test on device means, df = k - 1. means: block datum of each unit that has one.
    units: each unit's own verdict.
    """
    if len(means) < MIN_UNITS:
        return replace(
            pooled, verdict="INVALID", reason=f"{len(means)} of at least {MIN_UNITS} units were measured"
        )
    lost = [name for name, judged in units.items() if judged.verdict == "INVALID"]
    worse = [name for name, judged in units.items() if judged.verdict == "REGRESSED"]
    share = sum(value > 0 for value in means.values()) / len(means)
    if pooled.verdict == "REGRESSED" and share < AGREEING:
        reason = f"device-specific: only {100 * share:.0f} % of units are worse"
        return replace(pooled, verdict="INCONCLUSIVE", reason=reason)
    if pooled.verdict == "PASS" and lost:
        return replace(pooled, verdict="INVALID", reason=f"not measured on {', '.join(lost)}")
    if pooled.verdict == "PASS" and worse:
        reason = f"device-specific: {', '.join(worse)} regressed, the others did not"
        return replace(pooled, verdict="INCONCLUSIVE", reason=reason)
    return pooled


def worst(verdicts: Sequence[GateVerdict]) -> GateVerdict:
    """The verdict that decides when all must pass; INVALID for none at all."""
    return min(verdicts, key=_WORST.index, default="INVALID")

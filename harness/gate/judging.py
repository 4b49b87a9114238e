"""Block data to verdicts: PASS, REGRESSED, INCONCLUSIVE, INVALID.

PASS is non-inferiority: the burden lies with the release. REGRESSED needs a lower bound above 0
after Holm over all gating cells, and an estimate of at least the margin.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from harness.gate.statistics import (
    ALPHA,
    LOOKS,
    MIN_UNITS,
    Array,
    holm,
    interval,
    look_alpha,
    p_worse,
    sign_flip_p,
)
from reports.gate_results import GateVerdict

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
    gating: Sequence[str],
    needed: int,
    alpha: float = ALPHA,
    looks: Sequence[int] = LOOKS,
) -> dict[str, Judged]:
    """Every cell at the look that wants ``needed`` valid blocks.

    data: block data of each cell. margins: the largest loss (a ratio - 1) that still passes.
    gating: cells that share Holm's family; the others are judged alone.
    """
    level = look_alpha(alpha, len(looks))
    raw = {cell: float(p_worse(values)) for cell, values in data.items() if len(values) >= 2}
    family = [cell for cell in gating if cell in raw]
    adjusted = dict(zip(family, map(float, holm([raw[c] for c in family])), strict=True)) if family else {}
    return {
        cell: _judge(values, margins[cell], adjusted.get(cell, raw.get(cell, 1.0)), needed, level)
        for cell, values in data.items()
    }


def _judge(values: Sequence[float], margin: float, p: float, needed: int, alpha: float) -> Judged:
    blocks = len(values)
    if blocks < max(2, needed):
        return Judged("INVALID", f"{blocks} of {needed} blocks are valid", blocks)
    found = interval(values, alpha)
    code = int(decide(found.low, found.high, found.mean, np.float64(p), np.float64(math.log1p(margin)), alpha))
    estimate, low, high = (math.expm1(float(x)) for x in (found.mean, found.low, found.high))
    verdict: GateVerdict = ("INCONCLUSIVE", "PASS", "REGRESSED")[code]  # type: ignore[assignment]
    reason = {
        "PASS": f"worse by less than {high:.1%} (margin {margin:.1%})",
        "REGRESSED": f"worse by {estimate:.1%}, at least {low:.1%} (margin {margin:.1%})",
        "INCONCLUSIVE": f"between {low:+.1%} and {high:+.1%}: {blocks} blocks cannot tell it from "
        f"the margin of {margin:.1%}",
    }[verdict]
    return Judged(
        verdict, reason, blocks, estimate, low, high, float(found.sd), p, sign_flip_p(values)
    )


def judge_units(
    means: Mapping[str, float],
    units: Mapping[str, Judged],
    margin: float,
    p: float,
    alpha: float,
) -> Judged:
    """One cell over the units (devices) of one model: t on device means, df = k - 1.

    means: mean block datum of each unit that has one. units: each unit's own verdict.
    p: Holm-adjusted p over the groups' family. At least MIN_UNITS units.
    """
    count = len(means)
    if count < MIN_UNITS:
        return Judged("INVALID", f"{count} of at least {MIN_UNITS} units were measured", count)
    found = _judge(list(means.values()), margin, p, MIN_UNITS, alpha)
    lost = [name for name, judged in units.items() if judged.verdict == "INVALID"]
    worse = [name for name, judged in units.items() if judged.verdict == "REGRESSED"]
    agreeing = sum(np.sign(value) == np.sign(found.estimate) for value in means.values()) / count
    if found.verdict == "REGRESSED" and agreeing < AGREEING:
        return _as(found, "INCONCLUSIVE", f"device-specific: only {agreeing:.0%} of units are worse")
    if found.verdict == "PASS" and worse:
        return _as(found, "INCONCLUSIVE", f"device-specific: {', '.join(worse)} regressed, the others did not")
    if found.verdict == "PASS" and lost:
        return _as(found, "INVALID", f"not measured on {', '.join(lost)}")
    return found


def _as(judged: Judged, verdict: GateVerdict, reason: str) -> Judged:
    return Judged(
        verdict,
        reason,
        judged.blocks,
        judged.estimate,
        judged.low,
        judged.high,
        judged.sd,
        judged.p,
        judged.sign_flip,
    )


def worst(verdicts: Sequence[GateVerdict]) -> GateVerdict:
    """The verdict that decides when all must pass; INVALID for none at all."""
    return min(verdicts, key=_WORST.index, default="INVALID")

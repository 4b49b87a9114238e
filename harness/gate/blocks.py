"""Blocks: which legs in which order, and what the four of them say once they are there."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from harness.gate.canary import MOST_DRIFT, drift, speed
from harness.gate.metrics import METRICS, block_datum
from reports.gate_results import Arm, BlockInfo
from reports.gate_view import percent
from reports.results import LegResult

ORDERS = ("ABBA", "BAAB")
CANARY_BEFORE, CANARY_AFTER = -1, 4
POSITIONS = (CANARY_BEFORE, 0, 1, 2, 3, CANARY_AFTER)
EXACT = [name for name, metric in METRICS.items() if metric.exact]


@dataclass(frozen=True)
class Track:
    """What is measured in a row of blocks: one comparison of one workload on one device."""

    device: str
    comparison: str
    workload: str  # its name


def order(seed: int, track: Track, index: int) -> str:
    """ABBA or BAAB, drawn anew for each block; the same again when a killed run goes on."""
    key = f"{seed}/{track.device}/{track.comparison}/{track.workload}/{index}"
    return random.Random(key).choice(ORDERS)


def arm_at(block_order: str, position: int) -> Arm:
    if position in (CANARY_BEFORE, CANARY_AFTER):
        return "canary"
    return "baseline" if block_order[position] == "A" else "candidate"


def read(
    track: Track, index: int, block_order: str, legs: Mapping[int, LegResult], failure: str = ""
) -> BlockInfo:
    """The block as it stands. legs: by position. failure: why it was broken off, "" if it was not.

    Only a block without a reason against it counts.
    """
    reasons = [failure] if failure else []
    if not failure and (missing := [p for p in POSITIONS if p not in legs]):
        reasons.append(f"{len(missing)} of {len(POSITIONS)} legs are missing")
    inner = {position: leg for position, leg in legs.items() if 0 <= position < 4}
    for position, leg in sorted(inner.items()):
        if leg.validity != "VALID":
            reasons += [f"leg {position + 1}: {reason}" for reason in leg.reasons]
    moved = _drift(legs)
    if moved is not None and abs(moved) > MOST_DRIFT:
        reasons.append(f"the canary moved by {percent(moved)}, over {percent(MOST_DRIFT, False)}")
    return BlockInfo(
        device=track.device,
        comparison=track.comparison,
        workload=track.workload,
        index=index,
        order=block_order,
        reasons=tuple(reasons),
        drift=moved,
        waited_s=sum(leg.place.waited_s for leg in legs.values() if leg.place),
        data={} if len(inner) < 4 else _data(inner),
    )


def _drift(legs: Mapping[int, LegResult]) -> float | None:
    if CANARY_BEFORE not in legs or CANARY_AFTER not in legs:
        return None
    before, after = (
        speed([gap for sample in legs[p].samples for gap in sample.itl_ms])
        for p in (CANARY_BEFORE, CANARY_AFTER)
    )
    return drift(before, after)


def _data(inner: Mapping[int, LegResult]) -> dict[str, float]:
    """Block datum by metric; exact metrics have none, nor has what is weighed."""
    arms: dict[Literal["baseline", "candidate"], list[LegResult]] = {"baseline": [], "candidate": []}
    for _, leg in sorted(inner.items()):
        if leg.place is not None and leg.place.arm != "canary":
            arms[leg.place.arm].append(leg)
    found = {
        name: block_datum(metric, arms["baseline"], arms["candidate"])
        for name, metric in METRICS.items()
        if not metric.exact and not metric.weighed
    }
    return {name: datum for name, datum in found.items() if datum is not None}

"""Peak memory in a pass of its own: a few fresh processes a side, each does one generation and ends.

What a process weighs is nearly the same every time: on a host +-0.5 MiB, since malloc works in huge pages
there. A pair of them is to memory what a block is to the other metrics, and costs a third of it: a look wants
as many pairs as blocks. Who comes first changes from pair to pair.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from harness.gate.metrics import METRICS, block_datum
from reports.gate_results import Arm
from reports.results import LegResult

MOST_TRIED = 2  # times as many pairs as are wanted; then memory is not measured
POSITIONS = (5, 6)  # of a pair's two legs, where a block's have -1 to 4
_SIDES: tuple[tuple[Arm, Arm], ...] = (("baseline", "candidate"), ("candidate", "baseline"))


def order(pair: int) -> tuple[Arm, Arm]:
    """Who is weighed first in this pair: the baseline in the first, for injected memory is a share of it."""
    return _SIDES[pair % 2]


def pairs(legs: Sequence[LegResult]) -> Iterator[tuple[LegResult, LegResult]]:
    """Complete pairs (baseline, candidate) of ``legs``, weighings; both sides VALID."""
    known: dict[int, dict[Arm, LegResult]] = {}
    for leg in legs:
        if leg.place is not None and leg.validity == "VALID":
            known.setdefault(leg.place.block, {})[leg.place.arm] = leg
    for _, sides in sorted(known.items()):
        if "baseline" in sides and "candidate" in sides:
            yield sides["baseline"], sides["candidate"]


def data(legs: Sequence[LegResult]) -> tuple[float, ...]:
    """log(candidate / baseline) of each pair: what a block is for other metrics."""
    found = (block_datum(METRICS["memory"], [old], [new]) for old, new in pairs(legs))
    return tuple(datum for datum in found if datum is not None)

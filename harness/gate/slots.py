"""The share of a night's measuring that goes to A/A: which tracks get how many blocks tonight.

A night has few A/A blocks for each track, so they add up over nights: so many in a row as the gate's first
look takes are one A/A verdict (see harness.gate.calibration).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from harness.gate.blocks import Track
from reports.gate_results import AA


def slots(
    tracks: Sequence[Track], first_look: int, share: float, taken: Mapping[tuple[str, str], int]
) -> tuple[tuple[Track, ...], int]:
    """The tracks whose turn it is, and A/A blocks for each of them; () and 0 where ``share`` is 0.

    tracks: of the gate that follows. share: of all blocks of a night whose gate ends at its first look, so
    that at least this share is A/A. taken: A/A blocks so far by (device, workload); who has fewest is first.
    """
    total = math.ceil(share / (1 - share) * len(tracks) * first_look - 1e-9)
    if not total:
        return (), 0
    order = sorted(tracks, key=lambda track: taken.get((track.device, track.workload), 0))
    chosen = order[: min(total, len(order))]
    each = math.ceil(total / len(chosen))
    return tuple(Track(t.device, AA, t.workload) for t in tracks if t in chosen), each

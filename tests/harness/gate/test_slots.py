"""A share of a night's blocks is A/A, and goes to whom it is due."""

from __future__ import annotations

import pytest

from harness.gate.blocks import Track
from harness.gate.slots import slots
from reports.gate_results import AA

TRACKS = [Track(device, AA, workload) for device in ("a", "b") for workload in ("p1", "p2")]


@pytest.mark.parametrize("share", [0.01, 0.1, 0.25, 0.5])
def test_at_least_the_share_is_a_a(share: float) -> None:
    chosen, each = slots(TRACKS, 8, share, {})
    blocks = len(chosen) * each
    assert blocks / (blocks + 8 * len(TRACKS)) >= share


def test_ten_per_cent_of_four_tracks_is_one_block_each() -> None:
    assert slots(TRACKS, 8, 0.1, {}) == (tuple(TRACKS), 1)


def test_half_of_all_is_as_many_as_the_gate_takes() -> None:
    assert slots(TRACKS, 8, 0.5, {}) == (tuple(TRACKS), 8)


def test_who_has_fewest_is_next() -> None:
    chosen, each = slots(TRACKS, 8, 0.03, {("a", "p1"): 5, ("b", "p2"): 1})
    assert (chosen, each) == ((TRACKS[1],), 1)


def test_no_share_is_no_slots() -> None:
    assert slots(TRACKS, 8, 0.0, {}) == ((), 0)

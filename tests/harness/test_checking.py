"""What a check says about itself: the tally behind its row in the report."""

from __future__ import annotations

import pytest

from harness.checking import Tally
from harness.tolerances import too_few


def test_the_worst_error_is_of_comparisons_that_were_held_to_a_limit() -> None:
    tally = Tally()
    tally.saw(0.9, None)
    assert (tally.worst_error, tally.limit) == (0.9, None)
    tally.saw(0.1, 0.5)
    assert (tally.worst_error, tally.limit) == (0.1, 0.5)
    tally.saw(0.8, None)
    tally.saw(0.2, 0.5)
    assert (tally.worst_error, tally.limit) == (0.2, 0.5)


def test_the_widest_limit_is_shown() -> None:
    tally = Tally()
    tally.saw(0.0, 0.0)
    assert tally.limit == 0.0
    tally.saw(1e-6, 1e-4)
    assert (tally.worst_error, tally.limit) == (1e-6, 1e-4)


@pytest.mark.parametrize(
    ("hits", "rows", "share", "wrong"),
    [
        (2, 3, 0.8, False),
        (20, 26, 0.8, False),  # int4 weights and an int8 cache on gemma-3-1b's geometry, once
        (14, 26, 0.8, True),
        (72, 100, 0.8, False),
        (69, 100, 0.8, True),
        (800, 1000, 0.8, False),
        (760, 1000, 0.8, True),
        (100, 100, 0.99, False),
        (95, 100, 0.99, True),
        (0, 3, 0.8, True),
        (7_000, 10_000, 0.8, True),
    ],
)
def test_a_share_is_too_small_only_if_chance_is_no_excuse(
    hits: int, rows: int, share: float, wrong: bool
) -> None:
    assert too_few(hits, rows, share) == wrong

"""What a check says about itself: the tally behind its row in the report."""

from __future__ import annotations

from harness.checking import Tally


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

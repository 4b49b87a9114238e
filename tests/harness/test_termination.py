"""What tells an interrupted check from a failed one."""

from __future__ import annotations

from harness.termination import is_behind


def test_an_interruption_is_found_behind_what_came_of_it() -> None:
    error = AssertionError("Hypothesis tidies up")
    error.__context__ = SystemExit(15)
    assert is_behind(error)
    assert not is_behind(AssertionError("a wrong engine"))


def test_errors_that_stand_behind_each_other_are_no_interruption() -> None:
    one, other = ValueError("one"), ValueError("other")
    one.__cause__, other.__context__ = other, one
    assert not is_behind(one)

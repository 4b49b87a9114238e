"""The built-in correctness suite: every test is one property of a right KV cache.

Each property draws programs, runs them whole on the device under test and compares. The
first docstring line is the property as the report shows it.
"""

from __future__ import annotations

import pytest

from harness import programs
from harness.checking import Cell
from kvengine.program import Prefill, Program


def test_every_decode_step_equals_the_reference(cell: Cell) -> None:
    """Every step equals the cacheless reference"""

    def check(program: Program) -> None:
        cell.check_reference(program, cell.run(program))

    cell.for_all(programs.any_sequence(cell.limits), check)


def test_any_chunking_equals_one_shot(cell: Cell) -> None:
    """Any chunking of a prompt equals one shot"""

    def check(program: Program) -> None:
        observations = cell.run(program)
        cell.check_same(program, observations[:2], observations[3:], "one shot", cell.tolerance.same)
        cell.check_reference(program, observations)

    cell.for_all(programs.chunked_twice(cell.limits), check)


@pytest.mark.hybrid_only
def test_hybrid_equals_static(cell: Cell) -> None:
    """Window-sized layers equal full-length layers"""

    def check(program: Program) -> None:
        hybrid, static = cell.run(program), cell.run(program, plan="static")
        # Greedy tokens may part at a tie and then so does what follows: compare fixed tokens only.
        cell.check_same(program, hybrid, static, "static cache", cell.tolerance.same)

    cell.for_all(programs.any_sequence(cell.limits, greedy=False), check)


def test_reset_hides_the_past(cell: Cell) -> None:
    """After a reset nothing of the past is left, to the last bit"""

    def check(pair: tuple[Program, Program]) -> None:
        whole, future = pair
        after_past = cell.run(whole)[-len(future.operations) :]
        cell.check_same(whole, after_past, cell.run(future), "same run without a past", 0.0)

    cell.for_all(programs.with_a_past(cell.limits), check)


def test_poisoned_unused_rows_never_matter(cell: Cell) -> None:
    """NaN in every unused cache row changes no bit"""

    def check(pair: tuple[Program, Program]) -> None:
        poisoned, clean = pair
        cell.check_same(poisoned, cell.run(poisoned)[1::2], cell.run(clean), "unpoisoned run", 0.0)

    cell.for_all(programs.poisoned(cell.limits), check)


def test_overflow_is_refused_and_changes_nothing(cell: Cell) -> None:
    """A request past the capacity is refused and the state stays intact"""

    def check(program: Program) -> None:
        cell.check_reference(program, cell.run(program))

    cell.for_all(programs.overflowing(cell.limits), check)


def test_a_prompt_longer_than_the_window(cell: Cell) -> None:
    """A prompt that leaves the window behind equals the reference, in one shot and in chunks"""
    one_shot = programs.past_the_window(cell.limits)
    prompt, rest = one_shot.operations
    assert isinstance(prompt, Prefill)
    chunked = Program(one_shot.capacity, (Prefill(prompt.tokens, cell.limits.window, "last"), rest))
    for program in (one_shot, chunked):
        cell.check_reference(program, cell.run(program))

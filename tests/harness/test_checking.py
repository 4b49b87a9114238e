"""How a check runs over a device: what it tallies, what it shrinks, and what is not its failure."""

from __future__ import annotations

import contextlib
import time
import unittest
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import strategies as st

from device_agents.errors import InfrastructureError, RunnerDied
from harness.checking import Cell, Tally, applies
from harness.compare import CheckFailed
from harness.mutants.catalogue import MUTANTS
from harness.mutants.running import Watched, Workshop, properties
from harness.recipes import parse_recipe
from harness.tolerances import too_few
from kvengine.program import Decode, Observation, Program

SUITE = properties()


@pytest.fixture
def cell(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cell]:
    with Workshop(tmp_path_factory.mktemp("workshop")).bench("hybrid,slack=2", "w5", 60) as bench:
        yield bench.cell


class DiesOnTheThirdProgram(Watched):
    """Stands for a device whose cable comes loose in the middle of a property."""

    programs = 0

    def run_program(self, program: Program) -> tuple[Observation, ...]:
        self.programs += 1
        if self.programs >= 3:
            raise RunnerDied("the cable came loose")
        return super().run_program(program)


def test_an_infrastructure_error_is_neither_shrunk_nor_a_failure(cell: Cell) -> None:
    engine = DiesOnTheThirdProgram(cell.open_plan("hybrid"))
    with pytest.raises(InfrastructureError, match="cable"):
        SUITE["P1"](replace(cell, open_plan=lambda plan: engine, shrink=True))
    assert engine.programs == 3


def test_the_first_failure_is_shrunk(cell: Cell) -> None:
    (mutant,) = [m for m in MUTANTS if m.name == "local layers on the global theta"]
    with mutant.applied(), pytest.raises(CheckFailed, match="first differing step: operation 0") as failure:
        SUITE["P14"](replace(cell, shrink=True))
    program, divergence = failure.value.program, failure.value.divergence
    assert Program.from_json(program.to_json()) == program
    assert len(program.operations) == 1
    assert program.capacity <= 4
    assert divergence is not None
    assert divergence.expected != divergence.found


@pytest.mark.parametrize(
    ("recipe", "marks", "expected"),
    [
        ("static", {"hybrid_only"}, False),
        ("hybrid", {"hybrid_only"}, True),
        ("hybrid", {"quantized_cache_only"}, False),
        ("hybrid-int4kv", {"quantized_cache_only", "hybrid_only"}, True),
        ("naive", set(), True),
    ],
)
def test_a_property_applies_by_its_markers(recipe: str, marks: set[str], expected: bool) -> None:
    assert applies(marks, parse_recipe(recipe)) is expected


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


# -- failures that stay ---------------------------------------------------------------------------


@contextlib.contextmanager
def failing() -> Iterator[None]:
    """May fail; but a check that Hypothesis skips has checked nothing."""
    try:
        yield
    except CheckFailed:
        pass
    except unittest.SkipTest as error:
        pytest.fail(str(error))


def drawn_by(cell: Cell, fails: Callable[[int], bool] = lambda value: False) -> list[int]:
    """What a property over numbers is asked, in order, until it fails."""
    asked: list[int] = []

    def check(value: int) -> None:
        asked.append(value)
        if fails(value):
            raise CheckFailed("so", Program(1, (Decode((0,)),)))

    with failing():
        cell.for_all(st.integers(0, 1_000_000), check)
    return asked


def test_a_failing_example_comes_first_in_the_next_run(cell: Cell, tmp_path: Path) -> None:
    first = drawn_by(replace(cell, database=str(tmp_path), shrink=True), lambda value: value > 9_000)
    assert first[-1] == 9_001
    later = replace(cell, database=str(tmp_path), seed=cell.seed + 1, began=time.time())
    assert drawn_by(later, lambda value: value > 9_000) == [9_001, 9_001]  # once more to be sure
    assert len(list(tmp_path.glob("*/*.json"))) == 1, "the same failure is kept once"


def test_failures_change_nothing_of_what_a_seed_draws(cell: Cell, tmp_path: Path) -> None:
    """The second device of a run, and the next run, are asked the same; what failed comes on top."""
    run = replace(cell, database=str(tmp_path))
    clean = drawn_by(run)
    drawn_by(replace(run, shrink=True), lambda value: value > 9_000)
    assert drawn_by(run) == clean, "another device of the same run"
    after = drawn_by(replace(run, began=time.time()))
    assert after == [9_001, *clean], "the next run"
    # Passing on one device forgets nothing: it may still fail on the next.
    assert drawn_by(replace(run, began=time.time())) == after


def written_by(cell: Cell, most: int = 1_000) -> list[str]:
    """The programs of the machine, until one has more than ``most`` operations."""
    asked: list[str] = []

    def check(program: Program) -> None:
        asked.append(program.to_json())
        if len(program.operations) > most:
            raise CheckFailed("so", program)

    with failing():
        cell.for_all_programs(check)
    return asked


def test_a_failing_program_of_the_machine_changes_nothing_either(cell: Cell, tmp_path: Path) -> None:
    run = replace(cell, database=str(tmp_path), examples=10)
    clean = written_by(run)
    assert len(written_by(run, most=3)) < len(clean)
    assert written_by(run) == clean
    after = written_by(replace(run, began=time.time()))
    assert after[-len(clean) :] == clean
    assert len(after) > len(clean)


def test_a_slow_device_tries_the_first_of_the_same_programs(cell: Cell) -> None:
    assert drawn_by(replace(cell, most=7)) == drawn_by(cell)[:7]
    cell = replace(cell, examples=20)
    assert written_by(replace(cell, most=4)) == written_by(cell)[:4]


def test_what_a_slow_device_tries_may_fail_and_shrinks(cell: Cell) -> None:
    tried = drawn_by(replace(cell, most=7, shrink=True), lambda value: value > 9_000)
    assert tried[-1] == 9_001

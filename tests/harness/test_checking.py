"""How a check runs over a device: what it tallies, what it shrinks, and what is not its failure."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest

from device_agents.errors import InfrastructureError, RunnerDied
from harness.checking import Cell, Tally, applies
from harness.compare import CheckFailed
from harness.mutants.catalogue import MUTANTS
from harness.mutants.running import Watched, Workshop, properties
from harness.recipes import parse_recipe
from harness.tolerances import too_few
from kvengine.program import Observation, Program

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

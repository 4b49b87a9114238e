"""A failure is checked again by the property that found it, not by another that may agree."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import cast

import pytest

from harness import cli
from harness.cases import Case
from harness.checking import Cell
from harness.compare import CheckFailed
from harness.errors import HarnessError
from harness.mutants.catalogue import MUTANTS
from harness.mutants.mutant import Mutant
from harness.mutants.running import NET, Workshop, properties
from harness.replaying import REFERENCE, check_of, read_case, replay
from kvengine.program import Decode, Observation, Prefill, Program
from kvengine.session import EngineSession
from tests.harness.test_mutants import FOUND_BY

SUITE = properties()
MUTANT = {mutant.name: mutant for mutant in MUTANTS}
# Those whose programs may well agree with the reference, and every shape of what a check is asked about.
ASKED = [
    "P2",
    "P3",
    "P4",
    "P8",
    "P9",
    "P11",
    "P12",
    "P13",
    "P14",
    "prompt lookup gives the greedy tokens",
    NET,
]


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    return Workshop(tmp_path_factory.mktemp("replaying"))


@contextmanager
def cell_of(workshop: Workshop, mutant: Mutant) -> Iterator[Cell]:
    """Of the engine that ``mutant``'s own recipe and model make just now."""
    with workshop.bench(mutant.recipe, mutant.model, 40) as bench:
        yield bench.cell


def kept_by(cell: Cell, name: str, folder: Path) -> Case:
    """What a failing property leaves behind."""
    with pytest.raises(CheckFailed) as failure:
        SUITE[name](replace(cell, database=str(folder), model="models/tiny"))
    (file,) = folder.glob("*/*.json")
    case, named = read_case(file.read_text())
    assert named
    assert case == failure.value.case
    return case


@pytest.mark.parametrize("name", ASKED, ids=[name.split()[0] for name in ASKED])
def test_the_property_that_failed_is_asked_again(name: str, workshop: Workshop, tmp_path: Path) -> None:
    mutant = MUTANT[FOUND_BY[name]]
    with mutant.applied(), cell_of(workshop, mutant) as wrong:
        case = kept_by(wrong, name, tmp_path)
        assert check_of(case) is SUITE[name]
        assert (case.recipe, case.model) == (mutant.recipe, "models/tiny")
        again = replay(wrong, case)
    with cell_of(workshop, mutant) as right:
        passed = replay(right, case)
    assert again.failure
    assert passed.failure == ""
    assert again.title == passed.title
    assert passed.runs


def test_what_the_reference_cannot_see_would_have_agreed(workshop: Workshop, tmp_path: Path) -> None:
    """Two sessions on one buffer: each program alone is right."""
    mutant = MUTANT[FOUND_BY["P12"]]
    with mutant.applied(), cell_of(workshop, mutant) as wrong:
        case = kept_by(wrong, "P12", tmp_path)
        assert isinstance(case.drawn, list)
        alone = replay(wrong, read_case(json.dumps(case.drawn[1]))[0])
    assert alone.failure == ""


def test_a_program_alone_is_held_against_the_reference(workshop: Workshop) -> None:
    """As older versions saved it."""
    program = Program(8, (Prefill((1, 2, 3)), Decode((4, 5, 6))))
    case, named = read_case(program.to_json())
    assert (named, case.check) == (False, REFERENCE)
    mutant = MUTANT["local layers on the global theta"]
    with mutant.applied(), cell_of(workshop, mutant) as wrong:
        found = replay(wrong, case)
    assert "logits differ from the reference" in found.failure
    assert found.divergence is not None
    assert [ran for ran, _ in found.runs] == [program]


def test_what_all_programs_together_tell_is_checked_with_all_of_them(
    workshop: Workshop, tmp_path: Path
) -> None:
    """P4's second half: the key at W - 1 matters in most programs. One program alone could not fail it."""
    blind = Mutant("blind", 0, "", "", ())
    with cell_of(workshop, blind) as cell:
        deaf = replace(cell, open_plan=lambda plan: cast("EngineSession", Deaf(cell.open_plan(plan))))
        case = kept_by(deaf, "P4", tmp_path)
        assert case.drawn is None
        again = replay(deaf, case)
        passed = replay(cell, case)
    assert "the oldest token in the window mattered in 0 of" in again.failure
    assert passed.failure == ""
    assert len(passed.runs) == len(again.runs) > 40


class Deaf:
    """An engine that takes every token for the same one."""

    def __init__(self, engine: EngineSession) -> None:
        self._engine = engine

    def run_program(self, program: Program) -> tuple[Observation, ...]:
        silent = tuple(
            replace(operation, tokens=(1,) * len(operation.tokens))
            if isinstance(operation, Prefill | Decode)
            else operation
            for operation in program.operations
        )
        return self._engine.run_program(replace(program, operations=silent))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{}", "neither a failure's case nor a program: .*'capacity'"),
        ('{"check": 7}', r"\$\.check: sought str|needs 'drawn'"),
        ("nonsense", "neither"),
        ('{"check":' * 100_000, "neither"),
    ],
)
def test_what_is_no_failure_is_refused(text: str, said: str) -> None:
    with pytest.raises(HarnessError, match=said):
        read_case(text)


def test_a_file_that_is_no_text_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Hypothesis' own examples lie beside ours."""
    (tmp_path / "a").write_bytes(b"\x80\xff")
    assert cli.run(["replay", str(tmp_path / "a")]) == 2
    assert "sought the JSON of a failure" in capsys.readouterr().err


def test_a_check_of_somebody_elses_is_run_again_by_pytest() -> None:
    case = Case("test_ours", [1], seed=7, examples=9, recipe="hybrid")
    with pytest.raises(HarnessError, match="pytest -k test_ours --kvfarm-seed=7 --examples=9"):
        check_of(case)


def test_a_case_that_the_check_does_not_take_is_refused(workshop: Workshop) -> None:
    case = Case("test_p09_the_dead_never_matter", [1], seed=7, examples=9, recipe="hybrid")
    with (
        cell_of(workshop, Mutant("none", 0, "", "", ())) as cell,
        pytest.raises(HarnessError, match="a list of 2"),
    ):
        replay(cell, case)

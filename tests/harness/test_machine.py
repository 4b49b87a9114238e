"""The machine that writes programs over every operation: seeds, shrinking, other windows."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from harness.checking import Cell
from harness.compare import CheckFailed
from harness.mutants.catalogue import MUTANTS
from harness.recipes import parse_recipe
from harness.reference import CachedReference, Reference, TransformersReference
from harness.replaying import read_case
from harness.suite import test_operations as suite
from kvengine.engine import LocalEngine
from kvengine.export import export
from kvengine.plan import CachePlan, PlanKind
from kvengine.program import Program
from kvengine.recipe import ExportRecipe, SessionRecipe
from tests.conftest import OpenTiny


@pytest.fixture(scope="module")
def reference(tiny_checkpoint: Path) -> Reference:
    return CachedReference(TransformersReference(tiny_checkpoint))


@pytest.fixture(scope="module")
def make_cell(open_tiny: OpenTiny, reference: Reference) -> Callable[..., Cell]:
    opened: dict[str, LocalEngine] = {}

    def make(plan: PlanKind, examples: int = 60, shrink: bool = False) -> Cell:
        if plan not in opened:
            opened[plan] = open_tiny(ExportRecipe(cache=CachePlan(plan)))
        engine = opened[plan]
        recipe = parse_recipe(plan)
        spec = engine.model.spec
        return Cell("here", recipe, spec, reference, lambda _: engine, examples, seed=1, shrink=shrink)

    return make


@pytest.fixture
def beams_stay_where_they_were() -> Iterator[None]:
    (mutant,) = [mutant for mutant in MUTANTS if mutant.name == "beam reorder skipped"]
    with mutant.applied():
        yield


@pytest.mark.usefixtures("beams_stay_where_they_were")
def test_a_failing_program_of_the_machine_is_shrunk_and_kept(
    make_cell: Callable[..., Cell], tmp_path: Path
) -> None:
    cell = make_cell("static", 150, shrink=True)
    cell.database = str(tmp_path)
    with pytest.raises(CheckFailed) as failure:
        suite.test_any_program_equals_the_reference(cell)
    program = failure.value.program
    kinds = [operation.kind for operation in program.operations]
    assert kinds[1] == "reorder"
    assert len(kinds) == 3
    (kept,) = tmp_path.glob("test_any_program_equals_the_reference/*.json")
    case, _ = read_case(kept.read_text())
    assert Program.from_json(json.dumps(case.drawn)) == program
    # The next run begins with what failed before, whatever its seed.
    cell.seed, cell.examples, cell.shrink, cell.began = 99, 1, False, time.time()
    with pytest.raises(CheckFailed):
        suite.test_any_program_equals_the_reference(cell)


@pytest.mark.parametrize("window", [2, 3, 4])
def test_any_program_on_other_windows(window: int, tiny_checkpoint: Path, tmp_path: Path) -> None:
    """The preset's window is 5; small ones wrap more often and leave rewinds less room."""
    checkpoint = tmp_path / f"window-{window}"
    checkpoint.mkdir()
    for file in tiny_checkpoint.iterdir():
        (checkpoint / file.name).symlink_to(file)
    (checkpoint / "config.json").unlink()
    config = json.loads((tiny_checkpoint / "config.json").read_text()) | {"sliding_window": window}
    (checkpoint / "config.json").write_text(json.dumps(config))
    artifact = export(checkpoint, tmp_path / "artifact", ExportRecipe(cache=CachePlan("hybrid")))
    engine = LocalEngine.open(artifact.folder, SessionRecipe(threads=1))
    truth = CachedReference(TransformersReference(checkpoint))
    cell = Cell("here", parse_recipe("hybrid"), engine.model.spec, truth, lambda _: engine, 15, seed=window)
    suite.test_any_program_equals_the_reference(cell)
    suite.test_p10_rewound_is_as_if_it_never_happened(cell)
    assert cell.tally.programs >= 30


def test_the_same_seed_gives_the_same_programs(make_cell: Callable[..., Cell]) -> None:
    def written(seed: int) -> list[str]:
        cell = make_cell("hybrid", 5)
        cell.seed = seed
        programs: list[str] = []
        cell.for_all_programs(lambda program: programs.append(program.to_json()))
        return programs

    assert written(3) == written(3) != written(4)

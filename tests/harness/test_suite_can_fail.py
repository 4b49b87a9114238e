"""Every check of the built-in suite goes red when the engine is broken the way it is there for."""

from __future__ import annotations

import inspect
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from device_agents.errors import InfrastructureError, RunnerDied
from harness.checking import Cell
from harness.compare import CheckFailed
from harness.recipes import Recipe, parse_recipe
from harness.reference import CachedReference, Reference, TransformersReference
from harness.suite import test_correctness as suite
from kvengine.buffers import Buffer
from kvengine.decoder import Decoder, Float32Array, Int64Array
from kvengine.engine import LocalEngine
from kvengine.export import export
from kvengine.plan import CachePlan
from kvengine.program import Observation, Program
from kvengine.recipe import ExportRecipe, SessionRecipe
from tests.conftest import ExportTiny

CHECKS: dict[str, Callable[[Cell], None]] = {
    name: check for name, check in inspect.getmembers(suite, inspect.isfunction) if name.startswith("test_")
}


class RopeOffByOne(Decoder):
    """Every token is rotated as if it stood one position later."""

    def _make_rope_tables(self) -> list[tuple[str, Buffer]]:
        tables = super()._make_rope_tables()
        for _, buffer in tables[:2]:  # the first of the two RoPEs only: a common shift of all would not show
            buffer.read()[:] = np.roll(buffer.read(), -1, axis=1)
        return tables


class ForgetsTheLastTokenOfAChunk(Decoder):
    """The last row of every chunk but the final one is dropped and the one before counted twice."""

    def _run(
        self, ids: Int64Array, rows: Int64Array, keep_token: bool = False, new: Int64Array | None = None
    ) -> Float32Array:
        if ids.shape[1] > 1 and self.position:
            ids = np.ascontiguousarray(np.concatenate([ids[:, :-1], ids[:, -2:-1]], axis=1))
        return super()._run(ids, rows, keep_token, new)


class ResetKeepsThePosition(Decoder):
    def reset(self, row: int | None = None) -> None:
        position = self.position
        super().reset(row)
        self.rows.held[0] = min(position, 1)


class ReadsOneRowTooMany(Decoder):
    """Counts one token too many: a row that was never written takes part."""

    def _advance(self, binding: object, ids: Int64Array, new: Int64Array | None) -> None:
        bound = self._lengths, self._total
        self._lengths, self._total = Buffer((self.batch,), np.int32), Buffer((1,), np.int32)
        bound[0].read()[:] = self.position + ids.shape[1]
        bound[1].read()[:] = self.position + ids.shape[1] + 1
        try:
            super()._advance(binding, ids, new)
        finally:
            self._lengths, self._total = bound


class NeverRefusesRoom(Decoder):
    def _check_room(self, count: int, new: Int64Array | None = None) -> None:
        """Let it overflow."""


class RefusesButMoves(Decoder):
    """Refuses an overflow only after it has counted the tokens."""

    def _check_room(self, count: int, new: Int64Array | None = None) -> None:
        try:
            super()._check_room(count, new)
        except Exception:
            self.rows.held[0] += 1
            raise


def with_decoder(decoder: type[Decoder]) -> Callable[[LocalEngine], LocalEngine]:
    def breaks(engine: LocalEngine) -> LocalEngine:
        broken = LocalEngine(engine.model)
        broken.decoder_type = decoder
        return broken

    return breaks


# check, mutant, the cache plan under test
DECODER_MUTANTS = [
    ("test_every_decode_step_equals_the_reference", RopeOffByOne, "hybrid"),
    ("test_any_chunking_equals_one_shot", ForgetsTheLastTokenOfAChunk, "static"),
    ("test_reset_hides_the_past", ResetKeepsThePosition, "static"),
    ("test_poisoned_unused_rows_never_matter", ReadsOneRowTooMany, "static"),
    ("test_overflow_is_refused_and_changes_nothing", NeverRefusesRoom, "static"),
    ("test_overflow_is_refused_and_changes_nothing", RefusesButMoves, "hybrid"),
]
# check, what config.json says instead; the reference keeps the true checkpoint
CONFIG_MUTANTS = [
    ("test_every_decode_step_equals_the_reference", {"sliding_window": 6}),
    ("test_every_decode_step_equals_the_reference", {"sliding_window": 4}),
    ("test_hybrid_equals_static", {"sliding_window": 6}),
    ("test_a_prompt_longer_than_the_window", {"sliding_window": 1000}),
    ("test_any_chunking_equals_one_shot", {"query_pre_attn_scalar": 32}),
]


@pytest.fixture(scope="module")
def reference(tiny_checkpoint: Path) -> Reference:
    return CachedReference(TransformersReference(tiny_checkpoint))


@pytest.fixture(scope="module")
def engines(export_tiny: ExportTiny) -> Callable[[str], LocalEngine]:
    opened: dict[str, LocalEngine] = {}

    def get(plan: str) -> LocalEngine:
        if plan not in opened:
            kind = CachePlan("hybrid", slack=2) if plan == "hybrid" else CachePlan("static")
            folder = export_tiny(ExportRecipe(cache=kind)).folder
            opened[plan] = LocalEngine.open(folder, SessionRecipe(threads=1))
        return opened[plan]

    return get


def make_cell(recipe: Recipe, reference: Reference, open_plan: Callable[[str], LocalEngine]) -> Cell:
    spec = open_plan(recipe.export.cache.kind).model.spec
    return Cell("here", recipe, spec, reference, open_plan, examples=60, seed=1)


def test_every_check_has_a_mutant() -> None:
    assert {name for name, *_ in [*DECODER_MUTANTS, *CONFIG_MUTANTS]} == set(CHECKS)


@pytest.mark.parametrize("name", CHECKS)
def test_the_right_engine_passes(
    name: str, reference: Reference, engines: Callable[[str], LocalEngine]
) -> None:
    cell = make_cell(parse_recipe("hybrid"), reference, engines)
    CHECKS[name](cell)
    assert cell.tally.programs >= 2


@pytest.mark.parametrize(("name", "mutant", "plan"), DECODER_MUTANTS)
def test_a_broken_decoder_is_found(
    name: str,
    mutant: type[Decoder],
    plan: str,
    reference: Reference,
    engines: Callable[[str], LocalEngine],
) -> None:
    breaks = with_decoder(mutant)
    cell = make_cell(parse_recipe(plan), reference, lambda kind: breaks(engines(kind)))
    with pytest.raises(CheckFailed) as failure:
        CHECKS[name](cell)
    assert Program.from_json(failure.value.program.to_json()) == failure.value.program


@pytest.mark.parametrize(("name", "wrong"), CONFIG_MUTANTS)
def test_a_wrong_graph_is_found(
    name: str,
    wrong: dict[str, int],
    reference: Reference,
    engines: Callable[[str], LocalEngine],
    tiny_checkpoint: Path,
    tmp_path: Path,
) -> None:
    checkpoint = Path(shutil.copytree(tiny_checkpoint, tmp_path / "wrong"))
    config = json.loads((checkpoint / "config.json").read_text())
    (checkpoint / "config.json").write_text(json.dumps(config | wrong))
    recipe = ExportRecipe(cache=CachePlan("static" if wrong.get("sliding_window", 0) > 6 else "hybrid"))
    broken = LocalEngine.open(export(checkpoint, tmp_path / "out", recipe).folder, SessionRecipe(threads=1))
    cell = make_cell(
        parse_recipe("hybrid"), reference, lambda kind: broken if kind == "hybrid" else engines(kind)
    )
    with pytest.raises(CheckFailed):
        CHECKS[name](cell)


class DiesOnTheThirdProgram(LocalEngine):
    """Stands for a device whose cable comes loose in the middle of a property."""

    def __init__(self, engine: LocalEngine) -> None:
        super().__init__(engine.model)
        self.programs = 0

    def run_program(self, program: Program) -> tuple[Observation, ...]:
        self.programs += 1
        if self.programs >= 3:
            raise RunnerDied("the cable came loose")
        return super().run_program(program)


def test_an_infrastructure_error_is_neither_shrunk_nor_a_failure(
    reference: Reference, engines: Callable[[str], LocalEngine]
) -> None:
    engine = DiesOnTheThirdProgram(engines("hybrid"))
    cell = make_cell(parse_recipe("hybrid"), reference, lambda kind: engine)
    with pytest.raises(InfrastructureError, match="cable"):
        suite.test_every_decode_step_equals_the_reference(cell)
    assert engine.programs == 3


def test_the_first_failure_is_shrunk(reference: Reference, engines: Callable[[str], LocalEngine]) -> None:
    breaks = with_decoder(RopeOffByOne)
    cell = make_cell(parse_recipe("hybrid"), reference, lambda kind: breaks(engines(kind)))
    with pytest.raises(CheckFailed, match="first differing step: operation 0") as failure:
        suite.test_every_decode_step_equals_the_reference(cell)
    program, divergence = failure.value.program, failure.value.divergence
    assert len(program.operations) == 1
    assert divergence is not None
    assert divergence.expected != divergence.found
    assert program.capacity <= 4

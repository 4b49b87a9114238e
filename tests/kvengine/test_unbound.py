"""Decoding without IO binding or with full logits is slower and nothing else: the answers are the same."""

from __future__ import annotations

import dataclasses
import os
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from kvengine.arrays import GrowingArrays
from kvengine.decoder import Decoder, Float32Array, Int64Array
from kvengine.engine import LocalEngine
from kvengine.plan import CachePlan
from kvengine.program import (
    Compact,
    Decode,
    Extend,
    Fork,
    Generate,
    Load,
    Observation,
    Poison,
    Prefill,
    Program,
    ReadCache,
    Reorder,
    Reset,
    Reuse,
    Rewind,
    Save,
    Speculate,
    Switch,
    Workload,
)
from kvengine.recipe import ExportRecipe, SessionRecipe
from kvengine.unbound import FullLogitsDecoder, UnboundDecoder, UnboundFullLogitsDecoder, decoder_for
from tests.conftest import ExportTiny

# Past the window and the slack, chunked and one shot, every operation, with every dead row poisoned.
ALONE = Program(
    120,
    (
        Prefill(tuple(range(40)), 7),
        Poison(),
        Decode((3, 4)),
        Generate(5, 30),
        Save("before"),
        Rewind(2),
        Poison(),
        Fork("other"),
        Prefill((9, 8, 7), 2, "last"),
        Switch("other"),
        Decode((6,)),
        ReadCache(0),
        ReadCache(1),
        Compact(keep=20),
        Poison(),
        Generate(7, 5),
        Load("before"),
        Speculate(5, 8),
        Reuse(tuple(range(30))),
        Reset(),
        Prefill(tuple(range(30)), 0, "last"),
        Decode((999,)),
        Decode((1,)),
    ),
)
BATCH = Program(
    60,
    (
        Extend(((1, 2, 3, 4, 5), (6,), ()), 2),
        Poison(),
        Extend(((7,), (8, 9, 10), (11, 12)), 0),
        Generate(5, 6, row=1),
        Reorder((1, 1, 0)),
        Poison(),
        Extend(((13,), (), (14, 15)), 0),
        Reset(row=1),
        Generate(3, 4, row=1),
        ReadCache(0, row=2),
    ),
    batch=3,
)
PLANS = [
    CachePlan("growing"),
    CachePlan("static"),
    CachePlan("hybrid", slack=4),
    CachePlan("hybrid", "int8", slack=4),
    CachePlan("growing", "float16"),
]
MODES = [
    SessionRecipe(threads=1, io_binding=False),
    SessionRecipe(threads=1, logits="all"),
    SessionRecipe(threads=1, io_binding=False, logits="all"),
]


def observe(
    export_tiny: ExportTiny, plan: CachePlan, mode: SessionRecipe, program: Program
) -> tuple[Observation, ...]:
    engine = LocalEngine.open(export_tiny(ExportRecipe(cache=plan)).folder, mode)
    return engine.run_program(program)


@pytest.mark.parametrize("mode", MODES, ids=["unbound", "full-logits", "both"])
@pytest.mark.parametrize("plan", PLANS, ids=lambda plan: f"{plan.kind}-{plan.dtype}")
@pytest.mark.parametrize("program", [ALONE, BATCH], ids=["alone", "batch"])
def test_every_mode_answers_bit_by_bit_the_same(
    export_tiny: ExportTiny, plan: CachePlan, mode: SessionRecipe, program: Program
) -> None:
    ours = observe(export_tiny, plan, SessionRecipe(threads=1), program)
    theirs = observe(export_tiny, plan, mode, program)
    for index, (one, other) in enumerate(zip(ours, theirs, strict=True)):
        np.testing.assert_array_equal(one.logits, other.logits, err_msg=str(program.operations[index]))
        assert (one.positions, one.tokens, one.error) == (other.positions, other.tokens, other.error)
        if one.cache is not None:
            assert other.cache is not None
            np.testing.assert_array_equal(one.cache.key_codes, other.cache.key_codes)
            np.testing.assert_array_equal(one.cache.value_codes, other.cache.value_codes)


def test_what_is_run_above_is_refused_only_where_it_must_be(export_tiny: ExportTiny) -> None:
    """Else the equality above would be one of refusals."""
    observed = observe(export_tiny, CachePlan("static"), MODES[2], ALONE)
    errors = [operation.kind for operation, o in zip(ALONE.operations, observed, strict=True) if o.error]
    assert errors == ["decode"]  # token 999
    batch = observe(export_tiny, CachePlan("hybrid", slack=4), MODES[2], BATCH)
    assert [o.error for o in batch] == [None] * len(BATCH.operations)


def test_each_recipe_gets_its_decoder() -> None:
    plain, (unbound, full, both) = SessionRecipe(), MODES
    found = [decoder_for(recipe) for recipe in (plain, unbound, full, both)]
    assert found == [Decoder, UnboundDecoder, FullLogitsDecoder, UnboundFullLogitsDecoder]


def test_the_naive_baseline_really_is_naive(export_tiny: ExportTiny, monkeypatch: pytest.MonkeyPatch) -> None:
    """No bound run at all; one row of logits for every prompt token; K and V grow with every token."""
    asked: list[int] = []
    grown: list[int] = []
    take = GrowingArrays.take

    def spy(self: GrowingArrays, presents: list[npt.NDArray[np.float32]]) -> None:
        take(self, presents)
        grown.append(presents[0].shape[2])

    engine = LocalEngine.open(export_tiny(ExportRecipe(cache=CachePlan("growing"))).folder, MODES[2])
    original = UnboundDecoder._run

    def run(self: UnboundDecoder, ids: Int64Array, rows: Int64Array, **changes: Any) -> Float32Array:
        found = original(self, ids, rows, **changes)
        asked.append(len(found))
        return found

    def refuse(*_: object) -> None:
        raise AssertionError("a bound run")

    monkeypatch.setattr(GrowingArrays, "take", spy)
    monkeypatch.setattr(UnboundDecoder, "_run", run)
    monkeypatch.setattr(Decoder, "_execute", refuse)
    engine.run_workload(Workload((1, 2, 3, 4, 5), new_tokens=3, repeats=1, warmup=0))
    assert asked == [5, 1, 1]
    assert grown == [5, 6, 7]


def test_onnxruntimes_own_thread_count_is_told(export_tiny: ExportTiny) -> None:
    artifact = export_tiny(ExportRecipe())
    engine = LocalEngine.open(artifact.folder, SessionRecipe(threads=0))
    assert engine.info.session.threads is not None
    assert 1 <= engine.info.session.threads <= (os.cpu_count() or 1)


def test_a_mode_travels_as_part_of_the_recipe() -> None:
    from kvengine.codec import decode, encode

    both = dataclasses.replace(MODES[2], threads=0)
    assert decode(SessionRecipe, encode(both)) == both

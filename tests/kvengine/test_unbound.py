"""Decoding without IO binding or with full logits is slower and nothing else: the answers are the same."""

from __future__ import annotations

import dataclasses
import os

import numpy as np
import numpy.typing as npt
import pytest

from kvengine.cache import ArrayCache
from kvengine.decoder import Decoder, Float32Array, Int64Array
from kvengine.engine import LocalEngine
from kvengine.plan import CachePlan
from kvengine.program import (
    Decode,
    Generate,
    Observation,
    Poison,
    Prefill,
    Program,
    Reset,
    Workload,
)
from kvengine.recipe import ExportRecipe, SessionRecipe
from kvengine.unbound import FullLogitsDecoder, UnboundDecoder, UnboundFullLogitsDecoder, decoder_for
from tests.conftest import ExportTiny

# Past the window of 16 rows and the slack of 4, chunked and one shot, with every dead row poisoned.
PROGRAM = Program(
    120,
    (
        Prefill(tuple(range(40)), 7),
        Poison(),
        Decode((3, 4)),
        Generate(5, 50),
        Poison(),
        Prefill((9, 8, 7), 2, "last"),
        Reset(),
        Prefill(tuple(range(30)), 0, "last"),
        Decode((999,)),
        Decode((1,)),
    ),
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


def observe(export_tiny: ExportTiny, plan: CachePlan, mode: SessionRecipe) -> tuple[Observation, ...]:
    engine = LocalEngine.open(export_tiny(ExportRecipe(cache=plan)).folder, mode)
    return engine.run_program(PROGRAM)


@pytest.mark.parametrize("mode", MODES, ids=["unbound", "full-logits", "both"])
@pytest.mark.parametrize("plan", PLANS, ids=lambda plan: f"{plan.kind}-{plan.dtype}")
def test_every_mode_answers_bit_by_bit_the_same(
    export_tiny: ExportTiny, plan: CachePlan, mode: SessionRecipe
) -> None:
    ours = observe(export_tiny, plan, SessionRecipe(threads=1))
    theirs = observe(export_tiny, plan, mode)
    for one, other in zip(ours, theirs, strict=True):
        np.testing.assert_array_equal(one.logits, other.logits)
        assert (one.position, one.tokens, one.error) == (other.position, other.tokens, other.error)


def test_each_recipe_gets_its_decoder() -> None:
    plain, (unbound, full, both) = SessionRecipe(), MODES
    found = [decoder_for(recipe) for recipe in (plain, unbound, full, both)]
    assert found == [Decoder, UnboundDecoder, FullLogitsDecoder, UnboundFullLogitsDecoder]


def test_the_naive_baseline_really_is_naive(export_tiny: ExportTiny, monkeypatch: pytest.MonkeyPatch) -> None:
    """No bound run at all; one row of logits for every prompt token; K and V grow with every token."""
    asked: list[int] = []
    grown: list[int] = []
    take = ArrayCache.take

    def spy(self: ArrayCache, presents: list[npt.NDArray[np.float32]]) -> None:
        take(self, presents)
        grown.append(presents[0].shape[2])

    engine = LocalEngine.open(export_tiny(ExportRecipe(cache=CachePlan("growing"))).folder, MODES[2])
    original = UnboundDecoder._run

    def run(self: UnboundDecoder, ids: Int64Array, rows: Int64Array, keep: bool = False) -> Float32Array:
        found = original(self, ids, rows, keep)
        asked.append(len(found))
        return found

    def refuse(*_: object) -> None:
        raise AssertionError("a bound run")

    monkeypatch.setattr(ArrayCache, "take", spy)
    monkeypatch.setattr(UnboundDecoder, "_run", run)
    monkeypatch.setattr(Decoder, "_advance", refuse)
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

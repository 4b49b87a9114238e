"""Compaction: what it keeps, what it refuses; that it is exact against masked reference is the suite's."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from harness.reference import TransformersReference
from harness.reference.protocol import Hidden
from kvengine.decoder import Decoder
from kvengine.errors import InvalidRequest
from kvengine.plan import CachePlan, PlanKind
from kvengine.recipe import ExportRecipe
from tests.conftest import OpenTiny

TOKENS = tuple(int(token) for token in np.random.default_rng(3).integers(0, 331, 60))


def test_hiding_all_that_came_before_is_a_fresh_start(tiny_checkpoint: Path) -> None:
    """The masked reference against the plain one: RoPE is relative, a hidden past only shifts positions."""
    reference = TransformersReference(tiny_checkpoint)
    hidden = reference.logits(TOKENS[:30], (Hidden(0, 12, 12),))
    np.testing.assert_allclose(hidden[12:], reference.logits(TOKENS[12:30]), rtol=0, atol=1e-4)
    np.testing.assert_allclose(hidden[:12], reference.logits(TOKENS[:12]), rtol=0, atol=1e-5)
    assert np.abs(hidden[12:] - reference.logits(TOKENS[:30])[12:]).max() > 1


@pytest.mark.parametrize("kind", ["static", "hybrid"])
def test_a_context_that_never_ends(open_tiny: OpenTiny, tiny_checkpoint: Path, kind: PlanKind) -> None:
    """The newest half again and again: 60 tokens in 16 rows of context, two sinks among them."""
    model = open_tiny(ExportRecipe(cache=CachePlan(kind))).model
    decoder = Decoder(model, 16)
    hidden: list[Hidden] = []
    found = []
    for position, token in enumerate(TOKENS):
        if decoder.position == 16:
            decoder.compact(7, sinks=2)
            gone = range(hidden[-1].stop if hidden else 2, position - 7)
            hidden.append(Hidden(gone.start, gone.stop, position))
        found.append(decoder.decode(token)[0])
    assert len(hidden) == 7
    sought = TransformersReference(tiny_checkpoint).logits(TOKENS, tuple(hidden))
    np.testing.assert_allclose(found, sought, rtol=0, atol=1e-4)


def test_what_stays_keeps_its_positions_and_values(open_tiny: OpenTiny) -> None:
    decoder = Decoder(open_tiny(ExportRecipe(cache=CachePlan("static"))).model, 40)
    decoder.prefill(TOKENS[:20])
    before = decoder.read_cache(2)
    decoder.compact(6, sinks=2)
    after = decoder.read_cache(2)
    assert after.positions.tolist() == [0, 1, 14, 15, 16, 17, 18, 19]
    np.testing.assert_array_equal(after.value, before.value[:, after.positions])
    assert decoder.rows.sequence(0).tolist() == [*TOKENS[:2], *TOKENS[14:20]]


@pytest.mark.parametrize(("keep", "sinks"), [(20, 0), (19, 1), (50, 0)])
def test_nothing_happens_where_nothing_is_to_be_dropped(open_tiny: OpenTiny, keep: int, sinks: int) -> None:
    decoder = Decoder(open_tiny(ExportRecipe(cache=CachePlan("hybrid"))).model, 40)
    decoder.prefill(TOKENS[:20])
    undisturbed = decoder.fork()
    decoder.compact(keep, sinks)
    np.testing.assert_array_equal(decoder.decode(3), undisturbed.decode(3))


@pytest.mark.parametrize(("keep", "sinks"), [(0, 0), (-1, 0), (5, -1), (3, 1)])
def test_a_senseless_compaction_is_refused(open_tiny: OpenTiny, keep: int, sinks: int) -> None:
    """(3, 1): a window of 5 would reach the sink, which stands 16 positions back."""
    decoder = Decoder(open_tiny(ExportRecipe(cache=CachePlan("static"))).model, 40)
    decoder.prefill(TOKENS[:20])
    with pytest.raises(InvalidRequest, match="sought to keep"):
        decoder.compact(keep, sinks)
    assert decoder.position == 20

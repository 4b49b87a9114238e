"""What counts as the reference's argmax."""

from __future__ import annotations

import numpy as np
import pytest

from harness.compare import Float32Array, agree_with_reference
from harness.reference.protocol import Hidden, KeysAndValues
from harness.tolerances import FLOAT32, INT8, Tolerance
from kvengine.plan import CachePlan
from kvengine.program import Observation, Prefill, Program
from kvengine.spec import LayerSpec, ModelSpec, RopeSpec

SPEC = ModelSpec("x", 50, 8, 8, 1, 100, 1.0, 1e-6, True, (LayerSpec(None, 0, 1, 8),), (RopeSpec(1e4),))
PROGRAM = Program(8, (Prefill((1, 2), logits="all"),))


class Fixed:
    """A reference whose first two logits are ``gap`` apart in every row."""

    identity = "fixed"

    def __init__(self, gap: float) -> None:
        self.gap = gap

    def logits(self, tokens: tuple[int, ...], hidden: tuple[Hidden, ...] = ()) -> Float32Array:
        rows = np.zeros((len(tokens), SPEC.vocab_size), np.float32)
        rows[:, 0], rows[:, 1] = 1 + self.gap, 1
        return rows

    def cache(self, tokens: tuple[int, ...]) -> tuple[KeysAndValues, ...]:
        return ()


@pytest.mark.parametrize(("band", "hits"), [(FLOAT32, 2), (INT8, 0)])
def test_a_tie_within_the_band_may_come_either_way_round(band: Tolerance, hits: int) -> None:
    reference = Fixed(gap=1e-5)
    swapped = reference.logits((1, 2))[:, [1, 0, *range(2, SPEC.vocab_size)]]
    assert (
        agree_with_reference(
            PROGRAM, [Observation((2,), swapped)], reference, SPEC, CachePlan("static"), band
        ).hits
        == hits
    )

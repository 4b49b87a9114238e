"""Batches whose rows have lengths of their own, against each row alone."""

from __future__ import annotations

import numpy as np
import pytest

from kvengine.decoder import Decoder
from kvengine.errors import ContextOverflow, InvalidRequest
from kvengine.plan import PADDING_ROWS, CacheDtype, CachePlan, PlanKind
from kvengine.recipe import ExportRecipe
from kvengine.steps import ragged_steps
from tests.conftest import OpenTiny

ROWS = np.random.default_rng(3).integers(0, 331, (3, 30))
# Tokens appended to each row in one request: rows that wait, fill up, and join late.
SCHEDULE = [(5, 0, 12), (1, 3, 9), (0, 14, 0), (1, 1, 1), (17, 0, 0), (0, 6, 2)]


@pytest.mark.parametrize("dtype", ["float32", "float16", "int8"])
@pytest.mark.parametrize("kind", ["growing", "static", "hybrid"])
def test_every_row_is_as_it_is_alone(open_tiny: OpenTiny, kind: PlanKind, dtype: CacheDtype) -> None:
    model = open_tiny(ExportRecipe(cache=CachePlan(kind, dtype))).model
    together = Decoder(model, 24, batch=3)
    alone = [Decoder(model, 24) for _ in ROWS]
    for counts in SCHEDULE:
        held = together.rows.held
        parts = [row[n : n + count] for row, n, count in zip(ROWS, held, counts, strict=True)]
        found = together.extend(parts, logits="all")
        sought = [d.prefill(p, logits="all") for d, p in zip(alone, parts, strict=True) if len(p)]
        np.testing.assert_allclose(
            found, np.concatenate(sought), rtol=0, atol=1e-2 if "16" in dtype else 1e-4
        )
    assert together.rows.held == [24, 24, 24]


def test_rows_leave_and_join(open_tiny: OpenTiny) -> None:
    model = open_tiny(ExportRecipe(cache=CachePlan("hybrid", slack=2))).model
    decoder, alone = Decoder(model, 30, batch=2), Decoder(model, 30)
    decoder.extend([ROWS[0][:20], ROWS[1][:11]])
    decoder.reset(0)
    assert decoder.rows.held == [0, 11]
    decoder.extend([(), ROWS[1][11:14]])
    found = decoder.extend([ROWS[2][:9], ROWS[1][14:16]], logits="all")[:9]
    np.testing.assert_allclose(found, alone.prefill(ROWS[2][:9], logits="all"), rtol=0, atol=1e-4)


def test_greedy_rows_step_together_or_apart(open_tiny: OpenTiny) -> None:
    model = open_tiny(ExportRecipe(cache=CachePlan("static"))).model
    decoder = Decoder(model, 30, batch=3)
    decoder.start_rows([row[:count] for row, count in zip(ROWS, (4, 9, 6), strict=True)])
    steps = [decoder.step() for _ in range(5)]
    for row, count in enumerate((4, 9, 6)):
        alone = Decoder(model, 30)
        alone.start(ROWS[row][:count])
        assert [int(step[row]) for step in steps] == [int(alone.step()[0]) for _ in range(5)]
    held = list(decoder.rows.held)
    decoder.step([True, False, False])
    assert decoder.rows.held == [held[0] + 1, held[1], held[2]]


def test_a_row_without_room_refuses_the_step_for_all(open_tiny: OpenTiny) -> None:
    decoder = Decoder(open_tiny(ExportRecipe(cache=CachePlan("static"))).model, 10, batch=2)
    decoder.extend([ROWS[0][:10], ROWS[1][:3]])
    with pytest.raises(ContextOverflow, match="position 10"):
        decoder.extend([(3,), (3,)])
    with pytest.raises(ContextOverflow):
        decoder.step()
    assert decoder.rows.held == [10, 3]
    decoder.extend([(), ROWS[1][3:10]])  # the full row is idle
    assert decoder.rows.held == [10, 10]


def test_steps_are_padded_but_never_beyond_the_room() -> None:
    steps = list(ragged_steps([ROWS[0][:2], ROWS[1][:30]], [25, 0], 0, 30 + PADDING_ROWS))
    assert [step.ids.shape[1] for step in steps] == [13, 11, 6]
    assert steps[0].new is not None
    assert steps[0].new.tolist() == [2, 13]
    np.testing.assert_array_equal(steps[0].ids[0], [*ROWS[0][:2], *[0] * 11])


@pytest.mark.parametrize("order", [(0,), (0, 3), (0, -1)])
def test_a_reorder_names_a_row_for_each(open_tiny: OpenTiny, order: tuple[int, ...]) -> None:
    decoder = Decoder(open_tiny(ExportRecipe(cache=CachePlan("static"))).model, 10, batch=2)
    with pytest.raises(InvalidRequest, match="sought"):
        decoder.reorder(order)


def test_greedy_tokens_follow_their_beams(open_tiny: OpenTiny) -> None:
    model = open_tiny(ExportRecipe(cache=CachePlan("hybrid", slack=1))).model
    decoder = Decoder(model, 30, batch=3)
    decoder.start_rows([row[:12] for row in ROWS])
    decoder.reorder([2, 2, 0])
    found = decoder.step()
    for row, parent in enumerate((2, 2, 0)):
        alone = Decoder(model, 30)
        alone.start(ROWS[parent][:12])
        assert found[row] == alone.step()[0]

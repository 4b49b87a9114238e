"""Rewind: exact down to the bound that CachePlan.rewind_limit proves, refused below it."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from kvengine.decoder import Decoder
from kvengine.errors import InvalidRequest, RewindTooFar
from kvengine.plan import CachePlan, PlanKind
from kvengine.recipe import ExportRecipe
from kvengine.spec import LayerSpec
from tests.conftest import OpenTiny

TOKENS = [int(token) for token in np.random.default_rng(3).integers(0, 331, 26)]
OTHERS = [int(token) for token in np.random.default_rng(4).integers(0, 331, 9)]


def simulated(window: int, rows: int, total: int) -> list[int]:
    """Positions that the op's cache holds after ``total`` tokens, one at a time, by its own words:
    append; when the rows are full, move the window down first."""
    held: list[int] = []
    for position in range(total):
        if len(held) == rows:
            held = held[rows - window + 1 :]
        held.append(position)
    return held


@pytest.mark.parametrize(("window", "slack"), list(itertools.product(range(2, 7), range(5))))
def test_the_bound_by_brute_force(window: int, slack: int) -> None:
    """A length can be rewound to if and only if what the next query's window reads is all still there."""
    plan, layer = CachePlan("hybrid", slack=slack), LayerSpec(window, 0, 1, 8)
    for total in range(1, 40):
        held = simulated(window, window + slack, total)
        assert plan.oldest(layer, 40, total) == held[0]
        possible = {
            length
            for length in range(1, total + 1)
            if set(range(max(0, length - window + 1), length)) <= set(held)
        }
        limit = plan.rewind_limit(layer, 40, total)
        assert possible == set(range(max(limit, 1), total + 1))


@pytest.mark.parametrize(("kind", "slack"), [("static", 0), ("growing", 0), ("hybrid", 0), ("hybrid", 4)])
def test_rewound_is_as_if_it_had_never_happened(open_tiny: OpenTiny, kind: PlanKind, slack: int) -> None:
    model = open_tiny(ExportRecipe(cache=CachePlan(kind))).model
    exact = 0
    for total in range(1, len(TOKENS), 3):
        for count in range(total + 1):
            decoder = Decoder(model, 40, slack=slack)
            decoder.prefill(TOKENS[:total])
            try:
                decoder.rewind(count)
            except RewindTooFar:
                assert kind == "hybrid"
                assert decoder.position == total
                continue
            exact += 1
            decoder.poison()
            fresh = Decoder(model, 40, slack=slack)
            fresh.prefill([*TOKENS[: total - count], OTHERS[0]])
            decoder.decode(OTHERS[0])
            found = decoder.prefill(OTHERS[1:], chunk=4, logits="all")
            np.testing.assert_allclose(found, fresh.prefill(OTHERS[1:], logits="all"), rtol=0, atol=1e-4)
    assert exact >= (330 // 3 if kind != "hybrid" else 28)


def test_a_second_rewind_knows_what_the_first_one_lost(open_tiny: OpenTiny) -> None:
    """Rewound by one eviction, the formula alone would take the rows below for positions still there."""
    model = open_tiny(ExportRecipe(cache=CachePlan("hybrid"))).model
    decoder = Decoder(model, 40, slack=4)
    decoder.prefill(TOKENS[:10])  # 9 rows of window 5: position 5 is in row 0
    decoder.rewind(1)
    with pytest.raises(RewindTooFar, match="can drop 0 at most"):
        decoder.rewind(1)
    assert decoder.read_cache(0).positions.tolist() == [5, 6, 7, 8]
    fresh = Decoder(model, 40, slack=4)
    fresh.prefill([*TOKENS[:9], *OTHERS])
    decoder.prefill(OTHERS, chunk=2)
    np.testing.assert_allclose(decoder.decode(3), fresh.decode(3), rtol=0, atol=1e-4)


@pytest.mark.parametrize("count", [-1, 6])
def test_a_senseless_count_is_refused(open_tiny: OpenTiny, count: int) -> None:
    decoder = Decoder(open_tiny(ExportRecipe(cache=CachePlan("static"))).model, 40)
    decoder.prefill(TOKENS[:5])
    with pytest.raises(InvalidRequest, match=r"sought to drop 0\.\.5 tokens"):
        decoder.rewind(count)

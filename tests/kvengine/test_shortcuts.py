"""Prefix reuse and prompt lookup: the same answers in fewer steps, and how many fewer."""

from __future__ import annotations

import numpy as np
import pytest

from kvengine.decoder import Decoder
from kvengine.engine import LocalEngine
from kvengine.errors import ContextOverflow, InvalidRequest
from kvengine.plan import CachePlan
from kvengine.recipe import ExportRecipe
from tests.conftest import OpenTiny

TOKENS = [int(token) for token in np.random.default_rng(3).integers(0, 331, 40)]


@pytest.fixture(scope="module")
def hybrid(open_tiny: OpenTiny) -> LocalEngine:
    return open_tiny(ExportRecipe(cache=CachePlan("hybrid")))


class Counting(Decoder):
    """Counts the steps it runs."""

    steps = 0

    def _advance(self, *arguments: object) -> None:
        self.steps += 1
        super()._advance(*arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("prompt", "run"),
    [
        ([*TOKENS[:20], 7], 1),  # goes on
        ([*TOKENS[:18], 7, 8], 2),  # within the window
        ([*TOKENS[:10], 7], 11),  # the window has evicted what it would need
        (TOKENS[:20], 1),  # the last token runs again
        (TOKENS[:17], 1),
        ([7, *TOKENS[1:20]], 20),
    ],
)
def test_only_what_is_new_runs(hybrid: LocalEngine, prompt: list[int], run: int) -> None:
    decoder, fresh = Decoder(hybrid.model, 40, slack=8), Decoder(hybrid.model, 40)
    decoder.prefill(TOKENS[:20])
    found = decoder.reuse(prompt)
    assert len(found) == run
    np.testing.assert_allclose(found[-1], fresh.prefill(prompt)[0], rtol=0, atol=1e-4)
    assert decoder.rows.sequence(0).tolist() == prompt


def test_a_compacted_row_keeps_nothing(open_tiny: OpenTiny) -> None:
    decoder = Decoder(open_tiny(ExportRecipe(cache=CachePlan("static"))).model, 40)
    decoder.prefill(TOKENS[:20])
    decoder.compact(10)
    assert len(decoder.reuse(TOKENS[10:21])) == 11
    assert len(decoder.reuse(TOKENS[10:22])) == 1


def test_a_prompt_that_is_refused_leaves_the_row_as_it_is(hybrid: LocalEngine) -> None:
    decoder = Decoder(hybrid.model, 21)
    decoder.prefill(TOKENS[:20])
    with pytest.raises(ContextOverflow, match="room for 22"):
        decoder.reuse(TOKENS[:22])
    with pytest.raises(InvalidRequest, match="chunk"):
        decoder.reuse(TOKENS[:3], chunk=-1)
    assert decoder.rows.sequence(0).tolist() == TOKENS[:20]


@pytest.mark.parametrize(("slack", "most"), [(0, 65), (8, 30)])
@pytest.mark.parametrize("spoilt", [None, 0, 30])
def test_greedy_tokens_in_fewer_steps(hybrid: LocalEngine, slack: int, most: int, spoilt: int | None) -> None:
    """A window without slack can take back one token only, so no more are drafted."""
    greedy, drafting = Decoder(hybrid.model, 200, slack=slack), Counting(hybrid.model, 200, slack=slack)
    for decoder in (greedy, drafting):
        decoder.prefill(TOKENS)
    first = int(greedy.start([5])[0])
    sought = [first, *(int(greedy.step()[0]) for _ in range(119))]
    hint = [TOKENS[-1], 5, *sought]
    if spoilt is not None:
        hint[2 + spoilt] = 330 - sought[spoilt]
    drafting.steps = 0
    assert list(drafting.speculate(5, 120, draft=6, hint=hint)) == sought
    assert drafting.rows.sequence(0).tolist() == [*TOKENS, 5, *sought[:-1]]
    assert 120 / 7 <= drafting.steps <= most

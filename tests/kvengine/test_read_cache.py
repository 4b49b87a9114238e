"""Reading the cache back: which positions a layer holds, and what it stores of them."""

from __future__ import annotations

import numpy as np
import pytest

from kvengine.decoder import Decoder
from kvengine.errors import InvalidRequest
from kvengine.plan import CacheDtype, CachePlan, PlanKind
from kvengine.recipe import ExportRecipe
from tests.conftest import OpenTiny

TOKENS = [int(token) for token in np.random.default_rng(3).integers(0, 331, 28)]


@pytest.mark.parametrize("kind", ["growing", "static", "hybrid"])
def test_it_holds_the_newest_positions_and_nothing_else(open_tiny: OpenTiny, kind: PlanKind) -> None:
    model = open_tiny(ExportRecipe(cache=CachePlan(kind))).model
    truth = Decoder(open_tiny(ExportRecipe(cache=CachePlan("static"))).model, len(TOKENS))
    truth.prefill(TOKENS)
    for slack in (0, 3) if kind == "hybrid" else (0,):
        decoder = Decoder(model, 30, slack=slack)
        for total, token in enumerate(TOKENS, 1):
            decoder.decode(token)
            for index, layer in enumerate(model.spec.layers):
                found = decoder.read_cache(index)
                resident = decoder.plan.resident(layer, 30, total)
                assert found.positions.tolist() == list(range(total - resident, total))
                whole = truth.read_cache(index)
                np.testing.assert_allclose(found.key, whole.key[:, found.positions], atol=1e-4)
                np.testing.assert_allclose(found.value, whole.value[:, found.positions], atol=1e-4)


@pytest.mark.parametrize("dtype", ["int8", "int4", "float16"])
def test_stored_elements_are_within_half_a_scale(open_tiny: OpenTiny, dtype: CacheDtype) -> None:
    """Of the first layer: what later layers store depends on the rounding of those before."""
    exact = Decoder(open_tiny(ExportRecipe(cache=CachePlan("static"))).model, 30)
    rounded = Decoder(open_tiny(ExportRecipe(cache=CachePlan("static", dtype))).model, 30)
    exact.prefill(TOKENS)
    rounded.prefill(TOKENS)
    truth, found = exact.read_cache(0), rounded.read_cache(0)
    pairs = [(truth.key, found.key, found.key_scale), (truth.value, found.value, found.value_scale)]
    for sought, got, scale in pairs:
        most = (1 << (7 if dtype == "int8" else 3)) * scale[:, None, :]
        clipped = np.clip(sought, -most, most - scale[:, None, :])
        if dtype == "float16":
            np.testing.assert_array_equal(got, sought.astype(np.float16))
        else:
            assert (np.abs(got - clipped) <= 0.501 * scale[:, None, :]).all()
            assert np.abs(got - clipped).max() > 0.3 * scale.min()  # it does round


@pytest.mark.parametrize(("layer", "row"), [(-1, 0), (6, 0), (0, 1), (0, -1)])
def test_a_layer_or_row_there_is_not_is_refused(open_tiny: OpenTiny, layer: int, row: int) -> None:
    decoder = Decoder(open_tiny(ExportRecipe(cache=CachePlan("static"))).model, 30)
    with pytest.raises(InvalidRequest, match="sought a"):
        decoder.read_cache(layer, row)

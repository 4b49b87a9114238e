"""The decoder's contract: what it allocates, what it refuses, and that refusing changes nothing."""

from __future__ import annotations

import numpy as np
import pytest

from kvengine.decoder import Decoder
from kvengine.engine import LocalEngine
from kvengine.errors import (
    ContextOverflow,
    EmptyPrompt,
    EngineFailure,
    InvalidRequest,
    InvalidToken,
)
from kvengine.plan import BITS, CacheDtype, CachePlan, PlanKind
from kvengine.program import (
    Compact,
    Damage,
    Decode,
    Extend,
    Fork,
    Load,
    Operation,
    Program,
    Reorder,
    Reset,
    Reuse,
    Speculate,
    Switch,
)
from kvengine.recipe import ExportRecipe
from tests.conftest import OpenTiny

PROMPT = tuple(range(3, 25))  # 22 tokens: more than four windows of 5


@pytest.fixture(scope="module")
def hybrid(open_tiny: OpenTiny) -> LocalEngine:
    return open_tiny(ExportRecipe(cache=CachePlan("hybrid", slack=2)))


@pytest.mark.parametrize("kind", ["static", "hybrid"])
@pytest.mark.parametrize("dtype", BITS)
def test_the_estimate_is_what_the_decoder_allocates(
    open_tiny: OpenTiny, kind: PlanKind, dtype: CacheDtype
) -> None:
    plan = CachePlan(kind, dtype, slack=3 if kind == "hybrid" else 0)
    model = open_tiny(ExportRecipe(cache=plan)).model
    for capacity, batch in ((1, 1), (40, 1), (33, 3)):
        decoder = Decoder(model, capacity, batch=batch)
        arrays = [array for pair in decoder.cache.arrays() for array in pair]
        assert sum(array.nbytes for array in arrays) == plan.total_bytes(model.spec, capacity, batch)
        assert decoder.kv_bytes == plan.total_bytes(model.spec, capacity, batch)


def test_the_growing_cache_holds_exactly_its_tokens(open_tiny: OpenTiny) -> None:
    plan = CachePlan("growing")
    model = open_tiny(ExportRecipe(cache=plan)).model
    decoder = Decoder(model, 40)
    assert decoder.kv_bytes == 0
    decoder.prefill(PROMPT)
    assert decoder.kv_bytes == plan.total_bytes(model.spec, len(PROMPT))


def test_buffers_never_move(hybrid: LocalEngine) -> None:
    decoder = Decoder(hybrid.model, 40)
    before = [array.ctypes.data for pair in decoder.cache.arrays() for array in pair]
    decoder.start(PROMPT)
    decoder.step()
    decoder.reset()
    decoder.prefill(PROMPT, chunk=3)
    assert [array.ctypes.data for pair in decoder.cache.arrays() for array in pair] == before


def test_rows_beyond_the_resident_ones_are_never_written(hybrid: LocalEngine) -> None:
    decoder = Decoder(hybrid.model, 40)
    decoder.poison()
    decoder.prefill(PROMPT, chunk=4)
    decoder.decode(7)
    total = len(PROMPT) + 1
    for layer, (key, value) in zip(hybrid.model.spec.layers, decoder.cache.arrays(), strict=True):
        alive = decoder.plan.resident(layer, 40, total)
        assert alive >= min(layer.window or total, total)
        assert np.isfinite(key[:, :, :alive]).all()
        assert np.isfinite(value[:, :, :alive]).all()
        if layer.window is None:
            assert np.isnan(key[:, :, alive:]).all()


REFUSED = [
    ([], EmptyPrompt),
    ([5, -1], InvalidToken),
    ([5, 331], InvalidToken),
    ([[1, 2], [3, 4]], InvalidRequest),
    (list(range(20)), ContextOverflow),
]


@pytest.mark.parametrize(("tokens", "refusal"), REFUSED)
def test_a_refused_request_changes_nothing(
    hybrid: LocalEngine, tokens: list[int], refusal: type[Exception]
) -> None:
    decoder, undisturbed = Decoder(hybrid.model, 30), Decoder(hybrid.model, 30)
    for each in (decoder, undisturbed):
        each.prefill(PROMPT)
    with pytest.raises(refusal, match="sought"):
        decoder.prefill(tokens)
    with pytest.raises(refusal):
        decoder.start(tokens)
    assert decoder.position == len(PROMPT)
    np.testing.assert_array_equal(decoder.decode(9), undisturbed.decode(9))


def test_a_negative_chunk_is_refused(hybrid: LocalEngine) -> None:
    decoder = Decoder(hybrid.model, 30)
    with pytest.raises(InvalidRequest, match="chunk"):
        decoder.prefill(PROMPT, chunk=-1)
    assert decoder.position == 0


def test_a_full_context_refuses_the_next_step_and_survives_it(hybrid: LocalEngine) -> None:
    decoder = Decoder(hybrid.model, len(PROMPT))
    first = decoder.start(PROMPT)
    with pytest.raises(ContextOverflow, match=f"capacity is {len(PROMPT)}"):
        decoder.step()
    assert decoder.newest_token() == first


@pytest.mark.parametrize("bad", [{"capacity": 0}, {"capacity": 10**6}, {"batch": 0}, {"slack": -1}])
def test_senseless_sizes_are_refused(hybrid: LocalEngine, bad: dict[str, int]) -> None:
    with pytest.raises(InvalidRequest, match="sought"):
        Decoder(hybrid.model, **{"capacity": 10, **bad})


def test_a_device_without_memory_left_says_nothing_about_the_engine(hybrid: LocalEngine) -> None:
    decoder = Decoder(hybrid.model, 30)
    run = decoder.model.session.run_with_iobinding

    def starved(*arguments: object) -> None:
        raise RuntimeError("bfc_arena.cc:360 Failed to allocate memory for requested buffer of size 921600")

    decoder.model.session.run_with_iobinding = starved
    try:
        with pytest.raises(MemoryError, match="921600"):
            decoder.prefill(PROMPT)
    finally:
        decoder.model.session.run_with_iobinding = run


def test_after_a_failure_inside_onnxruntime_only_reset_is_accepted(hybrid: LocalEngine) -> None:
    decoder = Decoder(hybrid.model, 30)
    decoder.prefill(PROMPT)
    expected = decoder.decode(9)
    decoder.reset()
    decoder.prefill(PROMPT)
    decoder._total.read()[:] = 0
    advance = decoder.model.session.run_with_iobinding

    def broken(*arguments: object) -> None:
        raise RuntimeError("injected")

    decoder.model.session.run_with_iobinding = broken
    try:
        with pytest.raises(EngineFailure, match="injected"):
            decoder.decode(9)
    finally:
        decoder.model.session.run_with_iobinding = advance
    with pytest.raises(EngineFailure, match="reset first"):
        decoder.decode(9)
    decoder.reset()
    decoder.prefill(PROMPT)
    np.testing.assert_array_equal(decoder.decode(9), expected)


def test_greedy_feedback_follows_the_argmax_of_the_logits(hybrid: LocalEngine) -> None:
    fed_back, by_hand = Decoder(hybrid.model, 40), Decoder(hybrid.model, 40)
    token = int(fed_back.start(PROMPT, chunk=5)[0])
    assert token == int(by_hand.prefill(PROMPT)[0].argmax())
    for _ in range(15):
        following = int(fed_back.step()[0])
        assert following == int(by_hand.decode(token)[0].argmax())
        token = following


@pytest.mark.parametrize("kind", ["growing", "static", "hybrid"])
def test_a_batch_equals_its_rows_alone(open_tiny: OpenTiny, kind: PlanKind) -> None:
    model = open_tiny(ExportRecipe(cache=CachePlan(kind))).model
    rows = np.array([PROMPT, PROMPT[::-1], (8,) * len(PROMPT)])
    together = Decoder(model, 30, batch=3)
    found = together.prefill(rows, chunk=7, logits="all").reshape(3, len(PROMPT), -1)
    next_step = together.decode([5, 6, 7])
    for index, row in enumerate(rows):
        alone = Decoder(model, 30)
        np.testing.assert_allclose(found[index], alone.prefill(row, logits="all"), atol=1e-4)
        np.testing.assert_allclose(next_step[index], alone.decode(5 + index)[0], atol=1e-4)


def test_two_decoders_on_one_model_do_not_disturb_each_other(hybrid: LocalEngine) -> None:
    one, other, alone = (Decoder(hybrid.model, 40) for _ in range(3))
    alone_logits = [alone.prefill(PROMPT), alone.decode(3), alone.decode(4)]
    found = [one.prefill(PROMPT)]
    other.prefill(PROMPT[::-1])
    found.append(one.decode(3))
    other.decode(300)
    found.append(one.decode(4))
    for sought, got in zip(alone_logits, found, strict=True):
        np.testing.assert_array_equal(sought, got)


NAMES_NOBODY = [
    (Switch("a"), "InvalidRequest"),
    (Fork("main"), "InvalidRequest"),
    (Load("a"), "StateError"),
    (Damage("a", 0), "StateError"),
    (Reset(1), "InvalidRequest"),
    (Decode((5,), row=1), "InvalidRequest"),
    (Extend(((5,), (6,))), "InvalidRequest"),
    (Reorder((0, 0)), "InvalidRequest"),
    (Compact(0), "InvalidRequest"),
    (Speculate(5, 2, draft=0), "InvalidRequest"),
    (Reuse(()), "EmptyPrompt"),
    (Reuse((5,) * 11), "ContextOverflow"),
]


@pytest.mark.parametrize(("operation", "refusal"), NAMES_NOBODY, ids=lambda o: getattr(o, "kind", ""))
def test_what_there_is_not_is_refused_and_the_program_goes_on(
    hybrid: LocalEngine, operation: Operation, refusal: str
) -> None:
    first, refused, step = hybrid.run_program(Program(10, (Decode((4,)), operation, Decode((5,)))))
    assert refused.error is not None
    assert refused.error.type == refusal
    assert (first.position, step.error, step.position) == (1, None, 2)

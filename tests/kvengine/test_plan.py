"""Cache plans: bytes to the last one, and which rows are alive."""

from __future__ import annotations

import pytest

from kvengine.plan import CacheDtype, CachePlan, LayerPlan
from kvengine.spec import LayerSpec, ModelSpec, RopeSpec

MIB = 1 << 20


def gemma_3_1b(kv_heads: int = 1) -> ModelSpec:
    """Every 6th of 26 layers is global: 22 local layers with window 512, 4 global ones."""
    layers = tuple(
        LayerSpec(None if index % 6 == 5 else 512, int(index % 6 == 5), kv_heads, 256) for index in range(26)
    )
    return ModelSpec(
        family="gemma3_text",
        vocab_size=262144,
        hidden_size=1152,
        intermediate_size=6912,
        num_heads=4,
        max_position=32768,
        attention_scale=256**-0.5,
        norm_eps=1e-6,
        tied_head=True,
        layers=layers,
        ropes=(RopeSpec(1e4), RopeSpec(1e6)),
    )


@pytest.mark.parametrize(
    ("kv_heads", "dtype", "mib"),
    [(4, "float32", 208), (1, "float32", 52), (1, "float16", 26), (1, "int8", 13), (1, "int4", 6.5)],
)
def test_a_static_gemma_3_1b_cache_of_1024_tokens(kv_heads: int, dtype: CacheDtype, mib: float) -> None:
    assert CachePlan("static", dtype).total_bytes(gemma_3_1b(kv_heads), 1024) == mib * MIB


def test_a_hybrid_gemma_3_1b_cache_holds_22_windows_and_4_contexts() -> None:
    rows = 22 * (512 + 16) + 4 * 1024
    assert CachePlan("hybrid", "float16", slack=16).total_bytes(gemma_3_1b(), 1024) == rows * 256 * 2 * 2


def test_a_short_context_still_holds_the_whole_window() -> None:
    local = gemma_3_1b().layers[0]
    assert CachePlan("hybrid", slack=8).rows(local, 100) == 520
    assert CachePlan("static").rows(local, 100) == 100


def test_a_step_reads_what_its_windows_see_whatever_is_held() -> None:
    spec = gemma_3_1b()
    row = 256 * 2 * 4  # K and V of one token in one layer, float32
    assert CachePlan("static").step_bytes(spec, 100) == 26 * 100 * row
    assert CachePlan("hybrid", slack=64).step_bytes(spec, 1000) == (22 * 512 + 4 * 1000) * row
    assert CachePlan("growing", "int4").step_bytes(spec, 1000) == (22 * 512 + 4 * 1000) * row // 8


def test_the_plan_of_each_layer_is_said() -> None:
    layers = gemma_3_1b().layers
    plan = CachePlan("hybrid", "int8", slack=8)
    assert plan.of_layer(layers[0]) == LayerPlan("windowed", "int8", 520)
    assert plan.of_layer(layers[5]) == LayerPlan("static", "int8", None)
    assert CachePlan("growing").of_layer(layers[0]) == LayerPlan("growing", "float32", None)


def brute_force_resident(window: int, rows: int, total: int) -> int:
    """GroupQueryAttention's rule, played out: a full buffer drops rows - window + 1 tokens at once."""
    resident = 0
    for _ in range(total):
        if resident == rows:
            resident -= rows - window + 1
        resident += 1
    return resident


@pytest.mark.parametrize("slack", [0, 1, 2, 5, 9])
@pytest.mark.parametrize("window", [1, 2, 5])
def test_resident_rows_are_those_that_eviction_leaves(window: int, slack: int) -> None:
    plan, layer = CachePlan("hybrid", slack=slack), LayerSpec(window, 0, 1, 8)
    for total in range(60):
        resident = plan.resident(layer, 100, total)
        assert resident == brute_force_resident(window, window + slack, total)
        assert min(total, window) <= resident <= min(total, window + slack)

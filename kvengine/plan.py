"""Cache plans: how many rows of KV cache each layer keeps, of which element type, and what that weighs.

The memory estimate and the Decoder's allocation both come from here, so they cannot disagree.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from kvengine.spec import LayerSpec, ModelSpec

PlanKind = Literal["growing", "static", "hybrid"]
CacheDtype = Literal["float32", "float16", "int8", "int4"]
BITS: dict[CacheDtype, int] = {"float32": 32, "float16": 16, "int8": 8, "int4": 4}


@dataclass(frozen=True)
class LayerPlan:
    """What one layer of an artifact keeps: for readers of artifact.json that are not kvengine.

    rows: allocated rows, None where the capacity decides.
    """

    kind: Literal["growing", "static", "windowed"]
    dtype: CacheDtype
    rows: int | None


@dataclass(frozen=True)
class CachePlan:
    """How the KV cache of every layer is laid out.

    kind: ``growing`` (present is a new, longer buffer each step: the naive baseline),
        ``static`` (every layer one buffer of ``capacity`` rows) or ``hybrid`` (layers with a
        sliding window hold ``window + slack`` rows, the others ``capacity``).
    slack: rows above the window; eviction then moves rows only every ``slack + 1`` steps.
    """

    kind: PlanKind
    dtype: CacheDtype = "float32"
    slack: int = 0

    def is_windowed(self, layer: LayerSpec) -> bool:
        return self.kind == "hybrid" and layer.window is not None

    def of_layer(self, layer: LayerSpec) -> LayerPlan:
        if self.is_windowed(layer):
            return LayerPlan("windowed", self.dtype, self.rows(layer, 0))
        return LayerPlan("growing" if self.kind == "growing" else "static", self.dtype, None)

    def rows(self, layer: LayerSpec, capacity: int) -> int:
        """Rows this layer allocates for a context of ``capacity`` tokens.

        A windowed layer holds its whole window even when the context is shorter: onnxruntime's
        GroupQueryAttention refuses a sliding_window_cache with fewer rows than the window.
        """
        if self.is_windowed(layer):
            assert layer.window is not None
            return layer.window + self.slack
        return capacity

    def resident(self, layer: LayerSpec, capacity: int, total: int) -> int:
        """Rows [0, L) that hold tokens after ``total`` tokens; rows beyond are dead.

        For a windowed layer this is L(T) of GroupQueryAttention's documentation
        ("Windowed KV Cache"): G = C - W + 1; L = T if T <= C else T - G * ceil((T - C) / G).
        """
        if not self.is_windowed(layer):
            return total
        assert layer.window is not None
        rows = self.rows(layer, capacity)
        if total <= rows:
            return total
        gap = rows - layer.window + 1
        return total - gap * math.ceil((total - rows) / gap)

    def layer_bytes(self, layer: LayerSpec, capacity: int, batch: int = 1) -> int:
        """Bytes of K plus V of one layer: 2 * batch * kv_heads * rows * head_dim * bits / 8."""
        elements = batch * layer.kv_heads * self.rows(layer, capacity) * layer.head_dim
        return 2 * (elements * BITS[self.dtype] // 8)

    def total_bytes(self, spec: ModelSpec, capacity: int, batch: int = 1) -> int:
        """Exactly the bytes of KV cache that a Decoder with this plan allocates."""
        return sum(self.layer_bytes(layer, capacity, batch) for layer in spec.layers)

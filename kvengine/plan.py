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
# In a batch a step is padded to its longest row, and the op wants room for that padding also behind a row
# that is full. More rows here make fewer, longer steps while one row is full and another prefills.
PADDING_ROWS = 8
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

    def rows(self, layer: LayerSpec, capacity: int, batch: int = 1) -> int:
        """Rows this layer allocates for a context of ``capacity`` tokens, for each of ``batch`` sequences.

        A windowed layer holds its whole window even when the context is shorter: onnxruntime's
        GroupQueryAttention refuses a sliding_window_cache with fewer rows than the window.
        """
        if self.is_windowed(layer):
            assert layer.window is not None
            return layer.window + self.slack
        return capacity + PADDING_ROWS if batch > 1 and self.kind != "growing" else capacity

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

    def oldest(self, layer: LayerSpec, capacity: int, total: int) -> int:
        """The position in row 0 after ``total`` tokens: base(T) = T - L(T); everything before is evicted."""
        return total - self.resident(layer, capacity, total)

    def rewind_limit(self, layer: LayerSpec, capacity: int, total: int, floor: int = 0) -> int:
        """The shortest length that a layer of ``total`` tokens can be rewound to and still be exact.

        floor: the oldest position that is really there, where an earlier rewind or compaction left
        fewer than the formula says.

        The bound, and why it is right: let b = max(base(T), floor), so that positions [b, T) are
        there. Rewound to T', the next query stands at T' and its window W reads positions
        T'-W+1 .. T'-1 from the cache; later queries read newer ones only. So (W > 1) T' is exact if
        and only if b = 0 or b <= T'-W+1, that is T' >= b + W - 1, for any layout of the rows.

        The rows may have to move. base(T) is a multiple m*G of G = C-W+1, and base(T') = m*G exactly
        for T' > C + (m-1)*G = base(T) + W - 1: there the buffer is already as the op wants it (its
        documentation's L(T-k) = L(T) - k). Only T' = base(T) + W - 1 falls one eviction back: its
        C rows begin at base(T) - G, so the W-1 that are left move up by G, and the G rows below them
        lie outside every window to come. Two naive bounds are wrong: "the last W tokens" (T - T' <= W)
        reads evicted positions, and "within the C rows" (T' >= T - C) does too, as both count rows
        where only base(T) tells which positions they hold.
        """
        if layer.window is None:
            return 0
        there = floor
        if self.is_windowed(layer):
            there = max(floor, self.oldest(layer, capacity, total))
        return there + layer.window - 1 if there else 0

    def layer_bytes(self, layer: LayerSpec, capacity: int, batch: int = 1) -> int:
        """Bytes of K plus V of one layer: 2 * batch * kv_heads * rows * head_dim * bits / 8."""
        elements = batch * layer.kv_heads * self.rows(layer, capacity, batch) * layer.head_dim
        return 2 * (elements * BITS[self.dtype] // 8)

    def step_bytes(self, spec: ModelSpec, total: int) -> int:
        """Bytes of K plus V that one step has to read where ``total`` tokens are in the cache, its own among
        them: a layer with a window looks back no further, whatever it holds."""
        rows = sum(
            layer.kv_heads * layer.head_dim * min(total, layer.window or total) for layer in spec.layers
        )
        return 2 * (rows * BITS[self.dtype] // 8)

    def total_bytes(self, spec: ModelSpec, capacity: int, batch: int = 1) -> int:
        """Exactly the bytes of KV cache that a Decoder with this plan allocates."""
        return sum(self.layer_bytes(layer, capacity, batch) for layer in spec.layers)

"""Rotary tables, computed here so that one graph serves any capacity."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from kvengine.spec import RopeSpec

Float32Array = npt.NDArray[np.float32]


def rope_tables(rope: RopeSpec, positions: int, head_dim: int) -> tuple[Float32Array, Float32Array]:
    """cos and sin, each float32 [positions, head_dim // 2].

    Computed in float32 step by step as transformers does (``compute_default_rope_parameters``),
    because models were trained with that rounding: at position 32,000 float64 differs by 1e-3 rad.
    """
    exponents = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    inverse_frequency = np.float32(1.0) / np.power(np.float32(rope.theta), exponents, dtype=np.float32)
    inverse_frequency /= np.float32(rope.factor)
    angles = np.arange(positions, dtype=np.float32)[:, None] * inverse_frequency[None, :]
    return np.cos(angles), np.sin(angles)

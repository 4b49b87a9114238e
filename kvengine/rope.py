"""Rotary tables, computed here so that one graph serves any capacity."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from kvengine.spec import Llama3Scaling, LongRopeScaling, RopeSpec, YarnScaling

Float32Array = npt.NDArray[np.float32]


def rope_tables(rope: RopeSpec, positions: int, head_dim: int) -> tuple[Float32Array, Float32Array]:
    """cos and sin, each float32 [positions, rotary_dim // 2].

    Computed in float32 step by step as transformers does (``modeling_rope_utils``), because
    models were trained with that rounding: at position 32,000 float64 differs by 1e-3 rad.
    """
    angles = np.arange(positions, dtype=np.float32)[:, None] * inverse_frequencies(rope, head_dim)[None, :]
    magnitude = np.float32(rope.magnitude)
    return np.cos(angles) * magnitude, np.sin(angles) * magnitude


def inverse_frequencies(rope: RopeSpec, head_dim: int) -> Float32Array:
    """Radians per position of each rotating channel pair, float32 [rotary_dim // 2]."""
    width = rope.rotary_dim or head_dim
    exponents = np.arange(0, width, 2, dtype=np.float32) / np.float32(width)
    periods = np.power(np.float32(rope.theta), exponents, dtype=np.float32)
    match rope.scaling:
        case None:
            frequencies = np.float32(1.0) / periods
        case LongRopeScaling(factors):
            frequencies = np.float32(1.0) / (np.array(factors, np.float32) * periods)
        case YarnScaling():
            frequencies = _yarn(periods, rope.scaling, rope.theta, width)
        case Llama3Scaling():
            frequencies = _llama3(np.float32(1.0) / periods, rope.scaling)
    scaled: Float32Array = frequencies / np.float32(rope.factor)
    return scaled


def _llama3(frequencies: Float32Array, scaling: Llama3Scaling) -> Float32Array:
    wavelengths = np.float32(2 * math.pi) / frequencies
    factor, span = np.float32(scaling.factor), np.float32(scaling.high - scaling.low)
    share = (np.float32(scaling.original) / wavelengths - np.float32(scaling.low)) / span
    blended = (1 - share) * frequencies / factor + share * frequencies
    slow = wavelengths > np.float32(scaling.original / scaling.low)
    fast = wavelengths < np.float32(scaling.original / scaling.high)
    return np.where(slow, frequencies / factor, np.where(fast, frequencies, blended)).astype(np.float32)


def _yarn(periods: Float32Array, scaling: YarnScaling, theta: float, width: int) -> Float32Array:
    def channel(turns: float) -> float:
        """The channel pair, as a real number, that turns so often within the original context."""
        return width * math.log(scaling.original / (turns * 2 * math.pi)) / (2 * math.log(theta))

    first, last = channel(scaling.fast), channel(scaling.slow)
    if scaling.truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, width - 1)
    if first == last:
        last += 0.001  # transformers' guard against a division by zero
    ramp = (np.arange(width // 2, dtype=np.float32) - np.float32(first)) / np.float32(last - first)
    kept = 1 - np.clip(ramp, 0, 1)
    stretched = np.float32(1.0) / (np.float32(scaling.factor) * periods)
    blended: Float32Array = stretched * (1 - kept) + np.float32(1.0) / periods * kept
    return blended

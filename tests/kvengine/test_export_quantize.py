"""Blockwise rounding keeps every weight within half a scale, in MatMulNBits' layout."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from kvengine.export.quantize import Float32, blocks_of, dequantize_rows, quantize_rows

WEIGHTS = arrays(
    np.float32,
    array_shapes(min_dims=2, max_dims=2, max_side=80),
    elements=st.floats(-1e4, 1e4, width=32),
)


def errors_in_scales(weights: Float32, bits: int, block: int, dtype: str = "float32") -> Float32:
    """|w - w'| / |scale| per weight; 0 where the scale is 0 and the weight next to nothing."""
    quantized = quantize_rows(weights, bits, block, dtype)
    kept = dequantize_rows(quantized.codes, quantized.scales, bits, weights.shape[1])
    scales = np.abs(np.repeat(quantized.scales, block, axis=1)[:, : weights.shape[1]])
    error = np.abs(weights - kept)
    unscaled: Float32 = np.where(error > 1e-35, np.inf, 0).astype(np.float32)
    ratio: Float32 = np.divide(error, scales, out=unscaled, where=scales > 0)
    return ratio


@given(weights=WEIGHTS, bits=st.sampled_from([4, 8]), block=st.sampled_from([32, 64, 128]))
@settings(max_examples=60, deadline=None)
def test_no_weight_moves_more_than_half_a_scale(weights: Float32, bits: int, block: int) -> None:
    assert errors_in_scales(weights, bits, block).max() <= 0.5 + 1e-4


@pytest.mark.parametrize("bits", [4, 8])
def test_scales_are_as_small_as_the_codes_allow(bits: int) -> None:
    weights = np.random.default_rng(0).standard_normal((64, 256), dtype=np.float32)
    scales = np.abs(quantize_rows(weights, bits, 32).scales)
    extreme = np.abs(weights.reshape(64, 8, 32)).max(axis=2)
    longer_side, shorter_side = 1 << (bits - 1), (1 << (bits - 1)) - 1
    assert (scales >= extreme / longer_side * (1 - 1e-6)).all()
    assert (scales <= extreme / shorter_side * (1 + 1e-6)).all()
    # Either sign of the extreme can take the longer side: mirrored weights get mirrored scales.
    mirrored = quantize_rows(-weights, bits, 32).scales
    assert np.array_equal(np.abs(mirrored), scales)
    assert np.isclose(scales, extreme / longer_side).mean() > (0.5 if bits == 4 else 0.1)


def test_scales_stored_as_float16_are_those_divided_by() -> None:
    weights = np.random.default_rng(1).standard_normal((16, 128), dtype=np.float32)
    quantized = quantize_rows(weights, 8, 32, np.float16)
    assert np.array_equal(quantized.scales, quantized.scales.astype(np.float16))
    # A scale rounded down by 2**-11 leaves the largest weight up to 128 * 2**-11 scales away.
    assert errors_in_scales(weights, 8, 32, "float16").max() <= 0.5 + 128 * 2**-11


def test_four_bit_codes_are_packed_low_nibble_first() -> None:
    weights = np.zeros((1, 32), np.float32)
    weights[0, :3] = [-8, 7, 3]
    quantized = quantize_rows(weights, 4, 32)
    assert quantized.scales.tolist() == [[1.0]]
    assert quantized.codes[0, 0, :2].tolist() == [0x0 | 0xF << 4, 0xB | 0x8 << 4]


def test_zeros_stay_zero_and_pad_the_last_block() -> None:
    weights = np.zeros((3, 40), np.float32)
    weights[1, 39] = 2.0
    quantized = quantize_rows(weights, 8, 32)
    assert quantized.codes.shape == (3, blocks_of(40, 32), 32) == (3, 2, 32)
    assert (quantized.codes[:, 1, 8:] == 128).all()
    assert np.array_equal(dequantize_rows(quantized.codes, quantized.scales, 8, 40), weights)

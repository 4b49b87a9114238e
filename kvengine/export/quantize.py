"""Blockwise rounding of weight matrices to 8 or 4 bits, in the layout of MatMulNBits.

Every block of ``block_size`` neighbouring weights of a row shares one scale ``s`` and zero point
``z``; a weight ``w`` is stored as the code ``q = round(w / s) + z``, so that
``|w - (q - z) s| <= |s| / 2``: the scale is chosen so that no code is clipped.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

# Weight formats that are stored in blocks; the others are floats.
WEIGHT_BITS = {"int8": 8, "int4": 4}

UInt8 = npt.NDArray[np.uint8]
Float32 = npt.NDArray[np.float32]


@dataclass(frozen=True)
class QuantizedRows:
    """r rows of a matrix with k columns in b = ceil(k / block_size) blocks.

    codes: uint8 [r, b, block_size * bits / 8], low nibble first for 4 bits; the columns that pad
        the last block hold the code of zero.
    scales: float32 [r, b].
    """

    codes: UInt8
    scales: Float32


def blocks_of(columns: int, block_size: int) -> int:
    return -(-columns // block_size)


def zero_point(bits: int) -> int:
    """The code of 0.0; what MatMulNBits and GatherBlockQuantized assume when given no zero points."""
    return 1 << (bits - 1)


def quantize_rows(
    weights: Float32, bits: int, block_size: int, scale_dtype: npt.DTypeLike = np.float32
) -> QuantizedRows:
    """Symmetric blockwise codes of ``weights`` [r, k].

    Codes reach one further below zero than above it, so the sign of each block's scale is chosen
    to put the larger extreme on the longer side: with 4 bits the scale is then up to an eighth smaller.
    Scales are rounded to ``scale_dtype`` before the weights are divided by them.
    """
    rows, columns = weights.shape
    blocks = blocks_of(columns, block_size)
    if columns % block_size:
        weights = np.pad(weights, ((0, 0), (0, blocks * block_size - columns)))
    grouped = weights.reshape(rows, blocks, block_size)
    scales = _scales(grouped, bits, scale_dtype)
    codes = grouped * _reciprocal(scales)[:, :, None]
    np.rint(codes, out=codes)
    codes += zero_point(bits)
    # Only the rounding of the scale itself can push a code out, by less than one.
    np.clip(codes, 0, (1 << bits) - 1, out=codes)
    packed: UInt8 = codes.astype(np.uint8)
    if bits == 4:
        packed = packed[:, :, 0::2] | (packed[:, :, 1::2] << np.uint8(4))
    return QuantizedRows(packed, scales)


def dequantize_rows(codes: UInt8, scales: npt.NDArray[Any], bits: int, columns: int) -> Float32:
    """The weights [r, columns] that the codes stand for."""
    if bits == 4:
        codes = np.stack([codes & 15, codes >> 4], axis=-1).reshape(*codes.shape[:2], -1)
    values = (codes.astype(np.float32) - zero_point(bits)) * scales.astype(np.float32)[:, :, None]
    return values.reshape(len(codes), -1)[:, :columns]


def _scales(grouped: Float32, bits: int, dtype: npt.DTypeLike) -> Float32:
    below = zero_point(bits)
    above = below - 1
    high = np.maximum(grouped.max(axis=2), 0)
    low = np.maximum(-grouped.min(axis=2), 0)
    upright = np.maximum(high / above, low / below)
    mirrored = np.maximum(low / above, high / below)
    scales: Float32 = np.where(upright <= mirrored, upright, -mirrored)
    scales = scales.astype(dtype).astype(np.float32)
    # Weights below 1e-36 are zero; the reciprocal of a subnormal scale would overflow.
    scales[np.abs(scales) < np.finfo(np.float32).tiny] = 0
    return scales


def _reciprocal(scales: Float32) -> Float32:
    # A block of zeros gets codes of zero.
    return np.divide(1.0, scales, out=np.zeros_like(scales), where=scales != 0)

"""Elements of a KV cache as they are stored, and back: int8 and int4 by one scale a channel."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from kvengine.errors import ArtifactError
from kvengine.plan import BITS, CacheDtype
from kvengine.spec import LayerSpec

Float32Array = npt.NDArray[np.float32]
Codes = npt.NDArray[Any]
Scales = tuple[Float32Array, Float32Array]  # of K and V, each [kv_heads, head_dim]

SCALES = "cache_scales.f32"  # the artifact's blob; the graph holds the same numbers as initializers
STORAGE: dict[CacheDtype, type] = {
    "float32": np.float32,
    "float16": np.float16,
    "int8": np.int8,
    "int4": np.uint8,  # two codes a byte
}
_INT4_ZERO = 8  # GroupQueryAttention stores an int4 code plus 8, element 2i in the low nibble of byte i


def dequantize(codes: Codes, scale: Float32Array, dtype: CacheDtype) -> Float32Array:
    """float32 [kv_heads, rows, head_dim] from what is stored; scale [kv_heads, head_dim]."""
    if dtype == "int4":
        nibbles = np.stack([codes & 0xF, codes >> 4], axis=-1)
        nibbles = nibbles.reshape(*codes.shape[:-1], 2 * codes.shape[-1])
        codes = nibbles.astype(np.int8) - _INT4_ZERO
    elements: Float32Array = codes.astype(np.float32)
    if dtype in ("int8", "int4"):
        elements *= scale[:, None, :]
    return elements


def quantize(elements: Float32Array, scale: Float32Array, dtype: CacheDtype) -> Codes:
    """The inverse of ``dequantize``, rounded to nearest and clipped, as GroupQueryAttention stores it."""
    if dtype not in ("int8", "int4"):
        floats: Codes = elements.astype(STORAGE[dtype])
        return floats
    most = 1 << (BITS[dtype] - 1)
    codes: Codes = np.clip(np.rint(elements / scale[:, None, :]), -most, most - 1).astype(np.int8)
    if dtype == "int8":
        return codes
    nibbles = (codes + _INT4_ZERO).astype(np.uint8)
    packed: Codes = nibbles[..., ::2] | nibbles[..., 1::2] << 4
    return packed


def no_scales(layers: Sequence[LayerSpec]) -> list[Scales]:
    """Ones, for float caches."""
    ones = [np.ones((layer.kv_heads, layer.head_dim), np.float32) for layer in layers]
    return [(one, one) for one in ones]


def packed_scales(scales: Sequence[tuple[Float32Array, Float32Array]]) -> bytes:
    """The blob: little-endian float32, K then V of each layer, each [kv_heads, head_dim]."""
    return b"".join(part.astype("<f4").tobytes() for pair in scales for part in pair)


def write_scales(folder: Path, scales: Sequence[tuple[Float32Array, Float32Array]]) -> Path:
    path = folder / SCALES
    path.write_bytes(packed_scales(scales))
    return path


def read_scales(folder: Path, layers: Sequence[LayerSpec]) -> list[Scales]:
    """Raises ArtifactError where the blob is missing or not of these layers' size."""
    path = folder / SCALES
    try:
        flat = np.frombuffer(path.read_bytes(), "<f4").astype(np.float32)
    except (OSError, ValueError) as error:
        raise ArtifactError(f"sought the cache's scales in {path}: {error}; export again") from error
    sizes = [layer.kv_heads * layer.head_dim for layer in layers for _ in "KV"]
    if flat.size != sum(sizes):
        raise ArtifactError(f"{path}: sought {sum(sizes)} scales, found {flat.size}; export again")
    parts = iter(np.split(flat, np.cumsum(sizes)[:-1]))
    shapes = [(layer.kv_heads, layer.head_dim) for layer in layers]
    return [(next(parts).reshape(shape), next(parts).reshape(shape)) for shape in shapes]

"""A decoder's state as a file.

Layout: magic, length of the header (little-endian uint32), the header as JSON, the arrays one after
the other, and the sha256 of all before. The arrays are rows.tokens, origins and floors, the newest
greedy tokens, then K and V of each layer up to its last valid row. Their shapes follow from the decoder
and the header, never from sizes in the file.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt

from kvengine.codec import DecodeError, decode, encode
from kvengine.codes import STORAGE
from kvengine.errors import StateError
from kvengine.plan import CachePlan

if TYPE_CHECKING:
    from kvengine.decoder import Decoder

Array = npt.NDArray[Any]
MAGIC = b"KVFSTATE"
_LENGTH = struct.Struct("<I")
_DIGEST = hashlib.sha256().digest_size


@dataclass(frozen=True)
class Header:
    """Whose state it is (artifact, plan, capacity, batch) and how many tokens each row holds."""

    artifact: str
    plan: CachePlan
    capacity: int
    batch: int
    held: tuple[int, ...]
    format: Literal["kvfarm-state/1"] = "kvfarm-state/1"


def save(decoder: Decoder, path: Path) -> None:
    """Write the state to ``path``, whole or not at all. Raises StateError."""
    header = json.dumps(encode(_header(decoder)), sort_keys=True).encode()
    arrays = [_little_endian(array) for array in _arrays(decoder)]
    digest = hashlib.sha256()
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with partial.open("wb") as file:
            for piece in (MAGIC, _LENGTH.pack(len(header)), header, *(a.tobytes() for a in arrays)):
                digest.update(piece)
                file.write(piece)
            file.write(digest.digest())
        partial.replace(path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise StateError(f"the state cannot be written to {path}: {error}") from error


def load(decoder: Decoder, path: Path) -> None:
    """Replace the state of ``decoder``; everything is checked before anything is touched.

    Raises StateError.
    """
    header, payload = _read(path)
    mine = _header(decoder)
    for name in ("artifact", "plan", "capacity", "batch"):
        sought, found = getattr(mine, name), getattr(header, name)
        if sought != found:
            raise StateError(f"{path}: sought a state of {name} {sought}, found one of {found}")
    if len(header.held) != decoder.batch or not all(0 <= n <= decoder.capacity for n in header.held):
        raise StateError(
            f"{path}: {header.held} tokens do not fit {decoder.batch} rows of {decoder.capacity}"
        )
    tokens, origins, floors, newest, *parts = _split(path, decoder, header.held, payload)
    rows = decoder.rows
    rows.held, rows.tokens, rows.origins, rows.floors = list(header.held), tokens, origins, floors
    for buffer in decoder.newest_buffers:
        buffer.write(newest)
    for layer in range(len(decoder.model.spec.layers)):
        decoder.cache.put(layer, parts[2 * layer], parts[2 * layer + 1])


def _header(decoder: Decoder) -> Header:
    held = tuple(decoder.rows.held)
    return Header(decoder.model.artifact.id, decoder.plan, decoder.capacity, decoder.batch, held)


def _arrays(decoder: Decoder) -> list[Array]:
    rows = decoder.rows
    arrays = [rows.tokens, rows.origins, rows.floors, decoder.newest_token().reshape(-1, 1)]
    for layer, (key, value) in enumerate(decoder.cache.arrays()):
        valid = _valid(decoder, layer, rows.held)
        arrays += [key[:, :, :valid], value[:, :, :valid]]
    return arrays


def _valid(decoder: Decoder, layer: int, held: Sequence[int]) -> int:
    """Cache rows of a layer that are valid in some batch row."""
    spec = decoder.model.spec.layers[layer]
    return max(decoder.plan.resident(spec, decoder.capacity, n) for n in held)


def _split(path: Path, decoder: Decoder, held: Sequence[int], payload: memoryview) -> list[Array]:
    """The arrays, copied; raises StateError unless they are exactly those of this decoder with ``held``."""
    batch, layers = decoder.batch, decoder.model.spec.layers
    integers = np.dtype("<i8")
    kinds: list[tuple[np.dtype[Any], tuple[int, ...]]] = [(integers, (batch, decoder.capacity))] * 2
    kinds += [(integers, (len(layers), batch)), (integers, (batch, 1))]
    stored = np.dtype(STORAGE[decoder.plan.dtype]).newbyteorder("<")
    for index, layer in enumerate(layers):
        width = layer.head_dim // 2 if decoder.plan.dtype == "int4" else layer.head_dim
        kinds += [(stored, (batch, layer.kv_heads, _valid(decoder, index, held), width))] * 2
    sizes = [dtype.itemsize * int(np.prod(shape)) for dtype, shape in kinds]
    if len(payload) != sum(sizes):
        raise StateError(f"{path}: sought {sum(sizes):,} bytes of arrays, found {len(payload):,}")
    arrays, start = [], 0
    for (dtype, shape), size in zip(kinds, sizes, strict=True):
        flat = np.frombuffer(payload[start : start + size], dtype)
        arrays.append(flat.reshape(shape).astype(dtype.newbyteorder("=")))
        start += size
    return arrays


def _read(path: Path) -> tuple[Header, memoryview]:
    """The header and the arrays' bytes, of a file whose checksum is right."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise StateError(f"sought a saved state in {path}: {error}") from error
    start = len(MAGIC) + _LENGTH.size
    if data[: len(MAGIC)] != MAGIC:
        raise StateError(f"sought a saved state in {path}, found a file that starts {data[:16]!r}")
    body = memoryview(data)[:-_DIGEST]
    if len(data) < start + _DIGEST or hashlib.sha256(body).digest() != data[-_DIGEST:]:
        raise StateError(f"{path} is truncated or was altered: its checksum is wrong; save it again")
    (length,) = _LENGTH.unpack_from(data, len(MAGIC))
    try:
        header = decode(Header, json.loads(bytes(body[start : start + length])))
    except (DecodeError, ValueError, RecursionError) as error:
        raise StateError(f"{path} is no state of format kvfarm-state/1: {error}") from error
    return header, body[start + length :]


def _little_endian(array: Array) -> Array:
    return np.ascontiguousarray(array, array.dtype.newbyteorder("<"))

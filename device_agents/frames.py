"""The wire format between a lab host and a runner: bounded, typed, checked, never pickled.

A frame is a fixed prelude, a JSON header and the raw bytes of its arrays::

    offset  bytes
    0       4      magic b"KVFR"
    4       1      protocol version
    5       1      kind: 1 request, 2 reply
    6       2      zero
    8       4      sequence number; a reply repeats its request's
    12      4      header length H
    16      8      payload length P
    24      4      CRC-32 of header and payload
    28      4      CRC-32 of the 28 bytes before it
    32      H      JSON: {"message": {...}, "arrays": [{"dtype": "<f4", "shape": [...]}, ...]}
    32+H    P      the arrays, little-endian, C order, one after the other

All integers are little-endian. The prelude has a checksum of its own so that a damaged length
is refused at once and not waited for. CRC-32 finds damage and stray prints; it is no
protection against a device that lies, so everything decoded is validated besides.
"""

from __future__ import annotations

import json
import math
import struct
import typing
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Any, Literal, NoReturn, Protocol

import numpy as np
import numpy.typing as npt

from device_agents.deadline import Deadline
from device_agents.errors import ProtocolError
from kvengine.codec import DecodeError, decode, encode

MAGIC = b"KVFR"
PROTOCOL_VERSION = 1
_PRELUDE = struct.Struct("<4sBBHIIQI")
_CHECKSUM = struct.Struct("<I")
PRELUDE_BYTES = _PRELUDE.size + _CHECKSUM.size
_PIECE = 1 << 22  # memory grows with what really arrives, not with what a header declares
_MAX_DIMENSIONS = 8

Array = npt.NDArray[Any]
Dtype = Literal["<f4", "<f2", "<f8", "<i4", "<i8", "|i1", "|u1"]


class FrameKind(IntEnum):
    REQUEST = 1
    REPLY = 2


@dataclass(frozen=True)
class Limits:
    """What one frame may weigh.

    header: a program of 100,000 tokens is about 1 MB of JSON.
    payload: 512 rows of float32 logits over Gemma 3's 262,144 tokens are 512 MiB; more than
    that in one answer would not fit beside the model on a phone.
    """

    header_bytes: int = 4 << 20
    payload_bytes: int = 512 << 20


DEFAULT_LIMITS = Limits()


@dataclass(frozen=True)
class Frame:
    """One message with its arrays. ``message`` is JSON-ready (see device_agents.messages)."""

    kind: FrameKind
    sequence: int
    message: dict[str, Any]
    arrays: tuple[Array, ...] = ()


class FrameSource(Protocol):
    """Where frames are read from; ByteStream is one."""

    def read_exactly(self, size: int, deadline: Deadline) -> bytes: ...


@dataclass(frozen=True)
class _ArrayHead:
    dtype: Dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * np.dtype(self.dtype).itemsize


@dataclass(frozen=True)
class _Header:
    message: dict[str, Any]
    arrays: tuple[_ArrayHead, ...]


def encode_frame(frame: Frame, limits: Limits = DEFAULT_LIMITS) -> list[bytes | memoryview]:
    """The frame as parts to write one after the other; arrays are not copied.

    Raises:
        ProtocolError: over a limit, or an array of a dtype that frames do not carry.
    """
    arrays = [_little_endian(array) for array in frame.arrays]
    heads = tuple(_ArrayHead(_dtype_of(a), tuple(int(n) for n in a.shape)) for a in arrays)
    text = json.dumps(encode(_Header(frame.message, heads)), separators=(",", ":"), allow_nan=False)
    header = text.encode()
    payload = sum(a.nbytes for a in arrays)
    _check_limits(len(header), payload, limits)
    bodies = [a.reshape(-1).view(np.uint8).data for a in arrays if a.nbytes]
    checksum = zlib.crc32(header)
    for body in bodies:
        checksum = zlib.crc32(body, checksum)
    prelude = _PRELUDE.pack(
        MAGIC, PROTOCOL_VERSION, frame.kind, 0, frame.sequence, len(header), payload, checksum
    )
    return [prelude + _CHECKSUM.pack(zlib.crc32(prelude)) + header, *bodies]


def read_frame(source: FrameSource, deadline: Deadline, limits: Limits = DEFAULT_LIMITS) -> Frame:
    """The next frame. Its arrays are writable and own one common buffer.

    Raises:
        ProtocolError: what came is not a proper frame; the message shows its first bytes.
        DeadlineExceeded, RunnerDied: from ``source``.
    """
    prelude = source.read_exactly(PRELUDE_BYTES, deadline)
    kind, sequence, header_bytes, payload_bytes, checksum = _parse_prelude(prelude, limits)
    header = source.read_exactly(header_bytes, deadline)
    payload = bytearray()
    found = zlib.crc32(header)
    while len(payload) < payload_bytes:
        piece = source.read_exactly(min(_PIECE, payload_bytes - len(payload)), deadline)
        found = zlib.crc32(piece, found)
        payload += piece
    if found != checksum:
        _refuse(f"checksum of the body: sought {checksum:08x}, found {found:08x}", prelude + header)
    try:
        head = decode(_Header, json.loads(header, parse_constant=_no_constant))
    except (DecodeError, ValueError, RecursionError, OverflowError) as error:
        _refuse(f"the header is not what a frame carries: {error}", header)
    return Frame(kind, sequence, head.message, _arrays(head.arrays, payload, header))


def _parse_prelude(prelude: bytes, limits: Limits) -> tuple[FrameKind, int, int, int, int]:
    magic, version, kind, zero, sequence, header, payload, body_crc = _PRELUDE.unpack_from(prelude)
    if magic != MAGIC:
        _refuse(f"sought a frame starting {MAGIC!r}", prelude)
    if version != PROTOCOL_VERSION:
        _refuse(
            f"sought protocol version {PROTOCOL_VERSION}, found {version}; deploy the runner again", prelude
        )
    (checksum,) = _CHECKSUM.unpack_from(prelude, _PRELUDE.size)
    if checksum != zlib.crc32(prelude[: _PRELUDE.size]):
        _refuse("checksum of the prelude does not match", prelude)
    if zero != 0 or kind not in FrameKind.__members__.values():
        _refuse(f"unknown frame kind {kind} or flags {zero}", prelude)
    _check_limits(header, payload, limits, prelude)
    return FrameKind(kind), sequence, header, payload, body_crc


def _arrays(heads: Sequence[_ArrayHead], payload: bytearray, header: bytes) -> tuple[Array, ...]:
    for head in heads:
        # Zero sizes counted as one: numpy refuses shapes like (0, 2**62) too.
        extent = math.prod(max(n, 1) for n in head.shape) * 8
        if len(head.shape) > _MAX_DIMENSIONS or any(n < 0 for n in head.shape) or extent >= 2**63:
            _refuse(f"impossible array shape {head.shape}", header)
    declared = sum(head.nbytes for head in heads)
    if declared != len(payload):
        _refuse(f"arrays of {declared:,} bytes declared, {len(payload):,} sent", header)
    arrays, offset = [], 0
    for head in heads:
        count = math.prod(head.shape)
        flat = np.frombuffer(payload, dtype=head.dtype, count=count, offset=min(offset, len(payload)))
        arrays.append(flat.reshape(head.shape))
        offset += head.nbytes
    return tuple(arrays)


def _little_endian(array: Array) -> Array:
    return np.ascontiguousarray(array, dtype=array.dtype.newbyteorder("<")).reshape(array.shape)


def _dtype_of(array: Array) -> Dtype:
    for dtype in typing.get_args(Dtype):
        if dtype == array.dtype.str:
            return typing.cast(Dtype, dtype)
    raise ProtocolError(f"a frame carries arrays of {typing.get_args(Dtype)}, not of {array.dtype}")


def _check_limits(header: int, payload: int, limits: Limits, prelude: bytes | None = None) -> None:
    for name, size, limit in (
        ("header", header, limits.header_bytes),
        ("payload", payload, limits.payload_bytes),
    ):
        if size > limit:
            problem = f"a frame's {name} may be {limit:,} bytes, this one is {size:,}; ask for less at once"
            if prelude is None:
                raise ProtocolError(problem)
            _refuse(problem, prelude)


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


def _refuse(problem: str, shown: bytes) -> NoReturn:
    raise ProtocolError(f"not a frame: {problem}; first bytes: {shown[:64]!r}")

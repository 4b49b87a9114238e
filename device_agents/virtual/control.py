"""What is said on the pipes between VirtualPhone and its launcher: 4 bytes of length, then JSON."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from typing import Any

from device_agents.virtual.errors import VirtualPhoneFailed

HEAD = struct.Struct(">I")
_MOST = 1 << 20


def frame(message: dict[str, Any]) -> bytes:
    data = json.dumps(message).encode()
    return HEAD.pack(len(data)) + data


def length(head: bytes | bytearray) -> int:
    """Raises VirtualPhoneFailed when that is no frame of ours."""
    (size,) = HEAD.unpack(head)
    if size > _MOST:
        raise VirtualPhoneFailed(
            f"a virtual phone's launcher announced {size:,} bytes; {_MOST:,} are allowed"
        )
    return int(size)


def message(data: bytes) -> dict[str, Any]:
    """Raises VirtualPhoneFailed when ``data`` is no JSON object."""
    try:
        found = json.loads(data)
    except ValueError as error:
        raise VirtualPhoneFailed(f"a virtual phone's launcher sent no JSON: {error}") from error
    if not isinstance(found, dict):
        raise VirtualPhoneFailed(f"a virtual phone's launcher sent {type(found).__name__}, not an object")
    return found


class FrameReader:
    """Messages out of bytes as they come."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, data: bytes) -> Iterator[dict[str, Any]]:
        self._buffer += data
        while len(self._buffer) >= HEAD.size:
            end = HEAD.size + length(self._buffer[: HEAD.size])
            if len(self._buffer) < end:
                return
            whole = bytes(self._buffer[HEAD.size : end])
            del self._buffer[:end]
            yield message(whole)

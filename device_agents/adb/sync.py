"""adb's file transfer: many files over one connection, each wait under a deadline.

Wire format: AOSP packages/modules/adb, SYNC.TXT. A file that was not sent whole does not appear.
"""

from __future__ import annotations

import struct
import time
from pathlib import Path
from typing import BinaryIO

from device_agents.adb.connection import AdbSocket
from device_agents.deadline import Deadline
from device_agents.errors import AdbFailure, DeployFailed, NoSpace

_DATA_BYTES = 1 << 16  # the protocol's limit
_MAX_MESSAGE = 1 << 16
MAX_PULL = 1 << 30  # a device that sends without end must not fill the lab host's disk
_REGULAR_FILE = 0o100000


class SyncSession:
    """An open ``sync:`` service. After an error it is of no more use."""

    def __init__(self, connection: AdbSocket) -> None:
        self._connection = connection

    def send(self, source: Path, target: str, mode: int, deadline: Deadline) -> int:
        """Write ``source`` to ``target``; returns its size.

        Raises:
            NoSpace, AdbFailure: what the device says. DeployFailed: ``source`` cannot be read.
            DeadlineExceeded.
        """
        try:
            with source.open("rb") as file:
                self._request(b"SEND", f"{target},{_REGULAR_FILE | mode}", deadline)
                size = self._send_data(file, deadline)
        except OSError as error:
            raise DeployFailed(f"cannot read {source}: {error}") from error
        self._connection.send(b"DONE" + struct.pack("<I", int(time.time())), deadline)
        kind, length = self._answer(deadline)
        if kind == b"FAIL":
            self._fail(target, length, deadline)
        if kind != b"OKAY":
            raise AdbFailure(f"pushing {target}: sought OKAY, found {kind!r}")
        return size

    def receive(self, source: str, target: Path, deadline: Deadline) -> int:
        """Write the device's ``source`` to ``target``; returns its size. Raises as ``send``."""
        self._request(b"RECV", source, deadline)
        size = 0
        try:
            with target.open("wb") as file:
                while True:
                    kind, length = self._answer(deadline)
                    if kind == b"DONE":
                        return size
                    if kind == b"FAIL":
                        self._fail(source, length, deadline)
                    if kind != b"DATA" or length > _DATA_BYTES:
                        raise AdbFailure(f"pulling {source}: sought DATA, found {kind!r} of {length:,} bytes")
                    size += length
                    if size > MAX_PULL:
                        raise AdbFailure(f"pulling {source}: sought at most {MAX_PULL:,} bytes, found more")
                    file.write(self._connection.receive(length, deadline))
        except OSError as error:
            raise DeployFailed(f"pulling {source}: cannot write {target}: {error}") from error

    def _request(self, kind: bytes, text: str, deadline: Deadline) -> None:
        raw = text.encode()
        self._connection.send(kind + struct.pack("<I", len(raw)) + raw, deadline)

    def _send_data(self, file: BinaryIO, deadline: Deadline) -> int:
        size = 0
        while piece := file.read(_DATA_BYTES):
            self._connection.send(b"DATA" + struct.pack("<I", len(piece)) + piece, deadline)
            size += len(piece)
        return size

    def _answer(self, deadline: Deadline) -> tuple[bytes, int]:
        raw = self._connection.receive(8, deadline)
        return raw[:4], int.from_bytes(raw[4:], "little")

    def _fail(self, path: str, length: int, deadline: Deadline) -> None:
        reason = self._connection.receive(min(length, _MAX_MESSAGE), deadline).decode(errors="replace")
        if "No space left" in reason:
            raise NoSpace(f"{path}: {reason}; free some space on the device")
        raise AdbFailure(f"{path}: {reason}")

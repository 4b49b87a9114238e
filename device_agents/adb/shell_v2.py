"""The shell protocol, version 2: one process on the device, its three streams and its exit code.

Version 1 merges the streams and ends like a success when the device dies; it is never used.
Packets are an id, a length (u32, little endian) and data: AOSP packages/modules/adb,
shell_protocol.h and shell_service.cpp. adbd sends SIGHUP to the process when the connection ends.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import select
import socket
import struct
import threading
from collections.abc import Callable, Iterable, Iterator

from device_agents.adb.connection import AdbSocket
from device_agents.adb.locks import holding
from device_agents.api import RunResult
from device_agents.deadline import Deadline
from device_agents.errors import (
    AdbFailure,
    DeadlineExceeded,
    DeviceUnreachable,
    InfrastructureError,
    ProtocolError,
    RunnerDied,
)

STDIN, STDOUT, STDERR, EXIT, CLOSE_STDIN = range(5)
_HEAD = struct.Struct("<BI")

_TAIL_BYTES = 16 << 10
_TAIL_LINES = 20
_READ_BYTES = 1 << 18
_WRITE_BYTES = 1 << 16  # data of a packet; adbd hands a large packet on in pieces anyway
_MAX_PACKET = 16 << 20
_MAX_BUFFER = 64 << 20  # of stdout that nobody has read yet
_SLICE_S = 0.1  # how soon a waiting call notices that close() was called
_LONG_S = 60.0  # poll takes no infinity
_KILL_S = 5.0

_log = logging.getLogger(__name__)


class ShellChannel:
    """Packets to and from one process. Not thread-safe; ``exit_code`` is None until it has ended."""

    def __init__(self, connection: AdbSocket, *, keep_stderr: int = _TAIL_BYTES) -> None:
        """keep_stderr: bytes; older ones are dropped."""
        self.what = connection.what
        self.exit_code: int | None = None
        self.lost = ""  # why, once the connection has ended before the process
        self.stdout = bytearray()
        self.stderr = bytearray()
        self._keep_stderr = keep_stderr
        self._connection = connection
        self._socket = connection.socket
        self._socket.setblocking(False)
        self._raw = bytearray()

    @property
    def ended(self) -> bool:
        return self.exit_code is not None or bool(self.lost)

    def step(self, data: memoryview | None, seconds: float) -> int:
        """Wait up to ``seconds``, take in what has come, send some of ``data``; returns the bytes sent."""
        if self.ended:
            return 0
        events = select.POLLIN if len(self.stdout) < _MAX_BUFFER else 0
        if data:
            events |= select.POLLOUT
        poller = select.poll()
        poller.register(self._socket, events)
        if not poller.poll(seconds * 1000):
            return 0
        if events & select.POLLIN:
            self._take_in()
        if not data or self.ended:
            return 0
        try:
            return self._socket.send(data)
        except BlockingIOError:
            return 0
        except OSError as error:
            self._take_in()  # its last words and exit code may lie there
            self._lose(error)
            return 0

    def close(self) -> None:
        self._connection.close()

    def _take_in(self) -> None:
        while not self.ended and len(self.stdout) < _MAX_BUFFER:
            try:
                piece = self._socket.recv(_READ_BYTES)
                # The adb server leaves Nagle's algorithm on: it holds a small packet back until the one
                # before is acknowledged, for which Linux waits 40 ms unless told, each time, not to.
                self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_QUICKACK, 1)
            except BlockingIOError:
                return
            except OSError as error:
                self._lose(error)
                return
            if not piece:
                self._lose("the device or adb closed it")
                return
            self._raw += piece
            self._unpack()

    def _unpack(self) -> None:
        while len(self._raw) >= _HEAD.size and self.exit_code is None:
            kind, size = _HEAD.unpack_from(self._raw)
            if size > _MAX_PACKET or kind not in (STDOUT, STDERR, EXIT):
                raise ProtocolError(f"{self.what}: no shell v2 packet: id {kind}, {size:,} bytes")
            end = _HEAD.size + size
            if len(self._raw) < end:
                return
            data = bytes(self._raw[_HEAD.size : end])
            del self._raw[:end]
            if kind == STDOUT:
                self.stdout += data
            elif kind == STDERR:
                self.stderr += data
                del self.stderr[: -self._keep_stderr]
            elif size == 1:
                self.exit_code = data[0]
            else:
                raise ProtocolError(f"{self.what}: sought an exit code of 1 byte, found {size:,}")

    def _lose(self, reason: object) -> None:
        if not self.ended:
            self.lost = f"the connection broke off before the process had ended: {reason}"


def packet(kind: int, data: bytes | memoryview = b"") -> bytes:
    return _HEAD.pack(kind, len(data)) + bytes(data)


def collect(
    connection: AdbSocket, deadline: Deadline, stdin: Iterable[bytes] = (), max_output: int = _MAX_PACKET
) -> RunResult:
    """Give the process ``stdin``, piece by piece, wait until it ends; ``connection`` is closed.

    Raises:
        DeviceUnreachable: the connection ended first. DeadlineExceeded: late; adbd ends the process.
        ProtocolError: no shell v2, or more output than ``max_output`` bytes.
    """
    channel = ShellChannel(connection, keep_stderr=max_output)
    packets = itertools.chain((packet(STDIN, piece) for piece in stdin), [packet(CLOSE_STDIN)])
    rest = memoryview(b"")
    try:
        while not channel.ended:
            deadline.check(channel.what)
            rest = rest or memoryview(next(packets, b""))
            rest = rest[channel.step(rest, min(deadline.remaining, _LONG_S)) :]
            if len(channel.stdout) > max_output:
                raise ProtocolError(f"{channel.what}: more than {max_output:,} bytes of output")
    finally:
        channel.close()
    if channel.exit_code is None:
        raise DeviceUnreachable(f"{channel.what}: {channel.lost}")
    return RunResult(channel.exit_code, bytes(channel.stdout), bytes(channel.stderr))


class ShellStream:
    """ByteStream over a shell v2 connection; see ``AdbTransport.open_stream``.

    The process must first write its number and a newline to stdout. kill(signal name, pid, deadline):
    sends the signal to the process and its group, over a connection of its own. Calls from several
    threads take turns; ``close`` may come from any thread and interrupts a waiting call.

    Raises (from the constructor):
        RunnerDied: the process ended at once. DeviceUnreachable, DeadlineExceeded.
    """

    def __init__(
        self,
        connection: AdbSocket,
        name: str,
        kill: Callable[[str, int, Deadline], None],
        deadline: Deadline,
        *,
        grace_s: float = 2.0,
    ) -> None:
        self._channel = ShellChannel(connection)
        self._name = name
        self._kill = kill
        self._grace_s = grace_s
        self._turn = threading.Lock()
        self._closing = threading.Event()
        self._closed = False
        self.pid = 0
        try:
            self.pid = self._read_pid(deadline)
        except BaseException:
            self._channel.close()
            raise

    def write(self, data: bytes, deadline: Deadline) -> None:
        """Raises RunnerDied, DeviceUnreachable, DeadlineExceeded."""
        with self._take_turn(deadline, "writing to"):
            whole = memoryview(data)
            for start in range(0, len(whole), _WRITE_BYTES):
                self._send(packet(STDIN, whole[start : start + _WRITE_BYTES]), deadline)

    def read_exactly(self, size: int, deadline: Deadline) -> bytes:
        """Raises RunnerDied at end of file, DeviceUnreachable when the link broke, DeadlineExceeded."""
        buffer = bytearray()
        channel = self._channel
        with self._take_turn(deadline, "reading from"):
            while True:
                taken = min(size - len(buffer), len(channel.stdout))
                buffer += channel.stdout[:taken]
                del channel.stdout[:taken]
                if len(buffer) == size:
                    return bytes(buffer)
                if channel.ended:
                    raise self._death(f"after {len(buffer):,} of {size:,} bytes sought")
                self._wait(None, deadline, "reading from")

    def stderr_tail(self) -> str:
        """The last lines of stderr, also after close."""
        if self._turn.acquire(blocking=False):
            try:
                if not self._closed:
                    with contextlib.suppress(ProtocolError):
                        self._channel.step(None, 0)
            finally:
                self._turn.release()
        lines = bytes(self._channel.stderr).decode(errors="replace").splitlines()
        return "\n".join(lines[-_TAIL_LINES:])

    def close(self) -> None:
        """End of stdin, then SIGTERM, then SIGKILL to the group; returns once it is gone or unreachable."""
        self._closing.set()
        with self._turn:  # whoever has it gives it back within one slice
            if self._closed:
                return
            self._closed = True
            try:
                self._end()
            except InfrastructureError as error:
                # Its stdin ends with the connection, and then a runner leaves by itself.
                _log.warning("%s could not be ended: %s", self._name, error)
            finally:
                self._channel.close()

    def _end(self) -> None:
        channel = self._channel
        if not channel.ended:
            with contextlib.suppress(DeadlineExceeded):
                self._send(packet(CLOSE_STDIN), Deadline(self._grace_s), closing=True)
        if self._await_end() and channel.exit_code == 0:
            return
        if not channel.ended:
            self._kill("TERM", self.pid, Deadline(_KILL_S))
            self._await_end()
        # Also after its end, for its children; a group's number is nobody else's while it has members.
        self._kill("KILL", self.pid, Deadline(_KILL_S))
        self._await_end()

    def _await_end(self) -> bool:
        """Whether the process ends within the grace; what it writes meanwhile is thrown away."""
        deadline = Deadline(self._grace_s)
        while not self._channel.ended and not deadline.expired:
            self._channel.step(None, min(deadline.remaining, _SLICE_S))
            self._channel.stdout.clear()
        return self._channel.ended

    def _send(self, data: bytes, deadline: Deadline, *, closing: bool = False) -> None:
        rest = memoryview(data)
        while rest:
            if self._channel.ended:
                if closing:
                    return
                raise self._death("while being written to")
            rest = rest[self._wait(rest, deadline, "writing to", closing=closing) :]

    def _wait(self, data: memoryview | None, deadline: Deadline, doing: str, *, closing: bool = False) -> int:
        """One slice at most."""
        deadline.check(f"{doing} {self._name}")
        if not closing:
            self._check_open(doing)
        return self._channel.step(data, min(deadline.remaining, _SLICE_S))

    def _read_pid(self, deadline: Deadline) -> int:
        line = b""
        while not line.endswith(b"\n") and len(line) < 16:
            line += self.read_exactly(1, deadline)
        try:
            return int(line)
        except ValueError:
            raise AdbFailure(f"{self._name}: sought its process number, found {line!r}") from None

    @contextlib.contextmanager
    def _take_turn(self, deadline: Deadline, doing: str) -> Iterator[None]:
        with holding(self._turn, deadline, self._name):
            self._check_open(doing)
            yield

    def _check_open(self, doing: str) -> None:
        if self._closing.is_set():
            raise RunnerDied(f"{doing} {self._name}: it was closed from our side")

    def _death(self, when: str) -> InfrastructureError:
        code = self._channel.exit_code
        if code is None:
            return DeviceUnreachable(f"{self._name}: {when}: {self._channel.lost}")
        return RunnerDied(f"{self._name} ended {when}: {exit_text(code)}")


def exit_text(code: int) -> str:
    """adbd reports death by a signal as 128 plus its number, as shells do."""
    return f"exit code {code}" + (f" (signal {code - 128})" if 128 < code < 160 else "")

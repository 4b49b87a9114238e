"""Connections to an adb server, every byte of them under a deadline.

adbutils finds adb for us. Its connections are not used: most of its calls wait without a limit, it
starts a server at the default port when another one is meant, and it takes a dying device's half
output for all of it. Whatever goes wrong leaves here as AdbFailure or DeadlineExceeded.
Wire format: AOSP packages/modules/adb, OVERVIEW.TXT and SERVICES.TXT.
"""

from __future__ import annotations

import contextlib
import os
import re
import socket
import subprocess
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TypeVar

from device_agents.adb.library import AdbError, adbutils
from device_agents.deadline import Deadline
from device_agents.errors import AdbFailure, DeadlineExceeded, DeviceUnreachable, Unauthorized

T = TypeVar("T")

DEFAULT_PORT = 5037
_MAX_COMMAND = 0xFFFF  # its length is 4 hexadecimal digits
_MAX_ANSWER = 1 << 20
_PIECE = 1 << 16
# After adbd comes back the server needs 0.2 to 2.3 s to notice (measured).
_BETWEEN_TRIES_S = 0.1

# What the adb server says of a device that may come back by itself or by `connect`.
_ABSENT = ("not found", "offline", "no devices", "device still connecting", "closed")


@contextlib.contextmanager
def adb_errors(what: str, deadline: Deadline) -> Iterator[None]:
    """What sockets, answers and adbutils raise becomes an InfrastructureError that names ``what``."""
    try:
        yield
    except TimeoutError as error:
        raise DeadlineExceeded(f"{what}: adb gave no answer within {deadline.seconds:g} s") from error
    except ConnectionError as error:  # adbd or the adb server has gone
        raise DeviceUnreachable(f"{what}: {error}") from error
    except (OSError, ValueError, AdbError) as error:
        raise AdbFailure(f"{what}: {str(error) or type(error).__name__}") from error


class AdbSocket:
    """A connection to the server, later to a service. All waits end at their deadline; close never waits."""

    def __init__(self, connection: socket.socket, what: str) -> None:
        self.socket = connection
        self.what = what

    def send(self, data: bytes | memoryview, deadline: Deadline) -> None:
        with adb_errors(self.what, deadline):
            self._arm(deadline)
            self.socket.sendall(data)

    def receive(self, size: int, deadline: Deadline) -> bytes:
        """Exactly ``size`` bytes. Raises DeviceUnreachable when the connection ends before."""
        buffer = bytearray()
        while len(buffer) < size:
            piece = self.receive_some(min(size - len(buffer), _PIECE), deadline)
            if not piece:
                raise DeviceUnreachable(
                    f"{self.what}: the connection ended after {len(buffer)} of {size} bytes"
                )
            buffer += piece
        return bytes(buffer)

    def receive_some(self, size: int, deadline: Deadline) -> bytes:
        """1 to ``size`` bytes; none at the end of the connection."""
        with adb_errors(self.what, deadline):
            self._arm(deadline)
            return self.socket.recv(size)

    def block(self, deadline: Deadline) -> str:
        """A string with its length in 4 hexadecimal digits before it."""
        head = self.receive(4, deadline)
        with adb_errors(self.what, deadline):
            size = int(head, 16)
        return self.receive(size, deadline).decode(errors="replace")

    def command(self, text: str, deadline: Deadline) -> None:
        """Send ``text`` and wait for OKAY.

        Raises:
            DeviceUnreachable, AdbFailure: the server's or the device's reason. DeadlineExceeded.
        """
        raw = text.encode()
        if len(raw) > _MAX_COMMAND:
            raise AdbFailure(f"{self.what}: a command of {len(raw):,} bytes; adb takes {_MAX_COMMAND:,}")
        self.send(b"%04x" % len(raw) + raw, deadline)
        answer = self.receive(4, deadline)
        if answer == b"OKAY":
            return
        if answer != b"FAIL":
            raise AdbFailure(f"{self.what}: sought OKAY or FAIL, found {answer!r}")
        raise _refusal(self.what, self.block(deadline))

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self.socket.shutdown(socket.SHUT_RDWR)
        self.socket.close()

    def __enter__(self) -> AdbSocket:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _arm(self, deadline: Deadline) -> None:
        deadline.check(self.what)
        self.socket.settimeout(_seconds(deadline))


@dataclass(frozen=True)
class AdbServer:
    """The adb server at ``port`` of this machine. start: whether to start one when none answers."""

    port: int = DEFAULT_PORT
    start: bool = True

    @classmethod
    def default(cls) -> AdbServer:
        """The one that `adb` itself would use. Raises AdbFailure: its variable has no port in it."""
        port = os.environ.get("ANDROID_ADB_SERVER_PORT", str(DEFAULT_PORT))
        if not port.isdigit():
            raise AdbFailure(f"sought a port in ANDROID_ADB_SERVER_PORT, found {port!r}; correct or unset it")
        return cls(int(port))

    def open(self, what: str, deadline: Deadline) -> AdbSocket:
        """A connection on which a command may be sent.

        Raises:
            AdbFailure: no server answers and none can be started.
        """
        deadline.check(what)
        try:
            return self._connect(what, deadline)
        except AdbFailure:
            if not self.start:
                raise
        self._start(what, deadline)
        return self._connect(what, deadline)

    def open_service(self, serial: str, service: str, deadline: Deadline) -> AdbSocket:
        """``service`` on the device ``serial``.

        Raises:
            DeviceUnreachable: the device is absent or offline. Unauthorized: it does not trust us.
            AdbFailure: it refuses the service. DeadlineExceeded.
        """
        # Its kind is enough: the rest of a shell's is the whole script.
        connection = self.open(f"{serial}: adb's {re.split('[,:]', service)[0]}", deadline)
        try:
            connection.command(f"host:tport:serial:{serial}", deadline)
            connection.receive(8, deadline)  # the transport's number
            connection.command(service, deadline)
        except BaseException:
            connection.close()
            raise
        return connection

    def query(self, request: str, deadline: Deadline) -> str:
        """What the server answers to a host request, such as ``host:devices-l``."""
        with self.open(request, deadline) as connection:
            connection.command(request, deadline)
            return connection.block(deadline)

    def features(self, serial: str, deadline: Deadline) -> frozenset[str]:
        """What the device's adbd can do, such as shell_v2."""
        return frozenset(self.query(f"host-serial:{serial}:features", deadline).split(","))

    def connect(self, address: str, deadline: Deadline) -> str:
        """Ask for a network device. The answer is for people: it says "connected" of dead devices too."""
        return self.query(f"host:connect:{address}", deadline)

    def disconnect(self, address: str, deadline: Deadline) -> None:
        """Forget a network device; one that is not known is no error."""
        with contextlib.suppress(AdbFailure):
            self.query(f"host:disconnect:{address}", deadline)

    def reach(self, serial: str, attempt: Callable[[], T], deadline: Deadline) -> T:
        """``attempt()`` on a device that may just be coming back; a network device is reconnected.

        Raises:
            DeviceUnreachable: it did not come back by the deadline. What else ``attempt`` raises.
        """
        pause = threading.Event()
        while True:
            try:
                return attempt()
            except DeviceUnreachable as error:
                reason = error
            if ":" in serial:
                with contextlib.suppress(AdbFailure, DeadlineExceeded):
                    self.connect(serial, deadline)
            if deadline.remaining <= _BETWEEN_TRIES_S:
                raise DeviceUnreachable(f"{reason} (tried for {deadline.seconds:g} s)") from reason
            pause.wait(_BETWEEN_TRIES_S)

    def _connect(self, what: str, deadline: Deadline) -> AdbSocket:
        try:
            connection = socket.create_connection(("127.0.0.1", self.port), _seconds(deadline))
        except TimeoutError:
            raise DeadlineExceeded(f"{what}: the adb server at port {self.port} hangs; kill it") from None
        except OSError as error:
            raise AdbFailure(f"{what}: no adb server at port {self.port}: {error}") from error
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return AdbSocket(connection, what)

    def _start(self, what: str, deadline: Deadline) -> None:
        with adb_errors(what, deadline):
            command = [adbutils.adb_path(), "-P", str(self.port), "start-server"]
            try:
                # Not captured: the server inherits the pipes and keeps them open.
                subprocess.run(
                    command,
                    timeout=_seconds(deadline),
                    check=True,
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.DEVNULL,
                )
            except subprocess.TimeoutExpired:
                raise DeadlineExceeded(f"{what}: {command} took over {deadline.seconds:g} s") from None
            except subprocess.CalledProcessError as error:
                raise AdbFailure(f"{what}: {command} gave {error.returncode}; try it by hand") from error


def _seconds(deadline: Deadline) -> float:
    """For a socket, which takes 0 for "never wait" and no infinity."""
    return min(max(deadline.remaining, 0.001), 3600.0)


def _refusal(what: str, reason: str) -> AdbFailure:
    """The error for the text of a FAIL."""
    if "unauthorized" in reason:
        return Unauthorized(f"{what}: {reason.strip()}; unlock the device and accept this computer's key")
    if any(text in reason for text in _ABSENT):
        return DeviceUnreachable(f"{what}: {reason}; check cable, power and `adb devices`")
    return AdbFailure(f"{what}: {reason}")

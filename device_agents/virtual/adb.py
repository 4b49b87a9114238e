"""An adb server of our own for virtual phones, on a private loopback port; the user's is never touched.

It finds no USB devices, no emulators and nothing by mDNS, so it takes no phone from the user's server.
"""

from __future__ import annotations

import os
import shutil
import socket
import sys
import tempfile
import threading
from pathlib import Path

from device_agents.deadline import Deadline
from device_agents.errors import (
    AdbFailure,
    DeadlineExceeded,
    DeviceUnreachable,
    InfrastructureError,
    RunnerDied,
)
from device_agents.local import LocalTransport, local_environment
from device_agents.scratch import ADB, MAKING, named, owned_folder
from device_agents.streams import ProcessStream
from device_agents.virtual.debian import unpack_packages
from device_agents.virtual.errors import VirtualPhoneUnavailable
from device_agents.virtual.rootfs import default_cache

START_S = 60.0
_GRACE_S = 3.0
_POLL_S = 0.02
_MOST = 1 << 16
_KEEPER = Path(__file__).with_name("keeper.py")


def find_adb(cache: Path | None = None, deadline: Deadline | None = None) -> tuple[str, ...]:
    """The command that starts an adb client: $ADBUTILS_ADB_PATH, on PATH, of adbutils, or from Debian.

    Raises:
        VirtualPhoneUnavailable: there is none and none can be had. DeadlineExceeded.
    """
    deadline = deadline or Deadline(START_S)
    for path in (os.environ.get("ADBUTILS_ADB_PATH"), shutil.which("adb"), _bundled()):
        if path and _runs((path,), deadline):
            return (path,)
    fetched = _fetch(cache or default_cache(), deadline)
    if not _runs(fetched, deadline):
        raise VirtualPhoneUnavailable(
            "sought an adb that runs in $ADBUTILS_ADB_PATH, on PATH, in adbutils and in this machine's "
            "Debian archive, found none; install Android's platform-tools and set ADBUTILS_ADB_PATH"
        )
    return fetched


class PrivateAdbServer:
    """An adb server that runs between ``start`` and ``stop``, and never longer than this process.

    port: its port on 127.0.0.1, for adbutils.AdbClient(host, port) or `adb -P`.
    """

    host = "127.0.0.1"

    def __init__(self, command: tuple[str, ...] | None = None) -> None:
        """command: what find_adb gives; None looks for it at start."""
        self._command = command
        self._stream: ProcessStream | None = None
        self._home: tempfile.TemporaryDirectory[str] | None = None
        self.port = 0

    def start(self, deadline: Deadline) -> int:
        """Returns the port once the server answers.

        Raises:
            VirtualPhoneUnavailable: no adb. AdbFailure: it did not start. DeadlineExceeded.
        """
        if self._stream is not None:
            return self.port
        command = self._command or find_adb(deadline=deadline)
        # Our key and log, and no other server's.
        self._home = owned_folder(ADB)
        try:
            self._stream = self._spawn(command)
            self.port = int(self._stream.read_exactly(6, deadline))
            self._await_answer(deadline)
        except RunnerDied as error:
            self.stop()
            raise AdbFailure(f"the adb server did not start: {error}") from error
        except BaseException:
            self.stop()
            raise
        return self.port

    def stop(self) -> None:
        """Returns once it is gone. Not running: nothing to do."""
        stream, self._stream = self._stream, None
        if stream is not None:
            stream.close()
        home, self._home = self._home, None
        if home is not None:
            home.cleanup()

    @property
    def pid(self) -> int:
        """Of the process that keeps the server, its only child. Raises AdbFailure when it does not run."""
        if self._stream is None:
            raise AdbFailure("this adb server does not run; start it first")
        return self._stream.pid

    def connect(self, address: str, deadline: Deadline) -> None:
        """`adb connect` until the device answers as "device".

        Raises:
            DeviceUnreachable: not by the deadline; with what the server said last.
        """
        pause, said = threading.Event(), ""
        while not deadline.expired:
            try:
                # Its answer is a sentence, and "already connected" is said of devices offline too.
                said = self.query(f"host:connect:{address}", deadline)
                if self.query(f"host-serial:{address}:get-state", deadline) == "device":
                    return
            except (DeviceUnreachable, DeadlineExceeded) as error:
                said = said or str(error)
            pause.wait(_POLL_S)
        raise DeviceUnreachable(f"adb connect {address}: not there within {deadline.seconds:g} s; {said}")

    def disconnect(self, address: str, deadline: Deadline) -> None:
        """Forget the device. Raises DeviceUnreachable when it was not known."""
        self.query(f"host:disconnect:{address}", deadline)

    def query(self, service: str, deadline: Deadline) -> str:
        """One host service's answer; AOSP packages/modules/adb SERVICES.TXT.

        Raises:
            DeviceUnreachable: the server's FAIL. AdbFailure: no such answer. DeadlineExceeded.
        """
        try:
            with socket.create_connection((self.host, self.port), max(deadline.remaining, 1e-3)) as server:
                server.sendall(b"%04x%s" % (len(service), service.encode()))
                status = _exactly(server, 4, deadline)
                text = _exactly(server, int(_exactly(server, 4, deadline), 16), deadline).decode()
        except TimeoutError:
            raise DeadlineExceeded(f"adb {service}: no answer within {deadline.seconds:g} s") from None
        except (OSError, ValueError) as error:
            raise AdbFailure(f"adb {service}: {error}") from error
        if status != b"OKAY":
            raise DeviceUnreachable(f"adb {service}: {text}")
        return text

    def __enter__(self) -> PrivateAdbServer:
        self.start(Deadline(START_S))
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def _spawn(self, command: tuple[str, ...]) -> ProcessStream:
        assert self._home is not None
        # No device has this name; `kvfarm doctor` tells by it whose server this is.
        nothing = f"{named(ADB)}takes-no-usb-device"
        here_only = ("-L", "acceptfd:{listener}", "--one-device", nothing)
        environment = {
            **local_environment({}),
            "HOME": self._home.name,
            "ANDROID_USER_HOME": self._home.name,
            "TMPDIR": self._home.name,
            # Versions differ in which of these they know; --one-device and the port do for the old ones.
            "ADB_USB": "0",
            "ADB_EMU": "0",
            "ADB_LOCAL_TRANSPORT_MAX_PORT": "5554",
            "ADB_MDNS": "0",
            "ADB_MDNS_AUTO_CONNECT": "",
        }
        for name in ("ADB_SERVER_SOCKET", "ANDROID_ADB_SERVER_PORT", "ADB_TRACE", "ADB_VENDOR_KEYS"):
            environment.pop(name, None)
        keeper = [sys.executable, "-I", "-S", str(_KEEPER), str(os.getpid()), self._home.name]
        argv = [*keeper, *command, *here_only, "server", "nodaemon"]
        return ProcessStream(argv, environment, grace_s=_GRACE_S)

    def _await_answer(self, deadline: Deadline) -> None:
        """The port takes connections from the start; the server is there once it tells its version."""
        assert self._stream is not None
        try:
            self.query("host:version", deadline)
        except AdbFailure as error:
            raise AdbFailure(f"the adb server did not start: {error} {self._stream.stderr_tail()}") from error
        except DeadlineExceeded as error:
            said = self._stream.stderr_tail()
            raise DeadlineExceeded(f"the adb server did not start: {error} {said}") from error


def _exactly(server: socket.socket, size: int, deadline: Deadline) -> bytes:
    buffer = b""
    while len(buffer) < size:
        deadline.check("reading the adb server's answer")
        server.settimeout(deadline.remaining or 1e-3)
        piece = server.recv(min(size - len(buffer), _MOST))
        if not piece:
            raise OSError(f"the server hung up after {len(buffer)} of {size} bytes")
        buffer += piece
    return buffer


def _bundled() -> str | None:
    """adbutils' wheel has an adb of its own for some platforms."""
    from device_agents.adb.library import adbutils

    path = Path(adbutils.__file__).parent / "binaries" / "adb"
    return str(path) if path.is_file() else None


def _runs(command: tuple[str, ...], deadline: Deadline) -> bool:
    try:
        result = LocalTransport().run([*command, "version"], deadline)
    except DeadlineExceeded:
        raise
    except InfrastructureError:
        return False
    return result.returncode == 0 and b"Android Debug Bridge" in result.stdout


def _fetch(cache: Path, deadline: Deadline) -> tuple[str, ...]:
    """Debian's adb, run through its own loader; kept in the cache."""
    folder = cache / "virtual" / "adb"
    if not folder.is_dir():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with owned_folder(MAKING, folder.parent) as work:
            # With adbd both come from backports where only those have adbd: bookworm's own adb 29 is too old.
            unpack_packages(("adb", "adbd"), "android-platform-tools", Path(work) / "adb", deadline)
            (Path(work) / "adb").rename(folder)
    libraries = {path.parent for top in ("lib", "usr/lib") for path in (folder / top).rglob("*.so.*")}
    loader = next(
        iter(sorted(folder.glob("lib/*/ld-linux-*")) or sorted(folder.glob("usr/lib/*/ld-linux-*")))
    )
    program = folder / "usr/lib/android-sdk/platform-tools/adb"
    return (str(loader), "--library-path", ":".join(sorted(map(str, libraries))), str(program))

"""An adb server and a phone behind it, in one: the real wire protocol, and this machine's shell.

What a test may break: ``state`` ("device", "offline", "unauthorized", "absent"), ``features``,
``cut_after`` (bytes to the client, then the line is cut), ``frozen`` (nothing moves while it is set),
``pairing_code`` (that it accepts), ``version`` (of the server's program),
``flip`` (so many pushes by sync get their first bit flipped), ``sync_failure`` (what a push is answered).
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
import struct
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

from device_agents.adb.shell_v2 import CLOSE_STDIN, EXIT, STDERR, STDIN, STDOUT, packet

SERIAL = "FAKE0001"
ADDRESS = "127.0.0.1:5555"


class Cut(Exception):
    """The line was cut, by the client or by the test."""


class FakeAdb:
    """Use as a context manager. services: every service that was opened on the device."""

    def __init__(self, commands: Path) -> None:
        """commands: a folder of programs that the phone's shell finds before all others."""
        self.state = "device"
        self.features = "shell_v2,cmd,stat_v2,ls_v2"
        self.cut_after: int | None = None
        self.frozen = threading.Event()
        self.flip = 0
        self.sync_failure = ""
        self.connect_answer = f"connected to {ADDRESS}"
        self.pairing_code = "123456"
        self.version = 34
        self.on_connect: Callable[[], None] = lambda: None
        self.services: list[str] = []
        self.requests: list[str] = []
        self._commands = commands
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self._stopped = threading.Event()
        self._threads: list[threading.Thread] = []
        self._lines: list[socket.socket] = []

    def __enter__(self) -> FakeAdb:
        self._spawn(self._accept)
        return self

    def __exit__(self, *_: object) -> None:
        self._stopped.set()
        self._listener.shutdown(socket.SHUT_RDWR)
        self.hang_up()
        for thread in self._threads:
            thread.join(20)
            assert not thread.is_alive(), "the fake adb server hangs"
        self._listener.close()

    def hang_up(self) -> None:
        """Cut every line, as when adbd dies."""
        for line in list(self._lines):
            with contextlib.suppress(OSError):
                line.shutdown(socket.SHUT_RDWR)

    def _spawn(self, target: Callable[..., None], *arguments: object) -> None:
        thread = threading.Thread(target=target, args=arguments)
        self._threads.append(thread)
        thread.start()

    def _accept(self) -> None:
        while True:
            try:
                line, _ = self._listener.accept()
            except OSError:
                return
            self._lines.append(line)
            self._spawn(self._serve, line)

    def _serve(self, line: socket.socket) -> None:
        client = _Client(self, line)
        try:
            self._answer(client)
        except (Cut, OSError):
            pass
        finally:
            self._lines.remove(line)
            line.close()

    def _answer(self, client: _Client) -> None:
        request = client.command()
        self.requests.append(request)
        if request == "host:version":
            client.okay("0029")
        elif request == "host:devices":
            client.okay("" if self.state == "absent" else f"{SERIAL}\t{self.state}\n")
        elif request == "host:track-devices":
            self._track(client)
        elif request.startswith("host:connect:"):
            self.on_connect()
            client.okay(self.connect_answer)
        elif request.startswith("host:pair:"):
            code, _, address = request.removeprefix("host:pair:").partition(":")
            paired = f"Successfully paired to {address} [guid=adb-{SERIAL}]"
            wrong = "Failed: Wrong password or connection was dropped."
            right = code == self.pairing_code
            # 34 tells the outcome by a second status.
            client.send(b"OKAY" if self.version >= 34 else b"")
            (client.okay if right or self.version < 34 else client.fail)(paired if right else wrong)
        elif request.startswith("host:tport:serial:") or request.endswith(":features"):
            serial = request.removeprefix("host:tport:serial:").removeprefix("host-serial:")
            if refusal := self._refusal(serial.removesuffix(":features")):
                client.fail(refusal)
            elif request.endswith(":features"):
                client.okay(self.features)
            else:
                client.send(b"OKAY" + bytes(8))
                self._service(client)
        else:
            client.fail(f"unknown host service {request!r}")

    def _track(self, client: _Client) -> None:
        """Tell each change of ``state``, until the client goes."""
        client.send(b"OKAY")
        told = None
        while not self._stopped.wait(0.02) and not select.select([client.line], [], [], 0)[0]:
            state = self.state
            if state != told:
                text = "" if state == "absent" else f"{SERIAL}\t{state}\n"
                client.send(b"%04x%s" % (len(text), text.encode()))
                told = state

    def _refusal(self, serial: str) -> str:
        if serial not in (SERIAL, ADDRESS) or self.state == "absent":
            return f"device '{serial}' not found"
        return "" if self.state == "device" else f"device {self.state}"

    def _service(self, client: _Client) -> None:
        service = client.command()
        self.services.append(service)
        if service == "sync:":
            client.send(b"OKAY")
            _sync(self, client)
        elif service.startswith("shell,v2,raw:"):
            client.send(b"OKAY")
            _shell(client, service.removeprefix("shell,v2,raw:"), self._commands)
        else:
            client.fail("closed")


class _Client:
    """The line to one client of the adb server."""

    def __init__(self, server: FakeAdb, line: socket.socket) -> None:
        self.server = server
        self.line = line
        self.ended = threading.Event()

    def receive(self, size: int) -> bytes:
        data = b""
        while len(data) < size:
            self._thaw()
            piece = self.line.recv(size - len(data))
            if not piece:
                raise Cut
            data += piece
        return data

    def send(self, data: bytes) -> None:
        self._thaw()
        limit = self.server.cut_after
        if limit is not None:
            self.server.cut_after = max(0, limit - len(data))
            if len(data) >= limit:
                self.line.sendall(data[:limit])
                self.line.shutdown(socket.SHUT_RDWR)
                raise Cut
        self.line.sendall(data)

    def command(self) -> str:
        return self.receive(int(self.receive(4), 16)).decode()

    def okay(self, text: str) -> None:
        self.send(b"OKAY%04x%s" % (len(text), text.encode()))

    def fail(self, text: str) -> None:
        self.send(b"FAIL%04x%s" % (len(text), text.encode()))

    def _thaw(self) -> None:
        while self.server.frozen.is_set() and not self.server._stopped.wait(0.02):
            pass


def _shell(client: _Client, script: str, commands: Path) -> None:
    """As adbd: SIGHUP to the process when the line is cut, the exit code when all its output is sent."""
    process = subprocess.Popen(
        ["sh", "-c", script],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        bufsize=0,
        start_new_session=True,
        env={**os.environ, "PATH": f"{commands}:{os.environ['PATH']}"},
    )
    feeder = threading.Thread(target=_feed, args=(client, process))
    feeder.start()
    try:
        for kind, data in _output(process, client.ended):
            client.send(packet(kind, data))
        code = process.wait()
        client.send(packet(EXIT, bytes([code if code >= 0 else 128 - code])))
    except (Cut, OSError):
        with contextlib.suppress(ProcessLookupError):
            os.kill(process.pid, signal.SIGHUP)
    finally:
        with contextlib.suppress(OSError):
            client.line.shutdown(socket.SHUT_RDWR)
        feeder.join()
        for pipe in (process.stdin, process.stdout, process.stderr):
            assert pipe is not None
            pipe.close()
        process.wait()


def _feed(client: _Client, process: subprocess.Popen[bytes]) -> None:
    assert process.stdin is not None
    with contextlib.suppress(Cut, OSError):
        while True:
            kind, size = struct.unpack("<BI", client.receive(5))
            data = client.receive(size)
            if kind == STDIN:
                with contextlib.suppress(BrokenPipeError):
                    _write(process.stdin, data)
            elif kind == CLOSE_STDIN:
                process.stdin.close()
    client.ended.set()
    process.stdin.close()


def _write(pipe: IO[bytes], data: bytes) -> None:
    rest = memoryview(data)
    while rest:
        rest = rest[pipe.write(rest) or 0 :]


def _output(process: subprocess.Popen[bytes], ended: threading.Event) -> Iterator[tuple[int, bytes]]:
    """Packets until both pipes have ended. Raises Cut once the client is gone."""
    assert process.stdout is not None
    assert process.stderr is not None
    kinds = {process.stdout.fileno(): STDOUT, process.stderr.fileno(): STDERR}
    while kinds:
        ready, _, _ = select.select(list(kinds), [], [], 0.05)
        if ended.is_set():
            raise Cut
        for descriptor in ready:
            data = os.read(descriptor, 1 << 15)
            if data:
                yield kinds[descriptor], data
            else:
                del kinds[descriptor]


def _sync(server: FakeAdb, client: _Client) -> None:
    while True:
        kind, size = client.receive(4), struct.unpack("<I", client.receive(4))[0]
        path = client.receive(size).decode()
        if kind == b"SEND":
            _take_file(server, client, path)
        elif kind == b"RECV":
            _give_file(client, path)
        else:
            raise Cut


def _take_file(server: FakeAdb, client: _Client, target: str) -> None:
    """As adbd: what was not sent whole is removed."""
    path, _, mode = target.rpartition(",")
    content = bytearray()
    while True:
        kind, size = client.receive(4), struct.unpack("<I", client.receive(4))[0]
        if kind == b"DONE":
            break
        content += client.receive(size)
    if server.sync_failure:
        reason = server.sync_failure.encode()
        client.send(b"FAIL" + struct.pack("<I", len(reason)) + reason)
        return
    if server.flip and content:
        server.flip -= 1
        content[0] ^= 1
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_bytes(content)
    Path(path).chmod(int(mode) & 0o777)
    client.send(b"OKAY" + bytes(4))


def _give_file(client: _Client, path: str) -> None:
    try:
        content = Path(path).read_bytes()
    except OSError as error:
        reason = str(error.strerror).encode()
        client.send(b"FAIL" + struct.pack("<I", len(reason)) + reason)
        return
    for start in range(0, len(content), 1 << 16):
        piece = content[start : start + (1 << 16)]
        client.send(b"DATA" + struct.pack("<I", len(piece)) + piece)
    client.send(b"DONE" + bytes(4))

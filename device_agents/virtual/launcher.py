"""The process on the host that keeps one virtual phone: its relay, its namespaces, its folder.

Started by VirtualPhone with a PhoneConfig on stdin; obeys it there until stdin ends. When whoever
started it dies, in whatever way, it kills the phone, removes its folder and ends.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import shutil
import signal
import socket
import stat
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from device_agents.virtual import namespaces as ns
from device_agents.virtual.control import FrameReader, frame
from device_agents.virtual.init import Init, PhoneConfig, failure
from device_agents.virtual.loop import READ, Loop
from device_agents.virtual.relay import Relay
from kvengine.codec import decode

LOCK = "phone.lock"
_MESSAGE_MOST = 1 << 16


class Launcher:
    """One phone, until ``close``."""

    def __init__(self, config: PhoneConfig, loop: Loop) -> None:
        """Raises OSError: the folder or the port is another's."""
        self._config, self._loop = config, loop
        self._folder = Path(config.folder)
        self._lock = _claim(self._folder)
        self._listener = socket.socket()
        self._listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        # Made here, outside of the phone's network, and on no other interface.
        self._listener.bind(("127.0.0.1", config.port))
        self._listener.listen(64)
        self._relay = Relay(loop, self._listener, self._dial, config.latency_s)
        self._dials = 0  # that init has not answered
        self._dead = False  # its first process ended, and nobody will start it again
        self._init: socket.socket | None = None
        self._keeper = self._init_pid = 0
        self._answers: list[Callable[[dict[str, Any]], None]] = []
        self.on_listening: Callable[[], None] = lambda: None
        self.on_failure: Callable[[dict[str, Any]], None] = lambda _: None

    @property
    def port(self) -> int:
        return int(self._listener.getsockname()[1])

    def boot(self) -> None:
        """Fork the phone into namespaces of its own."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        launcher = os.getpid()
        self._keeper = os.fork()
        if self._keeper == 0:
            ours.close()
            self._listener.close()
            _keep_namespaces(self._config, theirs, launcher)
        theirs.close()
        self._init = ours
        self._loop.watch(ours, READ, self._hear)

    def obey(self, request: dict[str, Any], answer: Callable[[dict[str, Any]], None]) -> None:
        """``answer`` is called once, now or later. Raises KeyError for what is not known.

        A request with "at" (direction, after_bytes) is obeyed when so many bytes have gone by, and
        answered now.
        """
        do = request["do"]
        if at := request.pop("at", None):

            def later(go_on: Callable[[], None]) -> None:
                def obeyed(_: dict[str, Any]) -> None:
                    if do == "kill_adbd":
                        # What the dead adbd had already written beyond that byte would still arrive.
                        self._relay.cut()
                    go_on()

                self.obey(request, obeyed)

            self._relay.trigger(at["direction"], int(at["after_bytes"]), later)
            answer({})
        elif do == "cut":
            answer({"cut": self._relay.cut()})
        elif do == "freeze":
            self._relay.freeze(float(request["seconds"]))
            answer({})
        elif do == "refuse":
            self._relay.refuse(bool(request["refusing"]))
            answer({})
        elif do == "corrupt":
            self._relay.corrupt(request["direction"], int(request["after_bytes"]))
            answer({})
        elif do == "state":
            carried = {str(way): size for way, size in self._relay.carried.items()}
            known = {"up": self._init is not None, "dead": self._dead}
            answer({**known, "connections": self._relay.connections, **carried})
        elif do == "unplug":
            self._relay.refuse(True)
            answer({"cut": self._relay.cut()})
        elif do == "reboot":
            self._power_off()
            self._loop.later(float(request["down_s"]), self.boot)
            answer({})
        elif do in ("kill_adbd", "truth", "fill"):
            if self._init is None:
                answer({"error": "the virtual phone is off"})
                return
            self._answers.append(answer)
            self._send(request)
        else:
            raise KeyError(do)

    def close(self) -> None:
        """Kill the phone and remove all there was of it."""
        self._power_off()
        self._loop.forget(self._listener)
        self._listener.close()
        _remove(self._folder)
        os.close(self._lock)

    def _power_off(self) -> None:
        """The kernel ends every process of the phone before the last of these waits returns."""
        if self._keeper:
            for pid in (self._init_pid, self._keeper):
                if pid:
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)
            os.waitpid(self._keeper, 0)
        self._gone()

    def _gone(self) -> None:
        self._keeper = self._init_pid = 0
        if self._init is not None:
            self._loop.forget(self._init)
            self._init.close()
            self._init = None
        self._relay.cut()
        while self._dials:
            self._dials -= 1
            self._relay.connected(None)
        for answer in self._answers:
            answer({"error": "the virtual phone went off"})
        self._answers.clear()

    def _dial(self) -> None:
        if self._init is None:
            self._relay.connected(None)
            return
        self._dials += 1
        self._send({"do": "dial"})

    def _send(self, message: dict[str, Any]) -> None:
        assert self._init is not None
        with contextlib.suppress(ConnectionError):  # _hear will see its end
            self._init.send(json.dumps(message).encode())

    def _hear(self, _: int) -> None:
        assert self._init is not None
        data, descriptors = b"", list[int]()
        with contextlib.suppress(ConnectionResetError):  # it died with a request of ours unread
            data, descriptors, _flags, _address = socket.recv_fds(self._init, _MESSAGE_MOST, 4)
        if not data:
            self._power_off()
            self._dead = True
            self.on_failure(failure(OSError(0, "its first process ended"), False))
            return
        message = json.loads(data)
        if "pid" in message:
            self._init_pid = message["pid"]
        elif "listening" in message:
            self.on_listening()
        elif "failed" in message:
            self.on_failure(message["failed"])
        elif "dialed" in message:
            self._dials -= 1
            self._relay.connected(socket.socket(fileno=descriptors[0]) if descriptors else None)
        elif "answer" in message and self._answers:
            self._answers.pop(0)(message["answer"])


def _keep_namespaces(config: PhoneConfig, control: socket.socket, launcher: int) -> NoReturn:
    """In a process of its own, for the one that makes a PID namespace is not in it: fork PID 1, wait."""
    try:
        own_root = enter_namespaces()
        ns.die_with_parent()
        if os.getppid() != launcher:
            os._exit(1)
        pid = os.fork()
        if pid == 0:
            ns.die_with_parent()
            for number in (signal.SIGTERM, signal.SIGINT):
                signal.signal(number, signal.SIG_DFL)
            null = os.open("/dev/null", os.O_RDWR)
            os.dup2(null, 0)
            os.dup2(null, 1)
            Init(config, control, own_root).run()
        control.send(json.dumps({"pid": pid}).encode())
        control.close()
        os.waitpid(pid, 0)
    except OSError as error:
        with contextlib.suppress(OSError):
            control.send(json.dumps({"failed": failure(error, True)}).encode())
    finally:
        os._exit(0)


def enter_namespaces() -> bool:
    """Whether as real root; else in a user namespace. Raises OSError when neither is allowed."""
    if os.geteuid() == 0:
        try:
            ns.unshare(ns.PHONE_NAMESPACES, "new namespaces as root")
            return True
        except PermissionError:
            pass  # root of a container
    ns.enter_user_namespace(ns.PHONE_NAMESPACES, 0, "a new user namespace")
    return False


def _claim(folder: Path) -> int:
    """The phone's folder, empty and locked; what dead phones left beside it is removed."""
    for other in folder.parent.glob(f"*/{LOCK}"):
        if other.parent != folder:
            with contextlib.suppress(OSError):
                lock = os.open(other, os.O_RDWR)
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    _remove(other.parent)
                finally:
                    os.close(lock)
    folder.mkdir(parents=True, exist_ok=True)
    lock = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(lock)
        raise OSError(errno.EBUSY, f"a virtual phone of this name runs in {folder}") from None
    for old in folder.iterdir():
        if old.name != LOCK:
            _remove(old)
    for name in ("root", "sys", "data"):
        (folder / name).mkdir()
    return lock


def _remove(path: Path) -> None:
    """Also folders that the phone took its own permission from."""

    def retry(_: object, name: str, __: object) -> None:
        with contextlib.suppress(OSError):
            os.chmod(os.path.dirname(name), stat.S_IRWXU)
            os.chmod(name, stat.S_IRWXU)
            shutil.rmtree(name) if os.path.isdir(name) else os.unlink(name)

    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, onerror=retry)
    else:
        path.unlink(missing_ok=True)


def _serve(config: PhoneConfig, reader: FrameReader) -> None:
    loop = Loop()
    launcher = Launcher(config, loop)
    started = False

    def listening() -> None:
        nonlocal started
        if not started:
            started = True
            _say({"ready": {"port": launcher.port}})

    def failed(reason: dict[str, Any]) -> None:
        if not started:
            _say({"failed": reason})
            loop.stop()

    def hear(_: int) -> None:
        data = os.read(0, 1 << 16)
        if not data:
            loop.stop()
        for request in reader.feed(data):
            launcher.obey(request, _say)

    launcher.on_listening, launcher.on_failure = listening, failed
    try:
        loop.watch(sys.stdin, READ, hear)
        parent = os.pidfd_open(config.parent)
        with os.fdopen(parent) as alive:
            loop.watch(alive, READ, lambda _: loop.stop())
            launcher.boot()
            loop.run()
    finally:
        launcher.close()


def _say(message: dict[str, Any]) -> None:
    with contextlib.suppress(BrokenPipeError):
        os.write(1, frame(message))


def main() -> None:
    """stdin: a frame with the PhoneConfig, then requests; stdout: frames."""
    # The parent ends us through stdin; a signal must clean up as well.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    reader = FrameReader()
    while True:
        data = os.read(0, 1 << 16)
        if not data:
            return
        for first in reader.feed(data):
            try:
                _serve(decode(PhoneConfig, first, "phone"), reader)
            except OSError as error:
                _say({"failed": failure(error, False)})
            return


if __name__ == "__main__":
    main()

"""The first process of a virtual phone: mounts its file system, runs adbd and the services.

Runs as PID 1 inside the phone's namespaces, forked and never exec'ed. When it ends the kernel kills
everything else in the phone. It keeps the host's root, and reads no file that the phone can write.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import signal
import socket
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NoReturn

from device_agents.virtual import namespaces as ns
from device_agents.virtual.layout import ADBD, GROUPS, LIBRARIES, QEMU, SERVICES_SOCKET, SHELL_UID
from device_agents.virtual.loop import READ, WRITE, Loop
from device_agents.virtual.physics import Physics
from device_agents.virtual.procfs import cpuinfo_arm, cpuinfo_x86, meminfo
from device_agents.virtual.profile import Abi, Profile
from device_agents.virtual.properties import sysfs
from device_agents.virtual.services import AndroidServices, Answer

_ADBD_PORT = 5555
_TICK_S = 1.0
_LISTENING_POLL_S = 0.01
_RESPAWN_S = 0.5
_DIAL_S = 2.0
_REQUEST_MOST = 1 << 16
_MESSAGE_MOST = 1 << 16
# Refused by policy: a container's masks, AppArmor, a kernel without it.
_FORBIDDEN = (errno.EPERM, errno.EACCES, errno.ENOSYS, errno.ENODEV)
_DATA_FLAGS = ns.MS_NOSUID | ns.MS_NODEV
_CLOCK_TICKS = os.sysconf("SC_CLK_TCK")
_PAGE = os.sysconf("SC_PAGE_SIZE")
_ENVIRONMENT = {
    "ADBD_PORT": str(_ADBD_PORT),
    "PATH": "/product/bin:/apex/com.android.runtime/bin:/system/bin:/system/xbin:/odm/bin:/vendor/bin",
    "ANDROID_ROOT": "/system",
    "ANDROID_DATA": "/data",
    "ANDROID_STORAGE": "/storage",
    "EXTERNAL_STORAGE": "/sdcard",
    "HOME": "/",
    "SHELL": "/bin/sh",
    "USER": "shell",
    "LOGNAME": "shell",
    "HOSTNAME": "localhost",
    "TMPDIR": "/data/local/tmp",
}


@dataclass(frozen=True)
class PhoneConfig:
    """All that makes one phone. template: what rootfs.prepare made. folder: the phone's own."""

    name: str
    abi: Abi
    profile: Profile
    template: str
    folder: str
    port: int  # on 127.0.0.1 of the host; 0 lets the kernel choose
    parent: int  # PID of the process that the phone must not outlive
    # Bytes that /data holds; it is in memory then, and empty again after a reboot. 0: a folder of the host.
    storage: int = 0
    shared: bool = False  # the user's own adb server may know it, and is to forget it when it ends
    latency_s: float = 0.0  # of its link, in each direction


class Init:
    """PID 1. control: to the launcher; its end ends the phone. own_root: we are real root."""

    def __init__(self, config: PhoneConfig, control: socket.socket, own_root: bool) -> None:
        self._config, self._control, self._own_root = config, control, own_root
        self._folder = Path(config.folder)
        self._root = self._folder / "root"
        self._sys = self._folder / "sys"
        self._loop = Loop()
        self._physics = Physics(config.profile, time.monotonic())
        self._kept = self._folder / "settings.json"  # outside of the phone's root
        self._services = AndroidServices(
            config.profile, config.abi, config.name, self._physics, self._settings_before()
        )
        self._kept_text = ""
        self._written: dict[str, str] = {}
        self._adbd = 0
        self._told_listening = False

    def run(self) -> NoReturn:
        try:
            self._set_up()
            self._loop.run()
        except OSError as error:
            self._tell({"failed": failure(error, error.errno in _FORBIDDEN)})
        os._exit(1)

    # The file system

    def _set_up(self) -> None:
        ns.isolate_mounts()
        ns.loopback_up()
        socket.sethostname("localhost")
        self._mount_root()
        self._mount_sys()
        server = self._listen_for_services()
        ns.make_read_only(self._root)
        wake_read, wake_write = socket.socketpair()
        wake_read.setblocking(False)
        wake_write.setblocking(False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.set_wakeup_fd(wake_write.fileno())
        self._wake = (wake_read, wake_write)
        self._loop.watch(wake_read, READ, self._reap)
        self._loop.watch(self._control, READ, self._obey)
        self._loop.watch(server, READ, lambda _: self._accept(server))
        self._start_adbd()
        self._await_listening()
        self._tick()

    def _mount_root(self) -> None:
        root, template = self._root, Path(self._config.template)
        ns.mount("tmpfs", root, "tmpfs", ns.MS_NOSUID, "mode=755,size=1m")
        for name in ("system", "apex", "data", "proc", "sys", "dev/pts", "dev/socket"):
            (root / name).mkdir(parents=True)
        for name in ("vendor", "product", "odm", "mnt", "storage"):
            (root / name).mkdir()
        for name, target in {"bin": "/system/bin", "etc": "/system/etc", "sdcard": "/data/media/0"}.items():
            (root / name).symlink_to(target)
        for name in ("system", "apex"):
            ns.bind(template / name, root / name)
            ns.make_read_only(root / name)
        ns.bind(self._data(), root / "data")
        ns.mount("proc", root / "proc", "proc", ns.MS_NOSUID | ns.MS_NODEV | ns.MS_NOEXEC)
        pts = root / "dev" / "pts"
        ns.mount("devpts", pts, "devpts", ns.MS_NOSUID | ns.MS_NOEXEC, "newinstance,ptmxmode=0666,mode=620")
        (root / "dev" / "ptmx").symlink_to("pts/ptmx")
        for name in ("null", "zero", "urandom", "random", "tty"):
            (root / "dev" / name).touch()
            ns.bind(Path("/dev") / name, root / "dev" / name)
        self._mount_proc_files()

    def _mount_proc_files(self) -> None:
        """In place of the kernel's, which tell of this machine."""
        profile, host = self._config.profile, Path("/proc/cpuinfo").read_text()
        arm = self._config.abi != "x86_64"
        for name, text in {
            "cpuinfo": cpuinfo_arm(profile) if arm else cpuinfo_x86(profile, host),
            "meminfo": self._meminfo(0),
        }.items():
            (self._folder / name).write_text(text)
            ns.bind(self._folder / name, self._root / "proc" / name)
            ns.make_read_only(self._root / "proc" / name)

    def _meminfo(self, held: int) -> str:
        return meminfo(self._config.profile, held, Path("/proc/meminfo").read_text())

    def _write_meminfo(self) -> None:
        """Over itself: what is bound is this very file, and who reads it must find a whole one."""
        with (self._folder / "meminfo").open("r+") as file:
            file.write(self._meminfo(resident_bytes(self._root / "proc")))

    def _data(self) -> Path:
        """What the phone may write; it outlives a reboot."""
        data = self._folder / "data"
        if self._config.storage:
            ns.mount("tmpfs", data, "tmpfs", _DATA_FLAGS, f"mode=771,size={self._config.storage}")
        for name in ("local/tmp", "media/0"):
            place = data / name
            place.mkdir(parents=True, exist_ok=True)
            place.chmod(0o771)
            if self._own_root:
                os.chown(place, SHELL_UID, SHELL_UID)
        (data / "misc" / "adb").mkdir(parents=True, exist_ok=True)
        for name in (".", "local", "media", "misc"):
            (data / name).chmod(0o771)
        return data

    def _settings_before(self) -> dict[str, dict[str, str]] | None:
        """Android keeps them in /data, so they outlive a reboot where that does."""
        if self._config.storage or not self._kept.exists():
            return None
        kept: dict[str, dict[str, str]] = json.loads(self._kept.read_text())
        return kept

    def _keep_settings(self) -> None:
        text = json.dumps(self._services.settings)
        if text != self._kept_text:
            new = self._kept.with_suffix(".new")
            new.write_text(text)
            new.replace(self._kept)
            self._kept_text = text

    def _mount_sys(self) -> None:
        """Written here, seen read-only in the phone."""
        ns.mount("tmpfs", self._sys, "tmpfs", ns.MS_NOSUID | ns.MS_NODEV | ns.MS_NOEXEC, "mode=755,size=4m")
        self._write_sys()
        ns.bind(self._sys, self._root / "sys")
        ns.make_read_only(self._root / "sys")

    def _write_sys(self) -> None:
        fixed = self._services.fixed_performance
        for name, text, mode in sysfs(self._config.profile, self._physics, fixed):
            if self._written.get(name) == text:
                continue
            path = self._sys / name
            path.parent.mkdir(parents=True, exist_ok=True)
            new = path.with_name(f".{path.name}")
            new.write_text(text)
            new.chmod(mode)
            new.replace(path)  # nobody ever reads half of it
            self._written[name] = text

    # adbd

    def _start_adbd(self) -> None:
        self._adbd = os.fork()
        if self._adbd == 0:
            try:
                self._become_adbd()
            except BaseException as error:
                os.write(2, f"adbd: {error}\n".encode())
            os._exit(127)

    def _become_adbd(self) -> NoReturn:
        os.setsid()
        signal.set_wakeup_fd(-1)
        # adbd ends what it started by SIGHUP, which whoever started us (nohup, a CI) may have ignored.
        for number in (signal.SIGCHLD, signal.SIGPIPE, signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_DFL)
        log = os.open(self._folder / "adbd.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        for target, source in ((0, os.open("/dev/null", os.O_RDONLY)), (1, log), (2, log)):
            os.dup2(source, target)
        os.closerange(3, os.sysconf("SC_OPEN_MAX"))
        if not self._own_root:  # only one user id is ours; inside it is called shell
            ns.enter_user_namespace(0, SHELL_UID, "making the shell user")
        os.chroot(self._root)
        os.chdir("/")
        if self._own_root:
            os.setgroups(list(GROUPS.values()))
            os.setgid(SHELL_UID)
            os.setuid(SHELL_UID)
        ns.forbid_vsock()
        environment = dict(_ENVIRONMENT)
        loader = next(name for name in os.listdir(LIBRARIES) if name.startswith("ld-linux"))
        if os.path.exists(QEMU):
            environment["KV_EMU"] = QEMU
        argv = [f"{LIBRARIES}/{loader}", "--library-path", LIBRARIES, "--argv0", "adbd", ADBD]
        os.execve(argv[0], argv, environment)

    def _await_listening(self) -> None:
        """Tell the launcher once adbd can be connected to. Its log says so also when it cannot."""
        connection = self._connect()
        if connection is not None:
            connection.close()
            self._tell({"listening": True})
        else:
            self._loop.later(_LISTENING_POLL_S, self._await_listening)

    def _connect(self) -> socket.socket | None:
        try:
            return socket.create_connection(("127.0.0.1", _ADBD_PORT), timeout=_DIAL_S)
        except OSError:
            return None

    def _reap(self, _: int) -> None:
        with contextlib.suppress(BlockingIOError):
            while self._wake[0].recv(64):
                pass
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                return
            if pid == self._adbd:
                self._tell({"adbd_ended": os.waitstatus_to_exitcode(status)})
                self._adbd = 0
                self._loop.later(_RESPAWN_S, self._start_adbd)  # as Android's init does

    # The launcher

    def _tell(self, message: dict[str, Any], descriptors: tuple[int, ...] = ()) -> None:
        with contextlib.suppress(OSError):  # it is gone; its end is noticed in _obey
            socket.send_fds(self._control, [json.dumps(message).encode()], descriptors)

    def _obey(self, _: int) -> None:
        try:
            data = self._control.recv(_MESSAGE_MOST)
        except ConnectionResetError:
            data = b""
        if not data:
            os._exit(0)
        request = json.loads(data)
        if request["do"] == "dial":
            connection = self._connect()
            self._tell({"dialed": True}, () if connection is None else (connection.fileno(),))
            if connection is not None:
                connection.close()
        elif request["do"] == "kill_adbd":
            if self._adbd:
                os.kill(self._adbd, signal.SIGKILL)
            self._tell({"answer": {}})
        elif request["do"] == "fill":
            self._tell({"answer": self._fill(request["leave"])})
        elif request["do"] == "truth":
            self._advance()
            self._tell({"answer": asdict(self._physics.truth)})

    def _fill(self, leave: int | None) -> dict[str, Any]:
        """Let /data have ``leave`` bytes of room; None: what it had at first."""
        if not self._config.storage:
            return {"error": "its storage has no limit of its own; start it with one"}
        data = self._folder / "data"
        found = os.statvfs(data)
        size = self._config.storage
        if leave is not None:
            size = (found.f_blocks - found.f_bfree) * found.f_frsize + max(leave, 4096)
        try:
            ns.mount("tmpfs", data, "tmpfs", ns.MS_REMOUNT | _DATA_FLAGS, f"size={size}")
        except OSError as error:
            return {"error": f"its storage cannot be filled: {error}"}
        return {}

    # The services

    def _listen_for_services(self) -> socket.socket:
        server = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        os.chdir(self._root)  # a socket's path has at most 107 bytes
        server.bind(SERVICES_SOCKET)
        os.chdir("/")
        (self._root / SERVICES_SOCKET).chmod(0o666)
        server.listen(64)
        server.setblocking(False)
        return server

    def _accept(self, server: socket.socket) -> None:
        try:
            client, _ = server.accept()
        except BlockingIOError:
            return
        client.setblocking(False)
        buffer = bytearray()
        self._loop.watch(client, READ, lambda _: self._hear(client, buffer))

    def _hear(self, client: socket.socket, buffer: bytearray) -> None:
        try:
            piece = client.recv(_REQUEST_MOST)
        except BlockingIOError:
            return
        except OSError:
            piece = b""
        buffer += piece
        count, _, rest = bytes(buffer).partition(b"\0")
        words = rest.split(b"\0")[:-1]
        if not piece or len(buffer) > _REQUEST_MOST or not (count or b"0").isdigit():
            self._hang_up(client)
        elif count and len(words) >= int(count):
            self._advance()
            answer = self._services.call([word.decode(errors="replace") for word in words[: int(count)]])
            self._keep_settings()
            self._write_sys()
            self._reply(client, memoryview(_encoded(answer)))

    def _reply(self, client: socket.socket, rest: memoryview) -> None:
        try:
            rest = rest[client.send(rest) :]
        except BlockingIOError:
            pass
        except OSError:
            rest = rest[:0]
        if rest:
            self._loop.watch(client, WRITE, lambda _: self._reply(client, rest))
        else:
            self._hang_up(client)

    def _hang_up(self, client: socket.socket) -> None:
        self._loop.forget(client)
        client.close()

    # Time

    def _tick(self) -> None:
        self._advance()
        self._write_sys()
        self._write_meminfo()
        self._loop.later(_TICK_S, self._tick)

    def _advance(self) -> None:
        self._physics.advance(time.monotonic(), cpu_seconds(self._root / "proc"))


def failure(error: OSError, forbidden: bool) -> dict[str, Any]:
    """As VirtualPhone is told. forbidden: the machine does not allow it, so trying again is no use."""
    return {"errno": error.errno or 0, "what": error.strerror or str(error), "forbidden": forbidden}


def _encoded(answer: Answer) -> bytes:
    return f"{answer.code} {'err' if answer.error else 'out'}\n{answer.text}".encode()


def cpu_seconds(proc: Path) -> float:
    """CPU time of every process there was in this PID namespace but PID 1 itself, s; proc(5).

    A process that has ended counts where it was waited for. PID 1's own time is the simulation's.
    """
    ticks = 0
    for pid, fields in _stats(proc):
        own, waited_for = fields[11:13], fields[13:15]
        ticks += sum(map(int, waited_for if pid == 1 else own + waited_for))
    return ticks / _CLOCK_TICKS


def resident_bytes(proc: Path) -> int:
    """What the processes of this PID namespace but PID 1 hold; shared pages count for each. proc(5)."""
    return sum(int(fields[21]) for pid, fields in _stats(proc) if pid != 1) * _PAGE


def _stats(proc: Path) -> Iterator[tuple[int, list[str]]]:
    """Each process and its /proc/PID/stat from the state on, which is field 3 of proc_pid_stat(5)."""
    for entry in proc.iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                yield int(entry.name), (entry / "stat").read_text().rpartition(")")[2].split()

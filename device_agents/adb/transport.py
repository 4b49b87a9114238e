"""The Transport over adb: files by sync, processes by shell v2."""

from __future__ import annotations

import os
import shlex
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TypeVar

from device_agents.adb.connection import AdbServer, AdbSocket
from device_agents.adb.shell_v2 import ShellStream, collect
from device_agents.adb.sync import SyncSession
from device_agents.api import RunResult
from device_agents.deadline import Deadline
from device_agents.errors import AdbFailure, DeployFailed, UnsupportedDevice
from kvengine.artifact import sha256_of

T = TypeVar("T")

_START_S = 30.0


class AdbTransport:
    """One device of one adb server.

    reach_s: how long a device may take to come back (after a replug, a restart of adbd) before a
    call fails. grace_s: see ShellStream.
    """

    def __init__(
        self, server: AdbServer, serial: str, *, reach_s: float = 10.0, grace_s: float = 2.0
    ) -> None:
        self.server = server
        self.serial = serial
        self._reach_s = reach_s
        self._grace_s = grace_s
        self._has_shell_v2 = False

    def shell(self, script: str, deadline: Deadline, stdin: Iterable[bytes] = ()) -> RunResult:
        """Run ``script`` in the device's shell.

        Raises:
            DeviceUnreachable: the device went away before the script had ended. DeadlineExceeded: late;
            adbd ends the script. UnsupportedDevice: no shell v2.
        """
        return collect(self._open_shell(script, deadline), deadline, stdin)

    def checked(self, script: str, deadline: Deadline, stdin: Iterable[bytes] = ()) -> str:
        """The stdout of ``script``, which must succeed. Raises AdbFailure with its stderr if it does not."""
        result = self.shell(script, deadline, stdin)
        if result.returncode != 0:
            words = (result.stderr or result.stdout).decode(errors="replace").strip()
            raise AdbFailure(
                f"{self.serial}: a shell command fails there with exit code {result.returncode}\n"
                f"it was: {script[:120]}\nit said: {words[-500:]}"
            )
        return result.stdout.decode(errors="replace")

    def run(self, argv: Sequence[str], deadline: Deadline) -> RunResult:
        return self.shell(shlex.join(argv), deadline)

    def open_sync(self, deadline: Deadline) -> AdbSocket:
        """To be used with SyncSession, and closed."""
        return self._open("sync:", deadline)

    def push(self, source: Path, target: str, deadline: Deadline, mode: int = 0o644) -> None:
        """By way of a temporary name, checked by sha256: ``target`` is whole or as it was.

        mode: the owner's part counts; adbd gives everybody the same.

        Raises:
            DeployFailed: what arrived is not what was sent. NoSpace, AdbFailure, DeadlineExceeded.
        """
        folder, part = os.path.dirname(target), f"{target}.part"
        self.checked(f"mkdir -p {shlex.quote(folder or '/')}", deadline)
        with self.open_sync(deadline) as connection:
            SyncSession(connection).send(source, part, mode, deadline)
        self._compare(sha256_of(source), part, deadline)
        self.checked(f"mv {shlex.quote(part)} {shlex.quote(target)}", deadline)

    def pull(self, source: str, target: Path, deadline: Deadline) -> None:
        """As ``push``, the other way."""
        part = target.with_name(f".{target.name}.part")
        try:
            with self.open_sync(deadline) as connection:
                SyncSession(connection).receive(source, part, deadline)
            self._compare(sha256_of(part), source, deadline)
            part.replace(target)
        finally:
            part.unlink(missing_ok=True)

    def open_stream(self, argv: Sequence[str], environment: dict[str, str]) -> ShellStream:
        """Start ``argv``; ``environment`` is added to the shell's.

        Raises:
            RunnerDied, DeviceUnreachable, DeadlineExceeded: it does not start.
        """
        deadline = Deadline(_START_S)
        settings = [f"{name}={value}" for name, value in environment.items()]
        # exec keeps the number, and adbd makes the process the leader of a group.
        command = shlex.join(["env", *settings, *argv] if settings else argv)
        connection = self._open_shell(f"echo $$; exec {command}", deadline)
        name = f"{self.serial}: {os.path.basename(argv[0])}"
        return ShellStream(connection, name, self.kill, deadline, grace_s=self._grace_s)

    def kill(self, signal: str, pid: int, deadline: Deadline) -> None:
        """Send ``signal`` (TERM, KILL) to a process and its group; one that is gone is no error."""
        signal = shlex.quote(signal)
        self.shell(f"kill -{signal} -{pid} || kill -{signal} {pid}", deadline)

    def _compare(self, sha256: str, path: str, deadline: Deadline) -> None:
        """Raises DeployFailed unless the device's file ``path`` has this sha256."""
        found = self.checked(f"sha256sum {shlex.quote(path)}", deadline).split()
        if found[:1] != [sha256]:
            raise DeployFailed(
                f"{self.serial}: {path}: sought sha256 {sha256[:16]}…, found {''.join(found[:1])[:16]}…"
            )

    def _open_shell(self, script: str, deadline: Deadline) -> AdbSocket:
        if not self._has_shell_v2:
            features = self._reach(lambda within: self.server.features(self.serial, within), deadline)
            if "shell_v2" not in features:
                found = ", ".join(sorted(features))
                raise UnsupportedDevice(
                    f"{self.serial}: sought shell_v2, which Android has since 7, found {found}"
                )
            self._has_shell_v2 = True
        return self._open(f"shell,v2,raw:{script}", deadline)

    def _open(self, service: str, deadline: Deadline) -> AdbSocket:
        return self._reach(lambda within: self.server.open_service(self.serial, service, within), deadline)

    def _reach(self, attempt: Callable[[Deadline], T], deadline: Deadline) -> T:
        within = Deadline(min(deadline.remaining, self._reach_s))
        return self.server.reach(self.serial, lambda: attempt(within), within)

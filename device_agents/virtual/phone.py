"""A virtual phone: real adbd in namespaces of its own, reached through a relay on 127.0.0.1.

To adb it is a phone like any other, reached by `adb connect`. Simulated, and says so: its property
ro.kvfarm.virtual is 1.
"""

from __future__ import annotations

import errno
import os
import re
import sys
import threading
from pathlib import Path
from typing import Any

from device_agents.deadline import Deadline
from device_agents.errors import InfrastructureError, RunnerDied
from device_agents.local import local_environment
from device_agents.streams import ProcessStream
from device_agents.virtual import control
from device_agents.virtual.errors import VirtualPhoneFailed, VirtualPhoneUnavailable
from device_agents.virtual.init import PhoneConfig
from device_agents.virtual.physics import Truth
from device_agents.virtual.profile import Abi, Profile
from device_agents.virtual.relay import Direction
from device_agents.virtual.rootfs import default_cache, prepare
from kvengine.codec import decode, encode

START_S = 300.0  # of a `with`: long, for the first phone of a machine has its parts to fetch
_ANSWER_S = 10.0
_GRACE_S = 10.0  # the launcher kills the phone and removes its folder, maybe gigabytes of it
# -P -S: nothing but the standard library and our own source; the launcher's memory counts per phone.
_LAUNCHER = (sys.executable, "-P", "-S", "-m", "device_agents.virtual.launcher")

ALLOW = (
    "run as root, or allow unprivileged user namespaces (sysctl user.max_user_namespaces, "
    "kernel.unprivileged_userns_clone, kernel.apparmor_restrict_unprivileged_userns)"
)


class VirtualPhone:
    """One phone, running between ``start`` and ``stop``. Calls may come from any thread.

    root: a folder for the phones of this lab; each has one of its own name in it while it runs.
    cache: where the file system made of Debian's packages is kept. storage: bytes that its /data holds,
    in memory and until its next reboot; 0: what this machine has. latency_s: added to its link in each
    direction, as of a slow network. Nothing outlives this process:
    when it dies, also by SIGKILL, the launcher ends the phone and removes its folder.
    """

    def __init__(
        self,
        name: str,
        profile: Profile,
        abi: Abi,
        root: Path,
        cache: Path | None = None,
        storage: int = 0,
        latency_s: float = 0.0,
    ) -> None:
        """Raises VirtualPhoneFailed for a name that is no folder name of letters, digits, - and _."""
        if not re.fullmatch(r"[A-Za-z0-9_-]{1,64}", name):
            raise VirtualPhoneFailed(
                f"a virtual phone cannot be named {name!r}; use letters, digits, - and _"
            )
        self.name, self.profile, self.abi = name, profile, abi
        self.folder = root.resolve() / name
        self._storage, self._latency_s = storage, latency_s
        self._cache = (cache or default_cache()).resolve()
        self._stream: ProcessStream | None = None
        self._port = 0
        self._turn = threading.Lock()
        self.relay = RelayFaults(self)

    def start(self, deadline: Deadline) -> str:
        """Boot; returns its address once adbd listens. Already running: its address.

        Raises:
            VirtualPhoneUnavailable: this machine allows no namespaces or cannot get the parts.
            VirtualPhoneFailed: it did not come up. DeadlineExceeded: not in time; nothing is left.
        """
        with self._turn:
            if self._stream is None:
                template = prepare(self.abi, self._cache, deadline)
                config = PhoneConfig(
                    self.name,
                    self.abi,
                    self.profile,
                    template=str(template),
                    folder=str(self.folder),
                    port=0,
                    parent=os.getpid(),
                    storage=self._storage,
                    latency_s=self._latency_s,
                )
                stream = ProcessStream(_LAUNCHER, local_environment({}), grace_s=_GRACE_S)
                try:
                    stream.write(control.frame(encode(config)), deadline)
                    self._port = self._ready(_receive(stream, deadline), stream)
                except BaseException:
                    stream.close()
                    raise
                self._stream = stream
            return self.address

    def stop(self) -> None:
        """Kill it and remove its folder; returns when both is done. Not running: nothing to do."""
        with self._turn:
            stream, self._stream = self._stream, None
            if stream is not None:
                stream.close()

    @property
    def address(self) -> str:
        """What `adb connect` takes: 127.0.0.1:PORT. Raises VirtualPhoneFailed when it does not run."""
        if self._stream is None:
            raise VirtualPhoneFailed(f"the virtual phone {self.name} does not run; start it first")
        return f"127.0.0.1:{self._port}"

    @property
    def launcher_pid(self) -> int:
        """The process on this machine that keeps the phone. Raises VirtualPhoneFailed."""
        if self._stream is None:
            raise VirtualPhoneFailed(f"the virtual phone {self.name} does not run; start it first")
        return self._stream.pid

    @property
    def dead(self) -> bool:
        """It was started, and it or its launcher has died since; ``stop`` and ``start`` give a new one."""
        try:
            return bool(self.ask({"do": "state"})["dead"])
        except InfrastructureError:
            return self._stream is not None

    def kill_adbd(self, at: tuple[Direction, int] | None = None) -> None:
        """SIGKILL to adbd alone; the phone's init starts it again after half a second.

        at: not now but when so many more bytes have gone in that direction.
        """
        self.ask({"do": "kill_adbd", **_when(at)})

    def unplug(self) -> None:
        """For good: it runs on, and nothing reaches it any more."""
        self.ask({"do": "unplug"})

    def fill_storage(self, leave: int | None = 0, at: tuple[Direction, int] | None = None) -> None:
        """Leave /data so many bytes of room; None: what it had. It must have been made with ``storage``.

        at: as for ``kill_adbd``.
        """
        self.ask({"do": "fill", "leave": leave, **_when(at)})

    def reboot(self, down_s: float) -> None:
        """Everything in the phone dies at once; it comes up after ``down_s`` with /data as it was."""
        self.ask({"do": "reboot", "down_s": down_s})

    def truth(self) -> Truth:
        """What its battery really gave, as no phone tells it."""
        return decode(Truth, self.ask({"do": "truth"}), "truth")

    def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        """One request to the launcher. Raises VirtualPhoneFailed, DeadlineExceeded."""
        with self._turn:
            if self._stream is None:
                raise VirtualPhoneFailed(f"the virtual phone {self.name} does not run; start it first")
            deadline = Deadline(_ANSWER_S)
            try:
                self._stream.write(control.frame(request), deadline)
                answer = _receive(self._stream, deadline)
            except RunnerDied as error:
                raise VirtualPhoneFailed(f"the virtual phone {self.name} is gone: {error}") from error
        if "error" in answer:
            raise VirtualPhoneFailed(f"{self.name}: {answer['error']}")
        return answer

    def __enter__(self) -> VirtualPhone:
        self.start(Deadline(START_S))
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def _ready(self, answer: dict[str, Any], stream: ProcessStream) -> int:
        if "ready" in answer:
            return int(answer["ready"]["port"])
        failed = answer.get("failed", {})
        what = failed.get("what", "")
        if failed.get("forbidden"):
            name = errno.errorcode.get(failed.get("errno", 0), "?")
            raise VirtualPhoneUnavailable(f"this machine allows no virtual phones: {what} ({name}); {ALLOW}")
        log = self.folder / "adbd.log"
        tail = log.read_text(errors="replace")[-2000:] if log.exists() else ""
        said = " | ".join(part for part in (what, tail.strip(), stream.stderr_tail()) if part)
        raise VirtualPhoneFailed(f"the virtual phone {self.name} did not start: {said}")


class RelayFaults:
    """The phone's relay, from here; implements device_agents.virtual.relay.Faults."""

    def __init__(self, phone: VirtualPhone) -> None:
        self._phone = phone

    def cut(self) -> int:
        return int(self._phone.ask({"do": "cut"})["cut"])

    def freeze(self, seconds: float) -> None:
        self._phone.ask({"do": "freeze", "seconds": seconds})

    def refuse(self, refusing: bool) -> None:
        self._phone.ask({"do": "refuse", "refusing": refusing})

    def corrupt(self, direction: Direction, after_bytes: int) -> None:
        self._phone.ask({"do": "corrupt", "direction": direction, "after_bytes": after_bytes})

    def state(self) -> dict[str, int]:
        """Connections, bytes carried to_phone and to_host, and whether the phone is up."""
        return {key: int(value) for key, value in self._phone.ask({"do": "state"}).items()}


def _when(at: tuple[Direction, int] | None) -> dict[str, Any]:
    return {} if at is None else {"at": {"direction": at[0], "after_bytes": at[1]}}


def _receive(stream: ProcessStream, deadline: Deadline) -> dict[str, Any]:
    try:
        head = stream.read_exactly(control.HEAD.size, deadline)
        return control.message(stream.read_exactly(control.length(head), deadline))
    except RunnerDied as error:
        tail = stream.stderr_tail()
        raise VirtualPhoneFailed(f"a virtual phone's launcher died: {error} {tail}".strip()) from error

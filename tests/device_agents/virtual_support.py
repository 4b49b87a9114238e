"""Real virtual phones for tests, and looks at what they leave on this machine."""

from __future__ import annotations

import contextlib
import os
import re
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

from device_agents.deadline import Deadline
from device_agents.virtual import VirtualPhone
from device_agents.virtual.adb import PrivateAdbServer, find_adb

ROOT = Path(__file__).parents[2]
MakePhone = Callable[..., VirtualPhone]
# Prints its phone's address and launcher, then waits to be killed or, told "stop", ends in order.
CHILD = """
import sys
from pathlib import Path
from device_agents.deadline import Deadline
from device_agents.virtual import VirtualPhone, load_profile
phone = VirtualPhone("child", load_profile(), "x86_64", Path(sys.argv[1]), Path(sys.argv[2]))
print(phone.start(Deadline(60)), phone.launcher_pid, flush=True)
sys.stdin.readline()
phone.stop()
"""


def wait_for(condition: Callable[[], bool], within_s: float, what: str) -> None:
    deadline, pause = Deadline(within_s), threading.Event()
    while not condition():
        assert not deadline.expired, f"{what}: not within {within_s} s"
        pause.wait(0.02)


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


def tree(pid: int) -> set[int]:
    """``pid`` and all that descend from it, by host PIDs."""
    found, parents = {pid}, {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                parents[int(entry.name)] = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
    while more := {child for child, parent in parents.items() if parent in found} - found:
        found |= more
    return found


def listening(pids: set[int]) -> set[str]:
    """Addresses, in this network namespace, that one of ``pids`` listens on: 127.0.0.1:PORT."""
    inodes = set()
    for pid in pids:
        with contextlib.suppress(FileNotFoundError):
            for link in Path(f"/proc/{pid}/fd").iterdir():
                with contextlib.suppress(FileNotFoundError):
                    if found := re.fullmatch(r"socket:\[(\d+)\]", os.readlink(link)):
                        inodes.add(found[1])
    addresses = set()
    for table in ("tcp", "tcp6", "udp", "udp6"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            words = line.split()
            if words[9] in inodes and words[3] in ("0A", "07"):  # LISTEN; an unconnected UDP socket
                host, port = words[1].split(":")
                text = socket.inet_ntoa(struct.pack("<I", int(host, 16))) if len(host) == 8 else host
                addresses.add(f"{text}:{int(port, 16)}")
    return addresses


class Adb:
    """The real adb client, on one device of our own server."""

    def __init__(self, server: PrivateAdbServer, address: str) -> None:
        self.address = address
        self._command = [*find_adb(), "-P", str(server.port), "-s", address]

    def __call__(self, command: str) -> str:
        """stdout of a command that succeeds."""
        result = self.run(command)
        assert result.returncode == 0, (command, result)
        return result.stdout

    def run(self, command: str, *options: str) -> subprocess.CompletedProcess[str]:
        return self._do("shell", *options, command)

    def push(self, source: Path, target: str) -> None:
        result = self._do("push", str(source), target)
        assert result.returncode == 0, result

    def answers(self) -> bool:
        return self.run("echo yes").stdout == "yes\n"

    def _do(self, *words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*self._command, *words], stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=20
        )


def connect(server: PrivateAdbServer, phone: VirtualPhone) -> Adb:
    server.connect(phone.address, Deadline(20))
    return Adb(server, phone.address)


def run_child(folder: Path, cache: Path, *before: str) -> subprocess.Popen[str]:
    folder.mkdir()
    return subprocess.Popen(
        [*before, sys.executable, "-c", CHILD, str(folder), str(cache)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )

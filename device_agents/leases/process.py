"""Which process somebody is, and whether it still lives: what the kernel knows, no timeout has to guess."""

from __future__ import annotations

import os
from functools import cache
from pathlib import Path

from device_agents.leases.model import Process


@cache
def boot_id() -> str:
    """Another after each start of the machine."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


@cache
def host_id() -> str:
    """Of the machine since it started, and of this PID namespace: elsewhere a PID means another process."""
    return f"{boot_id()}/{os.stat('/proc/self/ns/pid').st_ino}"


def process(pid: int) -> Process:
    """The process of this machine that has ``pid`` now. Raises ProcessLookupError."""
    started = _started(pid)
    if started is None:
        raise ProcessLookupError(f"no process {pid}")
    return Process(host_id(), pid, started)


def this_process() -> Process:
    return process(os.getpid())


def is_dead(process: Process) -> bool:
    """Whether it is certain that the process is gone; of one elsewhere nothing is."""
    return process.host == host_id() and _started(process.pid) != process.started


def _started(pid: int) -> int | None:
    """None: gone, also while nobody has yet taken its exit code."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    words = stat.rpartition(")")[2].split()  # a name may have spaces and brackets; see proc(5)
    return None if words[0] in "ZX" else int(words[19])

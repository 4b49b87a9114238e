"""Was the machine ours while we measured? Rounds that were disturbed decide nothing."""

from __future__ import annotations

import os
import time
from pathlib import Path

# Share of the machine's CPU time that others may use during a round. On 2 cores 5 % is a tenth of one
# core: enough for the kernel and this bench's parent, too little for a test suite or a spinning thread.
QUIET = 0.05


class CpuWatch:
    """Started when made; ``elsewhere`` tells what the rest of the machine did since."""

    def __init__(self) -> None:
        self._busy, self._own, self._wall = busy_seconds(), time.process_time(), time.perf_counter()

    def elsewhere(self) -> float:
        """Share (0 to 1) of all CPU time that went to other processes, the kernel or the hypervisor."""
        return elsewhere_share(
            busy_seconds() - self._busy,
            time.process_time() - self._own,
            time.perf_counter() - self._wall,
            os.cpu_count() or 1,
        )


def elsewhere_share(busy: float, own: float, wall: float, cpus: int) -> float:
    """(busy - own) / (wall * cpus), all in seconds, kept within 0 to 1 (ticks are coarse)."""
    return min(1.0, max(0.0, (busy - own) / (wall * cpus)))


def busy_seconds(stat: str | None = None) -> float:
    """CPU seconds not idle since boot, all CPUs: user, nice, system, irq, softirq, steal of /proc/stat.

    (proc_stat(5). Time of guests is part of user; iowait is idle.)
    """
    text = Path("/proc/stat").read_text() if stat is None else stat
    user, nice, system, _idle, _iowait, irq, softirq, steal = map(int, text.split("\n", 1)[0].split()[1:9])
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")

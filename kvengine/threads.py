"""How many threads to decode with.

Never onnxruntime's own choice, which looks at the machine and not at the process.
"""

from __future__ import annotations

import os
from pathlib import Path

# Decode is bound by memory; a core much slower than the fastest one only makes the others wait.
_FAST_ENOUGH = 0.7
_MOST = 8


def choose_threads(cpus: Path = Path("/sys/devices/system/cpu")) -> int:
    """Physical cores this process may use whose top clock is at least 0.7 of the fastest one's, at most 8."""
    allowed = sorted(os.sched_getaffinity(0))
    clocks = {cpu: _read_int(cpus / f"cpu{cpu}/cpufreq/cpuinfo_max_freq") for cpu in allowed}
    fastest = max((clock for clock in clocks.values() if clock), default=0)
    siblings = set()
    for cpu in allowed:
        if (clocks[cpu] or fastest) >= _FAST_ENOUGH * fastest:
            siblings.add(_read(cpus / f"cpu{cpu}/topology/thread_siblings_list") or str(cpu))
    return max(1, min(len(siblings), _MOST))


def count_threads() -> int:
    """Threads of this process."""
    return len(os.listdir("/proc/self/task"))


def _read(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""


def _read_int(path: Path) -> int:
    text = _read(path)
    return int(text) if text.isdigit() else 0

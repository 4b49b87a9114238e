"""How fast this machine reads memory: a decode step, which reads every weight once, cannot be faster.

``ceiling = read bandwidth / bytes a step reads``. It is optimistic: it leaves out what a kernel packs beside
the weights and what a step writes. 100 % is not the goal.
"""

from __future__ import annotations

import itertools
import os
import re
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

CACHE_SIZES = "/sys/devices/system/cpu/cpu0/cache"
MEMORY = "/proc/meminfo"
# A buffer of some times the cache is not enough: on an EPYC with 32 MiB the best pass over 128 MiB read 42 to
# 46 GB/s, over 256 MiB 32 to 40, and from 512 MiB to 2 GiB always 28 to 35.
_CACHES = 16
_FEWEST_CACHES = 8  # where memory is short; with fewer there is no number
_LEAST, _MOST = 1 << 29, 4 << 30  # bytes, however small or large the cache
_SMALLEST = 1 << 27  # where memory is short and the cache's size is not told
_SHARE = 4  # of the memory that is available, one part in so many is taken
_PIECE = 1 << 22  # bytes a thread reads at a time: slow cores then take fewer of them
REPEATS = 12  # passes; with the buffer about half a second

Words = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Bandwidth:
    """What ``threads`` threads read together, bytes/s, from ``buffer_bytes``.

    cache_bytes: of the last-level cache, 0 where the system does not tell: a model that fits into it may be
    read faster.
    """

    bytes_per_s: float
    buffer_bytes: int
    threads: int
    cache_bytes: int


def measure_bandwidth() -> Bandwidth | None:
    """With all cores that this process may use; None where too little memory is free to tell from cache."""
    cache = last_level_cache()
    size = buffer_bytes(cache, memory_available())
    if size < max(min(_FEWEST_CACHES * cache, _MOST), _SMALLEST):
        return None
    threads = _cores()
    try:
        return Bandwidth(read_bandwidth(threads, size), size, threads, cache)
    except MemoryError:  # a limit that is not the machine's
        return None


def read_bandwidth(threads: int, size: int, repeats: int = REPEATS) -> float:
    """Bytes a second that ``threads`` threads together read from ``size`` bytes; best of several passes.

    The best, because a pass can only be slowed by others. numpy's maximum releases the GIL and is
    vectorised, so that it waits for memory and not for arithmetic.
    """
    words = np.ones(max(1, size // 8), np.int64)
    pieces = [words[at : at + _PIECE // 8] for at in range(0, len(words), _PIECE // 8)]
    return words.nbytes / min(_pass(pieces, threads) for _ in range(repeats))


def _pass(pieces: list[Words], threads: int) -> float:
    """Seconds until all of ``pieces`` were read."""
    start = threading.Barrier(threads + 1)
    taken = itertools.count()  # the next one is atomic under the GIL

    def read() -> None:
        start.wait(timeout=60)
        while (number := next(taken)) < len(pieces):
            pieces[number].max()

    workers = [threading.Thread(target=read) for _ in range(threads)]
    for worker in workers:
        worker.start()
    start.wait(timeout=60)
    started = time.perf_counter()
    for worker in workers:
        worker.join()
    return time.perf_counter() - started


def buffer_bytes(cache: int, available: int | None = None) -> int:
    """Bytes to read so that ``cache`` bytes of cache cannot hold them, and what is ``available`` can."""
    size = min(max(_CACHES * cache, _LEAST), _MOST)
    return size if available is None else min(size, available // _SHARE)


def last_level_cache(folder: str = CACHE_SIZES) -> int:
    """Bytes of the largest cache that Linux reports for the first CPU; 0 where it reports none."""
    try:
        return max(
            (parse_size(path.read_text().strip()) for path in Path(folder).glob("index*/size")), default=0
        )
    except (OSError, ValueError):  # some phones let no app look
        return 0


def parse_size(text: str) -> int:
    """``"480K"`` or ``"2M"`` in bytes. Raises ValueError for anything else."""
    match = re.fullmatch(r"(\d+)([KMG]?)", text)
    if match is None:
        raise ValueError(f"sought a size such as 480K, found {text!r}")
    return int(match[1]) << {"": 0, "K": 10, "M": 20, "G": 30}[match[2]]


def memory_available(path: str = MEMORY) -> int | None:
    """Bytes that Linux says can be had without swapping; None where it does not tell."""
    try:
        found = re.search(r"^MemAvailable:\s+(\d+) kB$", Path(path).read_text(), re.MULTILINE)
    except OSError:
        return None
    return int(found[1]) * 1024 if found else None


def _cores() -> int:
    try:
        return len(os.sched_getaffinity(0))
    except (AttributeError, OSError):
        return os.cpu_count() or 1

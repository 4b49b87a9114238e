"""The bandwidth ceiling: decoding waits for memory, so what share of the memory's speed does it reach?

``share = bytes a step reads x tokens/s / read bandwidth``. The bytes are the least that a step must read, its
weights and the rows of the cache that its windows see, so the share errs to the low side. Never a number
where the device's bandwidth was not measured.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from reports import text
from reports.results import BandwidthInfo, LegResult, StepReads


@dataclass(frozen=True)
class Share:
    """``value`` is None where it is not known, and ``words`` say why; ``detail``: what it is a share of."""

    value: float | None
    words: str
    detail: str = ""


NOT_MEASURED = Share(None, "not measured")


def bandwidths(legs: Iterable[LegResult]) -> dict[str, BandwidthInfo]:
    """The best of each device: others can only slow such a measurement down."""
    found: dict[str, BandwidthInfo] = {}
    for leg in legs:
        best = found.get(leg.device)
        if leg.bandwidth is not None and (best is None or leg.bandwidth.bytes_per_s > best.bytes_per_s):
            found[leg.device] = leg.bandwidth
    return found


def share(reads: StepReads | None, tokens_per_s: float | None, bandwidth: BandwidthInfo | None) -> Share:
    if reads is None or tokens_per_s is None or bandwidth is None:
        return NOT_MEASURED
    size = reads.weights + reads.kv
    if size <= bandwidth.cache_bytes:
        # Then it may be read faster than memory, and a share of memory's speed says nothing.
        return Share(None, "fits the cache", f"{_size(size)} of {_size(bandwidth.cache_bytes)}")
    found = size * tokens_per_s / bandwidth.bytes_per_s
    return Share(found, f"{found:.0%}".replace("%", " %"), f"of {speed(bandwidth)}")


def speed(bandwidth: BandwidthInfo) -> str:
    """``31.2 GB/s``."""
    return f"{text.number(bandwidth.bytes_per_s / 1e9)} GB/s"


def bandwidth_line(bandwidth: BandwidthInfo | None) -> str:
    """How it was measured; "" where it was not."""
    if bandwidth is None:
        return ""
    threads = text.plural(bandwidth.threads, "thread")
    return f"{speed(bandwidth)} ({threads}, {_size(bandwidth.buffer_bytes)}, best pass)"


def reads_line(reads: StepReads) -> str:
    """``692 MiB a token, 1.5 MiB of them cache``."""
    return f"{_size(reads.weights + reads.kv)} a token, {_size(reads.kv)} of them cache"


def _size(value: int) -> str:
    return text.byte_size(value)

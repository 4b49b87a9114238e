"""How good any schedule can be."""

from __future__ import annotations

from collections.abc import Sequence


def perfect_s(seconds: Sequence[float], devices: int) -> float:
    """No schedule of these jobs on so many equal devices ends sooner, s: nobody idles, or one job is longer
    than that (McNaughton, Scheduling with deadlines and loss functions, 1959).

    Raises ValueError for no job or no device.
    """
    if not seconds or devices < 1:
        raise ValueError(f"sought jobs and devices, found {len(seconds)} and {devices}")
    return max(sum(seconds) / devices, *seconds)

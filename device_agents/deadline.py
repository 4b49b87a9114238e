"""A deadline as an object, handed down from caller to callee (labgrid's util/timeout.py)."""

from __future__ import annotations

import time

from device_agents.errors import DeadlineExceeded


class Deadline:
    """``seconds`` from now. Started when made; never extended."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self._end = time.monotonic() + seconds

    @property
    def remaining(self) -> float:
        """Seconds left, never negative."""
        return max(0.0, self._end - time.monotonic())

    @property
    def expired(self) -> bool:
        return self.remaining == 0.0

    def check(self, what: str) -> None:
        """Raises DeadlineExceeded, naming ``what`` was waited for."""
        if self.expired:
            raise DeadlineExceeded(f"{what}: not done within {self.seconds:g} s")

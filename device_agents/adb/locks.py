"""Waiting for a lock has a deadline too."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from device_agents.deadline import Deadline
from device_agents.errors import DeadlineExceeded


@contextmanager
def holding(lock: threading.Lock, deadline: Deadline, what: str) -> Iterator[None]:
    """Raises DeadlineExceeded when ``what`` stays busy with another call."""
    if not lock.acquire(timeout=min(deadline.remaining, threading.TIMEOUT_MAX)):
        raise DeadlineExceeded(f"{what} was busy with another call for {deadline.seconds:g} s")
    try:
        yield
    finally:
        lock.release()

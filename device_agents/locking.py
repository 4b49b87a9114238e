"""A lock between processes of one machine: an flock, which the kernel takes back when its holder dies."""

from __future__ import annotations

import fcntl
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from device_agents.deadline import Deadline
from device_agents.errors import DeadlineExceeded

_POLL_S = 0.05


@contextmanager
def locked(path: Path, deadline: Deadline, *, poll_s: float = _POLL_S) -> Iterator[None]:
    """Nobody else has ``path`` meanwhile. poll_s: how often it is tried.

    Raises:
        DeadlineExceeded: it was not free in time.
    """
    file = lock_file(path, deadline, poll_s=poll_s)
    try:
        yield
    finally:
        os.close(file)


def lock_file(
    path: Path,
    deadline: Deadline,
    *,
    shared: bool = False,
    on_wait: Callable[[], None] = lambda: None,
    poll_s: float = _POLL_S,
) -> int:
    """As ``locked``; the open file that holds the lock until it is closed. on_wait: called once if somebody
    else has it."""
    file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    how, pause, told = fcntl.LOCK_SH if shared else fcntl.LOCK_EX, threading.Event(), False
    try:
        while True:
            try:
                fcntl.flock(file, how | fcntl.LOCK_NB)
                return file
            except BlockingIOError:
                if deadline.expired:
                    raise DeadlineExceeded(
                        f"{path.name}: others kept it for {deadline.seconds:g} s; `lsof {path}` says who"
                    ) from None
            if not told:
                told = True
                on_wait()
            pause.wait(poll_s)
    except BaseException:
        os.close(file)
        raise

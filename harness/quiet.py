"""Who uses a machine's CPU when: checks share it, a measurement has it alone.

Between processes, by flock: the kernel takes a lock back when its holder dies.
"""

from __future__ import annotations

import fcntl
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from device_agents.deadline import Deadline
from device_agents.errors import DeadlineExceeded

WAIT_S = (
    3600.0  # a check on an emulated phone or a leg with energy takes minutes, and several may be before us
)
_POLL_S = 0.05


@contextmanager
def locked(
    path: Path, deadline: Deadline, *, shared: bool = False, on_wait: Callable[[], None] = lambda: None
) -> Iterator[None]:
    """Holds an flock on ``path``. on_wait: called once if somebody else has it.

    Raises:
        DeadlineExceeded: it was not free in time.
    """
    file = _locked_file(path, deadline, shared, on_wait)
    try:
        yield
    finally:
        os.close(file)


class Quiet:
    """One machine, as one process that works on it sees it. Not for several threads.

    A leg that waits keeps new checks from beginning, so it waits only for those that run.

    folder: of the lock files, the same for all that share the machine. on_wait: called when the machine
    is not free at once.
    """

    def __init__(self, folder: Path, on_wait: Callable[[], None] = lambda: None) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._turn, self._machine = folder / "turn.lock", folder / "machine.lock"
        self._on_wait = on_wait
        self._file: int | None = None  # what we hold, if anything
        self.waited_s = 0.0  # in all

    @contextmanager
    def shared(self) -> Iterator[None]:
        """While the body runs nobody measures. Raises DeadlineExceeded."""
        with self._having(shared=True):
            yield

    @contextmanager
    def alone(self) -> Iterator[None]:
        """While the body runs nobody else works. May be asked for inside ``shared``, which is then
        given up for as long. Raises DeadlineExceeded."""
        interrupted = self._file is not None
        self._give_up()
        try:
            with self._having(shared=False):
                yield
        finally:
            if interrupted:
                self._take(shared=True)

    @contextmanager
    def _having(self, *, shared: bool) -> Iterator[None]:
        self._take(shared=shared)
        try:
            yield
        finally:
            self._give_up()

    def _take(self, *, shared: bool) -> None:
        began, deadline = time.monotonic(), Deadline(WAIT_S)
        try:
            with locked(self._turn, deadline, on_wait=self._on_wait):
                self._file = _locked_file(self._machine, deadline, shared, self._on_wait)
        finally:
            self.waited_s += time.monotonic() - began

    def _give_up(self) -> None:
        file, self._file = self._file, None
        if file is not None:
            os.close(file)


def _locked_file(path: Path, deadline: Deadline, shared: bool, on_wait: Callable[[], None]) -> int:
    """The open file that holds the lock."""
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
                        f"{path.name}: others were at work for {deadline.seconds:g} s; `lsof {path}` says who"
                    ) from None
            if not told:
                told = True
                on_wait()
            pause.wait(_POLL_S)
    except BaseException:
        os.close(file)
        raise

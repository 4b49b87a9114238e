"""Who uses a machine's CPU when: checks share it, a measurement has it alone.

Between processes, by flock: the kernel takes a lock back when its holder dies.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from device_agents.deadline import Deadline
from device_agents.locking import lock_file

WAIT_S = (
    3600.0  # a check on an emulated phone or a leg with energy takes minutes, and several may be before us
)


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
            turn = lock_file(self._turn, deadline, on_wait=self._on_wait)
            try:
                self._file = lock_file(self._machine, deadline, shared=shared, on_wait=self._on_wait)
            finally:
                os.close(turn)
        finally:
            self.waited_s += time.monotonic() - began

    def _give_up(self) -> None:
        file, self._file = self._file, None
        if file is not None:
            os.close(file)

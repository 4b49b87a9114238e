"""A single-threaded event loop: callbacks on descriptors, callbacks at times. Standard library only.

Virtual phones fork and enter namespaces, which a process with threads must not do; hence no threads.
"""

from __future__ import annotations

import heapq
import itertools
import selectors
import time
from collections.abc import Callable
from typing import Protocol

READ = selectors.EVENT_READ
WRITE = selectors.EVENT_WRITE

Callback = Callable[[int], None]
"""Called with the events that are ready."""


class HasFileno(Protocol):
    def fileno(self) -> int: ...


class Loop:
    """``watch`` and ``later`` tell it what to do; ``run`` does it until ``stop``."""

    def __init__(self) -> None:
        self._selector = selectors.DefaultSelector()
        self._timers: list[tuple[float, int, Callable[[], None]]] = []
        self._order = itertools.count()
        self._stopped = False

    def watch(self, source: HasFileno, events: int, callback: Callback) -> None:
        """From now on call ``callback`` when ``events`` are ready; 0 events ends it. Replaces what was."""
        known = source.fileno() in self._selector.get_map()
        if not events:
            if known:
                self._selector.unregister(source)
        elif known:
            self._selector.modify(source, events, callback)
        else:
            self._selector.register(source, events, callback)

    def forget(self, source: HasFileno) -> None:
        """Before ``source`` is closed."""
        if source.fileno() in self._selector.get_map():
            self._selector.unregister(source)

    def later(self, seconds: float, callback: Callable[[], None]) -> None:
        heapq.heappush(self._timers, (time.monotonic() + seconds, next(self._order), callback))

    def once(self, seconds: float) -> None:
        """Wait at most ``seconds`` for something to do, and do it."""
        if self._timers:
            seconds = min(seconds, max(0.0, self._timers[0][0] - time.monotonic()))
        for key, events in self._selector.select(seconds):
            # An earlier callback of this round may have closed it, and its number may be another's now.
            now = self._selector.get_map().get(key.fd)
            if now is not None and now.data is key.data:
                key.data(events)
        while self._timers and self._timers[0][0] <= time.monotonic():
            heapq.heappop(self._timers)[2]()

    def run(self) -> None:
        while not self._stopped:
            self.once(60.0)

    def stop(self) -> None:
        self._stopped = True

    def close(self) -> None:
        self._selector.close()

"""When a device did what: told piece by piece while it works, kept with each check and leg."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

from harness.errors import StoreError
from harness.store.protocol import Part, PartKind, Span

_log = logging.getLogger(__name__)

SHORT_S = 0.05  # waits that nobody needs to see
_MOST_PARTS = 2000  # of one span; a check of more programs tells its first ones


class Recorder:
    """Of one process's part of a run; thread-safe. keep: stores a span."""

    def __init__(self, keep: Callable[[Span], None]) -> None:
        self._keep = keep
        self._parts: dict[str, list[Part]] = {}
        self._lock = threading.Lock()

    def part(self, device: str, kind: PartKind, name: str, began: float, ended: float) -> None:
        """Unix times, s."""
        with self._lock:
            parts = self._parts.setdefault(device, [])
            if len(parts) < _MOST_PARTS:
                parts.append(Part(kind, name, began, ended))

    @contextmanager
    def doing(self, device: str, kind: PartKind, name: str, least_s: float = 0.0) -> Iterator[None]:
        """The body is a part, unless it takes less than ``least_s``."""
        began = time.time()
        try:
            yield
        finally:
            ended = time.time()
            if ended - began >= least_s:
                self.part(device, kind, name, began, ended)

    def instant(self, device: str, kind: PartKind, name: str) -> None:
        now = time.time()
        self.part(device, kind, name, now, now)

    def whole(self, span: Span) -> Span:
        """With the parts that were told since the last one; for who keeps it."""
        with self._lock:
            parts = tuple(self._parts.pop(span.device, ()))
        return replace(span, parts=parts)

    def span(self, span: Span) -> None:
        """It is over, and kept ``whole``. Raises StoreError."""
        self._keep(self.whole(span))

    def lease(self, device: str, token: int, began: float, ended: float | None) -> None:
        """It began, or has ended. Never raises: no device may hang on it."""
        self._keep_or_log(Span(device, "lease", f"lease {token}", began, ended))

    def quarantine(self, device: str, evidence: str) -> None:
        """Raises StoreError."""
        now = time.time()
        self._keep(Span(device, "quarantine", evidence, now, now))

    def flush(self) -> None:
        """Keep what belongs to no check or leg: the last thing. Never raises."""
        with self._lock:
            rest, self._parts = self._parts, {}
        for device, parts in rest.items():
            began, ended = min(p.began for p in parts), max(p.ended for p in parts)
            self._keep_or_log(Span(device, "rest", "before and after", began, ended, parts=tuple(parts)))

    def _keep_or_log(self, span: Span) -> None:
        try:
            self._keep(span)
        except StoreError as error:
            _log.warning("what %s did is not kept (%s): %s", span.device, span.name, error)


class _Nothing(Recorder):
    def part(self, device: str, kind: PartKind, name: str, began: float, ended: float) -> None:
        """Else parts would wait for a span that never comes."""


def recording_nothing() -> Recorder:
    """For who is no run."""
    return _Nothing(lambda span: None)

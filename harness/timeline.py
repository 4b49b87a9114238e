"""A run's timeline in Chrome's trace-event JSON, as ui.perfetto.dev and chrome://tracing open it.

"Trace Event Format", docs.google.com/document/d/1CvAClvFfyA5R-PhYUmn5OOQtYMH4h6I0nSsKchNAySU: one process
a device, a thread for its leases, its sessions and its work. Events of one thread must lie side by side or
inside each other; where some do not, they get a further thread.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from harness.store.protocol import Span
from reports.results import RunResults

_ROWS = ("lease", "work", "session")
_ROW_OF = {"lease": "lease", "session": "session"}  # the rest is work
_INSTANTS = ("retry", "quarantine")


@dataclass(frozen=True)
class _Piece:
    """began, ended: µs from the run's start."""

    row: str
    kind: str
    name: str
    began: int
    ended: int
    details: dict[str, Any]


class _Lane:
    """Pieces that lie side by side or inside each other."""

    def __init__(self) -> None:
        self.pieces: list[_Piece] = []
        self._open: list[int] = []  # when those end that the next may lie in, the innermost last

    def take(self, piece: _Piece) -> bool:
        """Whether it fits and is one of ours now. It begins no sooner than any before it."""
        while self._open and self._open[-1] <= piece.began:
            self._open.pop()
        if self._open and self._open[-1] < piece.ended:
            return False
        self._open.append(piece.ended)
        self.pieces.append(piece)
        return True


def trace(run: RunResults, spans: Sequence[Span]) -> dict[str, Any]:
    """The whole file. What has not ended lasts until the last thing that is known, and says so."""
    start = min((moment for span in spans for moment in _moments(span)), default=0.0)
    last = max((moment for span in spans for moment in _moments(span)), default=0.0)
    simulated = {device.name: device.simulated for device in run.devices}
    events: list[dict[str, Any]] = []
    for pid, device in enumerate(dict.fromkeys(span.device for span in spans), 1):
        said = f"{device} (simulated: {simulated[device]})" if simulated.get(device) else device
        events += [_named("process_name", pid, 0, said), _sorted("process_sort_index", pid, 0, pid)]
        pieces = [p for span in spans if span.device == device for p in _pieces(span, start, last)]
        events += _threads(pid, pieces)
    details = {"run": run.run_id, "command": run.command, "started_at": run.started_at, "model": run.model}
    return {"traceEvents": events, "displayTimeUnit": "ms", "otherData": details}


def _moments(span: Span) -> Iterator[float]:
    yield span.began
    if span.ended is not None:
        yield span.ended
    for part in span.parts:
        yield part.began
        yield part.ended


def _pieces(span: Span, start: float, last: float) -> Iterator[_Piece]:
    def micros(at: float) -> int:
        return round((at - start) * 1e6)

    if span.kind != "rest":
        details: dict[str, Any] = {"outcome": span.outcome, "retries": span.retries}
        if span.ended is None:
            details["unfinished"] = "it went on, or its process was killed"
        ended = last if span.ended is None else span.ended
        row = _ROW_OF.get(span.kind, "work")
        yield _Piece(row, span.kind, span.name, micros(span.began), micros(ended), details)
    for part in span.parts:
        row = _ROW_OF.get(part.kind, "work")
        yield _Piece(row, part.kind, part.name, micros(part.began), micros(part.ended), {})


def _threads(pid: int, pieces: Iterable[_Piece]) -> Iterator[dict[str, Any]]:
    lanes: dict[str, list[_Lane]] = {row: [] for row in _ROWS}
    instants = list[_Piece]()
    # The longer first: what begins together lies inside it.
    for piece in sorted(pieces, key=lambda p: (p.began, -p.ended)):
        if piece.kind in _INSTANTS:
            instants.append(piece)
            continue
        if not any(lane.take(piece) for lane in lanes[piece.row]):
            lanes[piece.row].append(_Lane())
            lanes[piece.row][-1].take(piece)
    for index, row in enumerate(_ROWS):
        for number, lane in enumerate(lanes[row]):
            tid = 1 + index + number * len(_ROWS)
            yield _named("thread_name", pid, tid, row if number == 0 else f"{row} {number + 1}")
            yield _sorted("thread_sort_index", pid, tid, 100 * index + number)
            for piece in lane.pieces:
                yield _event(piece, "X", pid, tid) | {"dur": piece.ended - piece.began}
    for piece in instants:
        yield _event(piece, "i", pid, 1 + _ROWS.index("work")) | {"s": "p"}


def _event(piece: _Piece, phase: str, pid: int, tid: int) -> dict[str, Any]:
    named = {"name": piece.name, "cat": piece.kind, "ph": phase, "ts": piece.began, "pid": pid, "tid": tid}
    return named | {"args": {"kind": piece.kind, **piece.details}}


def _named(what: str, pid: int, tid: int, name: str) -> dict[str, Any]:
    return {"name": what, "ph": "M", "pid": pid, "tid": tid, "args": {"name": name}}


def _sorted(what: str, pid: int, tid: int, index: int) -> dict[str, Any]:
    return {"name": what, "ph": "M", "pid": pid, "tid": tid, "args": {"sort_index": index}}

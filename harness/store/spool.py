"""A store whose database may go away: what it does not take waits in a file until it is back.

Nothing is dropped. A spool is JSON lines, on the disk before the write that they are of returns, delivered
in order; to deliver one twice does no harm, since the store keeps each result once. The spool of a process
that died is delivered by whoever goes on with its run.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal
from urllib.parse import quote

from device_agents.deadline import Deadline
from harness.errors import StoreAway, StoreError
from harness.store.protocol import Flakes, Span
from harness.store.sql import SqlStore, url_of
from kvengine.codec import DecodeError, decode, encode
from reports.results import CheckResult, DeviceInfo, LegResult, RunResults

SPOOL = Path(".kvfarm") / "spool"
PATIENCE_S = 600.0  # a server that is moved takes minutes
_RETRY_S, _HURRY_S = 0.5, 5.0
_SUFFIX = ".jsonl"
_log = logging.getLogger(__name__)

What = Literal["run", "device", "check", "leg", "infrastructure", "span", "finish", "tag"]
_KINDS: dict[What, type] = {
    "run": RunResults,
    "device": DeviceInfo,
    "check": CheckResult,
    "leg": LegResult,
    "span": Span,
}


@dataclass(frozen=True)
class Entry:
    """One write. value: what is to be kept, as itself or as JSON. span: of a check or leg."""

    what: What
    run_id: str
    value: Any
    span: Span | None = None


class SpoolingStore(SqlStore):
    """See the module and harness.store.protocol.Store. Writes raise StoreAway only where no disk takes the
    spool for ``patience_s`` either; ``results`` waits so long for the database, and until it has everything.

    name: of the spool's files in ``folder``, a run's id. on_wait: told why we wait, again and again.
    opened_before: somebody has just used this store, so that one that is away is waited for from the start.
    """

    def __init__(
        self,
        where: str | Path | None,
        folder: Path,
        name: str,
        on_wait: Callable[[str], None] = lambda reason: None,
        patience_s: float | None = None,
        *,
        opened_before: bool = False,
    ) -> None:
        self._on_wait = on_wait
        self._reason = ""  # why the database did not take what waits
        self._patience_s = PATIENCE_S if patience_s is None else patience_s
        deadline, pause = Deadline(self._patience_s if opened_before else 0.0), threading.Event()
        while True:
            try:
                super().__init__(url_of(where))
                break
            except StoreAway as error:
                if deadline.expired:
                    raise
                self._reason = str(error)
            self._say(deadline)
            pause.wait(min(_RETRY_S, deadline.remaining))
        self._path = folder / f"{quote(name, safe='')}.{os.getpid()}-{time.monotonic_ns():x}{_SUFFIX}"
        self._waiting: deque[Entry] = deque()
        self._written = 0  # of those that wait, how many are in the file
        self._file: IO[bytes] | None = None
        self._changed = threading.Condition()
        self._refused: StoreError | None = None  # it is back, and does not take it
        self._courier: threading.Thread | None = None
        self._closing = threading.Event()

    @property
    def waiting(self) -> int:
        """Writes that the database does not have yet."""
        with self._changed:
            return len(self._waiting)

    # -- what is kept --------------------------------------------------------------------------

    def begin_run(self, run: RunResults) -> None:
        self._write(Entry("run", run.run_id, run))

    def add_device(self, run_id: str, device: DeviceInfo) -> None:
        self._write(Entry("device", run_id, device))

    def add_check(self, run_id: str, check: CheckResult, span: Span | None = None) -> None:
        self._write(Entry("check", run_id, check, span))

    def add_leg(self, run_id: str, leg: LegResult, span: Span | None = None) -> None:
        self._write(Entry("leg", run_id, leg, span))

    def add_infrastructure(self, run_id: str, message: str) -> None:
        self._write(Entry("infrastructure", run_id, message))

    def add_span(self, run_id: str, span: Span) -> None:
        self._write(Entry("span", run_id, span))

    def finish_run(self, run_id: str, finished_at: str) -> None:
        self._write(Entry("finish", run_id, finished_at))

    def add_tag(self, run_id: str, tag: str) -> None:
        self._write(Entry("tag", run_id, tag))

    # -- what is asked -------------------------------------------------------------------------

    def results(self, run_id: str) -> RunResults:
        found: RunResults = self._patiently(lambda: SqlStore.results(self, run_id))
        return found

    def flakes(self, last: int = 100) -> dict[str, Flakes]:
        found: dict[str, Flakes] = self._patiently(lambda: SqlStore.flakes(self, last))
        return found

    def drain(self) -> None:
        """Return when the database has everything.

        Raises:
            StoreAway: not in time; says where the rest waits. StoreError: it does not take it.
        """
        deadline = Deadline(self._patience_s)
        with self._changed:
            while self._waiting and self._refused is None:
                if deadline.expired:
                    raise StoreAway(
                        f"{len(self._waiting)} results wait in {self._path}, for the store was away for "
                        f"{self._patience_s:g} s: {self._reason}; when it is back, `kvfarm resume` the run: "
                        "that delivers them and does what is missing"
                    )
                self._say(deadline)
                self._changed.wait(min(_RETRY_S, deadline.remaining))
            if self._refused is not None:
                raise StoreError(
                    f"the store is back and refuses what waits in {self._path}: {self._refused}"
                ) from self._refused

    def hurry(self) -> None:
        """Somebody wants us to end: what is not taken in a few seconds stays in its file."""
        self._patience_s = min(self._patience_s, _HURRY_S)

    def adopt(self) -> int:
        """Deliver what processes that died have left for this run; returns how many writes.

        Raises:
            StoreError. OSError.
        """
        pattern = f"{self._path.name.rpartition('.')[0].rpartition('.')[0]}.*{_SUFFIX}"
        count = 0
        for path in sorted(self._path.parent.glob(pattern), key=lambda path: path.stat().st_mtime_ns):
            with _abandoned(path) as file:
                if file is None:
                    continue
                for entry in entries(file):
                    self._patiently(lambda entry=entry: self._deliver(entry))  # type: ignore[misc]
                    count += 1
                path.unlink()
        return count

    def close(self) -> None:
        """What waits stays in its file, for whoever goes on with the run; see ``drain``."""
        if self.waiting:
            _log.warning(
                "%d results wait in %s; `kvfarm resume` of the run delivers them", self.waiting, self._path
            )
        self._closing.set()
        if self._courier is not None:
            self._courier.join()
        if self._file is not None:
            self._file.close()
            self._file = None
        super().close()

    # -- inside --------------------------------------------------------------------------------

    def _write(self, entry: Entry) -> None:
        with self._changed:
            if not self._waiting:
                try:
                    self._deliver(entry)
                    return
                except StoreAway as error:
                    self._reason = str(error)
                    _log.warning("results wait in %s: %s", self._path, error)
            self._waiting.append(entry)
            if self._courier is None:
                self._courier = threading.Thread(target=self._carry, name="store", daemon=True)
                self._courier.start()
            deadline = Deadline(self._patience_s)
            while self._waiting and not self._spooled():
                # Neither the database nor a disk takes it: we go no further, so as to lose nothing.
                if deadline.expired:
                    raise StoreAway(
                        f"neither the store nor a file in {self._path.parent} took a result for "
                        f"{self._patience_s:g} s: {self._reason}; make room, and `kvfarm resume` the run"
                    )
                self._say(deadline)
                self._changed.wait(min(_RETRY_S, deadline.remaining))

    def _spooled(self) -> bool:
        """Whether all that wait are on the disk."""
        try:
            if self._file is None:
                self._path.parent.mkdir(parents=True, exist_ok=True)
                self._file = self._path.open("ab", buffering=0)
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            _append(self._file, list(self._waiting)[self._written :])
        except OSError as error:
            self._reason = f"{self._path}: {error.strerror}"
            return False
        self._written = len(self._waiting)
        return True

    def _carry(self) -> None:
        """To the database, in order, one after the other, until there is no more, and then again."""
        while not self._closing.wait(_RETRY_S):
            while self.waiting and not self._closing.is_set():
                entry = self._waiting[0]  # only we take any away
                try:
                    self._deliver(entry)
                except StoreAway as error:
                    self._reason = str(error)
                    break
                except StoreError as error:
                    with self._changed:
                        self._refused = error
                        self._changed.notify_all()
                    return
                with self._changed:
                    self._waiting.popleft()
                    self._written = max(0, self._written - 1)
                    if not self._waiting and self._file is not None:
                        self._file.close()
                        self._file = None
                        self._path.unlink(missing_ok=True)
                    self._changed.notify_all()

    def _deliver(self, entry: Entry) -> None:
        value = entry.value
        kind = _KINDS.get(entry.what)
        if kind is not None and not isinstance(value, kind):
            value = decode(kind, value)
        match entry.what:
            case "run":
                SqlStore.begin_run(self, value)
            case "device":
                SqlStore.add_device(self, entry.run_id, value)
            case "check":
                SqlStore.add_check(self, entry.run_id, value, entry.span)
            case "leg":
                SqlStore.add_leg(self, entry.run_id, value, entry.span)
            case "infrastructure":
                SqlStore.add_infrastructure(self, entry.run_id, value)
            case "span":
                SqlStore.add_span(self, entry.run_id, value)
            case "finish":
                SqlStore.finish_run(self, entry.run_id, value)
            case "tag":
                SqlStore.add_tag(self, entry.run_id, value)

    def _patiently(self, work: Callable[[], Any]) -> Any:
        """``work`` once the database has all that was written, tried again while it is away."""
        deadline, pause = Deadline(self._patience_s), threading.Event()
        while True:
            self.drain()
            try:
                return work()
            except StoreAway as error:
                self._reason = str(error)
                if deadline.expired:
                    raise
            self._say(deadline)
            pause.wait(min(_RETRY_S, deadline.remaining))

    def _say(self, deadline: Deadline) -> None:
        self._on_wait(
            f"waits up to {deadline.remaining:.0f} s for the store, nothing is lost: {self._reason}"
        )


def entries(file: IO[str]) -> Iterator[Entry]:
    """The whole lines of a spool. Raises StoreError: what is there is none."""
    for number, line in enumerate(file, 1):
        if not line.endswith("\n"):
            return  # its writer died in the middle, and had told nobody that it was kept
        try:
            yield decode(Entry, json.loads(line))
        except (ValueError, DecodeError) as error:
            raise StoreError(f"{file.name}, line {number} is no result: {error}") from error


@contextmanager
def _abandoned(path: Path) -> Iterator[IO[str] | None]:
    """The spool, unless the process that writes it lives."""
    with path.open() as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield None
            return
        yield file


def _append(file: IO[bytes], what: Iterable[Entry]) -> None:
    """All of it, on the disk, or nothing. Raises OSError."""
    text = b"".join(json.dumps(encode(entry)).encode() + b"\n" for entry in what)
    whole = os.fstat(file.fileno()).st_size
    try:
        while text:
            text = text[file.write(text) :]
        os.fsync(file.fileno())
    except OSError:
        os.ftruncate(file.fileno(), whole)
        raise

"""The leases of one machine: a journal that all its lab agents share, whoever started them.

A command is carried out under an flock, on the state that the journal adds up to; its facts are on the disk
before anybody hears of them. So an agent that was killed at any point is not missed: the next one reads the
journal. An append that was cut short is cut off; what is whole counts.
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from device_agents.deadline import Deadline
from device_agents.errors import InfrastructureError, LeaseError
from device_agents.leases import protocol
from device_agents.leases.model import Beat, Booted, Fact, Facts, Rules, Snapshot, State
from device_agents.leases.process import boot_id, is_dead
from device_agents.leases.protocol import Command
from device_agents.locking import locked
from kvengine.codec import DecodeError, decode, encode

JOURNAL = "leases.jsonl"
ARCHIVE = "audit.jsonl"  # of the facts of these kinds that are in the journal no more
ARCHIVED = ("booted", "asked", "granted", "ended", "quarantined", "lifted", "restarted", "drained")
LONGEST_BYTES = 4 << 20  # some 20,000 facts, read in a second
_LOCK_S = 10.0  # whoever has the lock writes a few lines
_POLL_S = 0.005


@dataclass(frozen=True)
class Entry:
    """A line of the journal. at: monotonic seconds since the machine started. when: UTC, for people."""

    at: float
    when: str
    fact: Fact


class Journal:
    """What the journal in ``folder`` adds up to; only reads, so it keeps nobody waiting. Thread-safe.

    clock: monotonic seconds, the same for all who share ``folder``.

    Raises:
        LeaseError: what is in the journal cannot be read.
    """

    def __init__(
        self, folder: Path, rules: Rules | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.rules = rules or Rules()
        self.path = folder / JOURNAL
        self._clock = clock
        self._lock = threading.Lock()
        self._state = State()
        self._offset = self._lines = self._inode = 0

    def state(self) -> tuple[State, float]:
        """As of now, and the time that is."""
        with self._lock:
            self._read()
            return self._state, self._clock()

    def _read(self) -> None:
        """What others have written since."""
        try:
            with self.path.open("rb") as file:
                found = os.fstat(file.fileno())
                if found.st_ino != self._inode:
                    self._state, self._offset, self._lines = State(), 0, 0
                    self._inode = found.st_ino
                if found.st_size == self._offset:
                    return
                file.seek(self._offset)
                text = file.read()
        except FileNotFoundError:
            return
        whole = text[: text.rfind(b"\n") + 1]
        for line in whole.splitlines():
            self._lines += 1
            entry = parse(line, f"{self.path}, line {self._lines}")
            self._state = protocol.fold(self._state, entry.at, (entry.fact,), self.rules)
        self._offset += len(whole)


class Ledger(Journal):
    """The journal, also written.

    Raises:
        LeaseError: see Journal. InfrastructureError: it cannot be written.
    """

    def __init__(
        self, folder: Path, rules: Rules | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InfrastructureError(
                f"sought a folder for leases, {folder}: {error.strerror}; let KVFARM_LEASES name another"
            ) from error
        super().__init__(folder, rules, clock)
        self._lock_path = folder / "leases.lock"
        with self._writing():
            if self._state.boot != boot_id():
                # Also the number where tokens begin: a journal that somebody removed gives none twice.
                first = int(time.time()) if not self._state.boot else self._state.token
                self._write((Booted(boot_id(), first),))

    def act(self, command: Command = lambda state, now: ()) -> State:
        """Let time end what it ends, carry out the command, grant what can be; returns the state then.

        Raises:
            LeaseError: the command is refused. DeadlineExceeded: another process keeps the lock.
            InfrastructureError: the disk is full; then nothing has happened.
        """
        with self._writing():
            self._write(protocol.due(self._state, self._clock()))
            self._write(protocol.died(is_dead)(self._state, self._clock()))
            try:
                self._write(command(self._state, self._clock()))
            finally:
                self._write(protocol.grants(self._state, self._clock(), self.rules))
            return self._state

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """Nobody else writes, and the state is that of the whole journal."""
        with self._lock, locked(self._lock_path, Deadline(_LOCK_S), poll_s=_POLL_S):
            self._read()
            size = self.path.stat().st_size if self.path.exists() else 0
            if size > self._offset:
                os.truncate(self.path, self._offset)  # its writer died in the middle of it
            if self._offset > LONGEST_BYTES:
                self._begin_again()
            yield

    def _begin_again(self) -> None:
        """A new journal, of what the old one came to; that is kept, the one before it is not.

        Who did what is kept for ever, see device_agents.leases.audit.
        """
        _archive(self.path)
        old, new = self.path.with_name("leases.old.jsonl"), self.path.with_name("leases.new.jsonl")
        old.unlink(missing_ok=True)
        os.link(self.path, old)
        new.unlink(missing_ok=True)
        facts: Facts = (Snapshot(self._state),)
        self._append(new, facts)
        new.replace(self.path)  # until now the old one counts
        self._offset, self._lines = self.path.stat().st_size, 1
        self._inode = self.path.stat().st_ino

    def _write(self, facts: Facts) -> None:
        if not facts:
            return
        self._offset += self._append(self.path, facts)
        self._lines += len(facts)

    def _append(self, path: Path, facts: Facts) -> int:
        """Bytes written, which are on the disk."""
        now, when = self._clock(), datetime.now(UTC).isoformat(timespec="milliseconds")
        lines = b"".join(json.dumps(encode(Entry(now, when, fact))).encode() + b"\n" for fact in facts)
        try:
            with path.open("ab") as file:
                self._inode = os.fstat(file.fileno()).st_ino
                file.write(lines)
                file.flush()
                # A heartbeat that is lost only ends a lease sooner.
                if not all(isinstance(fact, Beat) for fact in facts):
                    os.fsync(file.fileno())
        except OSError as error:  # what was written in part is cut off by whoever writes next
            raise InfrastructureError(
                f"{path} cannot be written: {error.strerror}; make room, or let KVFARM_LEASES name another"
            ) from error
        self._state = protocol.fold(self._state, now, facts, self.rules)
        return len(lines)


def _archive(journal: Path) -> None:
    """The journal's lines about people's doings, before they are folded away. Should we be killed before
    that, they come twice, and are told once."""
    kept = [
        line for line in journal.read_bytes().splitlines() if json.loads(line)["fact"]["kind"] in ARCHIVED
    ]
    with journal.with_name(ARCHIVE).open("ab") as file:
        # An archive that was cut short in the middle of a line goes on in the next one.
        file.write(b"\n" + b"".join(line + b"\n" for line in kept))
        file.flush()
        os.fsync(file.fileno())


def parse(line: bytes, where: str) -> Entry:
    """Raises LeaseError: no line of a journal."""
    try:
        return decode(Entry, json.loads(line))
    except (ValueError, DecodeError) as error:
        raise LeaseError(
            f"{where} is no fact about leases: {error}; when no run uses devices, move the file away"
        ) from error


def read(path: Path) -> list[Entry]:
    """All whole lines of a journal. Raises LeaseError."""
    text = path.read_bytes()
    whole = text[: text.rfind(b"\n") + 1].splitlines()
    return [parse(line, f"{path}, line {number}") for number, line in enumerate(whole, 1)]

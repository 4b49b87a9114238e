"""Measurements on their way: kept on the lab host's disk from when they are made until they are stored.

A measurement takes minutes and heats the device, so it is not made twice because an answer was lost: it is
written down before it is answered, under the key that its client gave it, and a call with the same key is
answered from the disk. See docs/results.md.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import logging
import os
import tempfile
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from device_agents.api import Vitals
from device_agents.recording.record import Record
from kvengine.codec import DecodeError, decode, encode
from kvengine.program import Measurement

LIMIT_BYTES = 64 << 20  # some thousand measurements
_SUFFIX = ".json"
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Key:
    """leg: which row of which run it is for; acknowledged whole. part: which of its processes, doing what."""

    leg: str
    part: str


@dataclass(frozen=True)
class Kept:
    """What one workload came to. record: of the device meanwhile. after: its state then, if it told.

    note: what the client wanted kept beside it. again: it was on the disk, and nothing was run for it now.
    """

    measurement: Measurement
    record: Record
    after: Vitals | None = None
    note: str = ""
    again: bool = False


@dataclass(frozen=True)
class _Entry:
    """A file. Keys are repeated inside, for the names are digests of them."""

    key: Key
    kept: Kept


class ResultJournal:
    """Thread-safe, and shared by the agents of a machine: each entry is a file that appears whole.

    limit_bytes: of all entries; the oldest go first, acknowledged or not.
    """

    def __init__(self, folder: Path, limit_bytes: int = LIMIT_BYTES) -> None:
        self._folder = folder
        self._limit_bytes = limit_bytes
        self._lock = threading.Lock()
        # For as long as somebody runs or waits for the key.
        self._running: weakref.WeakValueDictionary[Key, threading.Lock] = weakref.WeakValueDictionary()

    def get(self, key: Key) -> Kept | None:
        """What was kept under ``key``; a damaged entry is none, for to measure again is never wrong."""
        path = self._path(key)
        try:
            entry = decode(_Entry, json.loads(path.read_bytes()))
        except FileNotFoundError:
            return None
        except (OSError, ValueError, DecodeError, RecursionError) as error:
            _log.warning("%s is no kept result (%s); what it was of is measured again", path, error)
            return None
        return dataclasses.replace(entry.kept, again=True) if entry.key == key else None

    def once(self, key: Key | None, work: Callable[[], Kept]) -> Kept:
        """What is kept under ``key``, else ``work()``, which is on the disk before this returns.

        The same key at the same time: the second waits for the first. None: nothing is kept.
        """
        if key is None:
            return work()
        with self._alone(key):
            found = self.get(key)
            if found is None:
                found = work()
                self._put(key, found)
            return found

    def acknowledge(self, leg: str) -> None:
        """Its results are stored: forget them."""
        for path in self._folder.glob(f"{_digest(leg)}.*"):
            path.unlink(missing_ok=True)

    # -- inside ---------------------------------------------------------------------------

    @contextmanager
    def _alone(self, key: Key) -> Iterator[None]:
        with self._lock:
            turn = self._running.setdefault(key, threading.Lock())
        with turn:
            yield

    def _put(self, key: Key, kept: Kept) -> None:
        text = json.dumps(encode(_Entry(key, kept))).encode()
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            self._make_room(len(text))
            _write_durably(self._path(key), text)
        except OSError as error:
            # Better delivered and not safe from a crash of its client than thrown away.
            _log.warning("the result of %s cannot be kept in %s: %s", key.leg, self._folder, error)

    def _make_room(self, size: int) -> None:
        found = []
        for path in self._folder.iterdir():
            with contextlib.suppress(FileNotFoundError):  # acknowledged meanwhile
                state = path.stat()
                found.append((state.st_mtime_ns, state.st_size, path))
        total = size + sum(each for _, each, _ in found)
        for _, each, path in sorted(found):
            if total <= self._limit_bytes:
                return
            path.unlink(missing_ok=True)
            total -= each

    def _path(self, key: Key) -> Path:
        return self._folder / f"{_digest(key.leg)}.{_digest(key.part)}{_SUFFIX}"


def _write_durably(path: Path, text: bytes) -> None:
    """All of it or nothing, also when the machine stops now."""
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=path.name)
    try:
        with open(descriptor, "wb") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(name, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(name)
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:32]

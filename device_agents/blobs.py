"""Artifacts on a disk, content-addressed: each blob once, under its sha256.

    root/blobs/<sha256>          a whole, checked blob
    root/blobs/<sha256>.part     one that is still arriving; it goes on where it stopped
    root/artifacts/<id>/         hard links to blobs, and artifact.json, written last

A blob appears by rename, after its sha256 was checked; a folder without artifact.json is not
an artifact yet. So an interrupted deploy leaves nothing that looks whole and is not.
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import threading
import time
from collections import defaultdict
from collections.abc import Collection, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

from device_agents.deadline import Deadline
from device_agents.errors import BlobsMissing, DeployFailed
from kvengine.artifact import MANIFEST, Blob, Manifest, sha256_of
from kvengine.codec import decode

_PIECE = 1 << 22
_SHA256 = re.compile(r"[0-9a-f]{64}")
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*")  # one plain file name: no folder, no "..", not hidden
# Left free on a disk, for a device without any space left misbehaves in other ways than refusing us.
FREE_RESERVE_BYTES = 64 << 20
# File times move in steps (4 ms and more, 2 s on some file systems). Two writes within one
# step look like one, so the time of a fresh write proves nothing yet.
_CLOCK_TICK_NS = 2_000_000_000

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class MissingBlob:
    """What to send: bytes [present, size) of the blob."""

    name: str
    sha256: str
    size: int
    present: int


@lru_cache(maxsize=32)  # the same few come again with every session that is opened
def parse_manifest(text: str) -> Manifest:
    """A manifest from an untrusted client.

    Raises:
        DeployFailed: not a manifest, or one whose blobs would leave their folder.
    """
    try:
        manifest = decode(Manifest, json.loads(text))
    except (ValueError, TypeError, RecursionError, OverflowError) as error:
        raise DeployFailed(f"this is no manifest: {error}") from error
    names = [blob.name for blob in manifest.blobs]
    for blob in manifest.blobs:
        _check_sha256(blob.sha256)
        if not _NAME.fullmatch(blob.name) or blob.name == MANIFEST or blob.size < 0:
            raise DeployFailed(f"sought a plain file name, found {blob.name!r} of {blob.size} bytes")
    if len(set(names)) != len(names):
        raise DeployFailed(f"the manifest names a blob twice: {sorted(names)}")
    return manifest


class _Stamp(NamedTuple):
    """Changes whenever somebody writes to the file. Not ctime: every hard link changes that."""

    inode: int
    size: int
    mtime_ns: int


class BlobStore:
    """One folder of blobs and artifacts; safe to use from several threads of one process."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._blobs = root / "blobs"
        self._artifacts = root / "artifacts"
        self._blobs.mkdir(parents=True, exist_ok=True)
        self._artifacts.mkdir(parents=True, exist_ok=True)
        self._locks: defaultdict[str, threading.Lock] = defaultdict(threading.Lock)
        self._layout = threading.Lock()  # of artifact folders, and of eviction
        self._verified: dict[str, _Stamp] = {}  # sha256 to the file's stat when it was hashed

    def path(self, sha256: str) -> Path:
        return self._blobs / _check_sha256(sha256)

    def has(self, blob: Blob) -> bool:
        """Whether the blob is here, whole and unaltered; one that is not is removed.

        It is hashed (about 1 s per GB) unless this very file was before and nothing touched it since.
        """
        path = self.path(blob.sha256)
        with self._locks[blob.sha256]:
            try:
                stamp = _stamp(path)
            except FileNotFoundError:
                return False
            if self._verified.get(blob.sha256) == stamp:
                return True
            if path.stat().st_size == blob.size and sha256_of(path) == blob.sha256:
                if time.time_ns() - stamp.mtime_ns > _CLOCK_TICK_NS:
                    self._verified[blob.sha256] = stamp
                return True
            _log.warning("blob %s was truncated or altered; it is fetched again", path)
            path.unlink()
            return False

    def missing(self, manifest: Manifest) -> tuple[MissingBlob, ...]:
        """What has to be sent before ``manifest`` can be linked, each sha256 once."""
        wanted = {blob.sha256: blob for blob in manifest.blobs}
        return tuple(
            MissingBlob(blob.name, blob.sha256, blob.size, min(self.partial_size(blob.sha256), blob.size))
            for blob in wanted.values()
            if not self.has(blob)
        )

    def partial_size(self, sha256: str) -> int:
        """Bytes that have arrived so far."""
        try:
            return self._part(sha256).stat().st_size
        except FileNotFoundError:
            return 0

    def write(self, sha256: str, offset: int, data: bytes) -> int:
        """Append ``data`` at ``offset`` of the arriving blob; offset 0 starts it anew. Returns the new size.

        Raises:
            DeployFailed: a hole before ``offset``, a full disk.
        """
        part = self._part(sha256)
        with self._locks[sha256]:
            present = self.partial_size(sha256)
            if not 0 <= offset <= present:
                raise DeployFailed(
                    f"blob {sha256[:16]}…: a chunk at {offset:,}, but {present:,} bytes are here"
                )
            self.check_space(len(data))
            try:
                with part.open("r+b" if part.exists() else "wb") as file:
                    file.truncate(offset)
                    file.seek(offset)
                    file.write(data)
            except OSError as error:
                raise DeployFailed(f"writing blob {sha256[:16]}…: {error}") from error
        return offset + len(data)

    def commit(self, sha256: str) -> Path:
        """Check the arrived blob and give it its name. Committing one that is here already does nothing.

        Raises:
            DeployFailed: what arrived has another sha256; it is thrown away.
        """
        part, path = self._part(sha256), self.path(sha256)
        with self._locks[sha256]:
            if not part.exists():
                if path.exists():
                    return path
                raise DeployFailed(f"blob {sha256[:16]}… cannot be committed: nothing of it has arrived")
            # Backdated, so that any later write gives it another time, see _CLOCK_TICK_NS.
            os.utime(part, ns=(before := time.time_ns() - 10 * _CLOCK_TICK_NS, before))
            found = sha256_of(part)
            if found != sha256:
                size = part.stat().st_size
                part.unlink()
                raise DeployFailed(
                    f"sought sha256 {sha256[:16]}…, found {size:,} bytes of {found[:16]}…; send it again"
                )
            with part.open("rb") as file:
                os.fsync(file.fileno())
            self._verified[sha256] = _stamp(part)
            part.replace(path)
        return path

    def add_file(self, blob: Blob, source: Path, deadline: Deadline) -> int:
        """Copy ``source`` in as ``blob``, going on where an interrupted copy stopped. Returns bytes moved.

        Raises:
            DeployFailed: the source is not what the blob says. DeadlineExceeded: late.
        """
        start = self.partial_size(blob.sha256)
        if start > blob.size:
            start = 0
        moved = 0
        try:
            with source.open("rb") as file:
                file.seek(start)
                while piece := file.read(_PIECE):
                    deadline.check(f"copying blob {blob.name}")
                    self.write(blob.sha256, start + moved, piece)
                    moved += len(piece)
        except OSError as error:
            raise DeployFailed(f"blob {blob.name}: cannot read {source}: {error}") from error
        if start + moved == 0:
            self.write(blob.sha256, 0, b"")
        try:
            self.commit(blob.sha256)
        except DeployFailed:
            if start == 0:
                raise
            return moved + self.add_file(blob, source, deadline)  # the old beginning was wrong: all anew
        return moved

    def link(self, manifest: Manifest) -> Path:
        """The artifact's folder, made or repaired from blobs that are all here.

        Raises:
            BlobsMissing: not all are here. DeployFailed: this disk knows no hard links.
        """
        lacking = self.missing(manifest)
        if lacking:
            raise BlobsMissing(f"cannot lay out artifact {manifest.id[:16]}…: no blob {lacking[0].name} here")
        folder = self._artifacts / manifest.id
        with self._layout:
            try:
                folder.mkdir(exist_ok=True)
                for blob in manifest.blobs:
                    _link(self.path(blob.sha256), folder / blob.name)
                _keep_text(folder / MANIFEST, manifest.to_json())
                os.utime(folder)  # used now, for gc
            except OSError as error:
                raise DeployFailed(f"cannot lay out artifact {manifest.id[:16]}…: {error}") from error
        return folder

    def check_space(self, needed: int) -> None:
        """Raises DeployFailed unless ``needed`` bytes fit and FREE_RESERVE_BYTES stay free."""
        free = shutil.disk_usage(self.root).free
        if free < needed + FREE_RESERVE_BYTES:
            raise DeployFailed(
                f"sought {needed:,} bytes plus {FREE_RESERVE_BYTES:,} in reserve on the disk of {self.root}, "
                f"found {free:,} free; delete something there"
            )

    def gc(self, limit_bytes: int, keep: Collection[str] = ()) -> int:
        """Evict artifacts, longest unused first, until all blobs together weigh at most ``limit_bytes``.

        keep: ids of artifacts and sha256 of blobs that stay whatever they weigh. A blob of no
        artifact (also a half-arrived one) counts as an artifact of its own. Returns the bytes freed.
        """
        with self._layout:
            stats = dict(_stats(self._blobs))
            sizes = {path: stat.st_size for path, stat in stats.items()}
            age = {_sha256_of_name(path): stat.st_mtime for path, stat in stats.items()}
            users: dict[Path, set[str]] = {path: {_sha256_of_name(path)} & set(keep) for path in sizes}
            for folder, stat in _stats(self._artifacts):
                age[folder.name] = stat.st_mtime
                for sha256 in _blobs_of(folder):
                    users.setdefault(self._blobs / sha256, set()).add(folder.name)
            for path in sizes:
                users[path] = users[path] or {_sha256_of_name(path)}
            excess, freed = sum(sizes.values()) - limit_bytes, 0
            for name in sorted(age.keys() - set(keep), key=lambda n: age[n]):
                if freed >= excess:
                    break
                freed += self._evict(name, users, sizes)
        return freed

    def _evict(self, name: str, users: dict[Path, set[str]], sizes: dict[Path, int]) -> int:
        shutil.rmtree(self._artifacts / name, ignore_errors=True)
        freed = 0
        for path, names in users.items():
            if name in names:
                names.discard(name)
                if not names and path in sizes:
                    path.unlink(missing_ok=True)
                    freed += sizes[path]
        return freed

    def _part(self, sha256: str) -> Path:
        return self._blobs / f"{_check_sha256(sha256)}.part"


def _check_sha256(sha256: str) -> str:
    if not _SHA256.fullmatch(sha256):
        raise DeployFailed(f"sought 64 hexadecimal digits of a sha256, found {sha256[:80]!r}")
    return sha256


def _sha256_of_name(path: Path) -> str:
    return path.name.removesuffix(".part")


def _stats(folder: Path) -> Iterator[tuple[Path, os.stat_result]]:
    """What lies in ``folder``. Others write there: a part may get its name while we look."""
    for path in folder.iterdir():
        with suppress(FileNotFoundError):
            yield path, path.stat()


def _stamp(path: Path) -> _Stamp:
    stat = path.stat()
    return _Stamp(stat.st_ino, stat.st_size, stat.st_mtime_ns)


def _link(blob: Path, target: Path) -> None:
    """``target`` becomes a hard link to ``blob``, whatever it was before."""
    if target.exists() and target.samefile(blob):
        return
    part = target.with_name(f".{target.name}.part")
    part.unlink(missing_ok=True)
    os.link(blob, part)
    part.replace(target)


def _keep_text(path: Path, text: str) -> None:
    with suppress(OSError, ValueError):
        if path.read_text() == text:
            return
    part = path.with_name(f".{path.name}.part")
    part.write_text(text)
    part.replace(path)


def _blobs_of(folder: Path) -> set[str]:
    try:
        return {blob.sha256 for blob in parse_manifest((folder / MANIFEST).read_text()).blobs}
    except (OSError, DeployFailed):
        return set()

"""A reference that computes nothing twice."""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections import OrderedDict
from contextlib import suppress
from pathlib import Path

import numpy as np

from harness.reference.protocol import Float32Array, Hidden, KeysAndValues, Reference

_MIB = 1 << 20
_CACHES = 256  # sequences whose K and V are kept
_Key = tuple[tuple[int, ...], tuple[Hidden, ...]]


class CachedReference:
    """Keeps the logits of ``inner`` by token sequence, and answers a sequence's prefixes from it too.

    Attention is causal, so the rows of a prefix are the first rows of the longer sequence. (Not
    to the last bit: matrix products of another height may sum in another order.)

    In memory the least recently used sequences go first. With ``folder`` the logits also
    outlive the process, one .npy file a sequence named by sha256(identity, tokens); the
    oldest files go first. Not safe for threads; safe for several processes on one folder.
    """

    def __init__(
        self,
        inner: Reference,
        *,
        memory_bytes: int = 256 * _MIB,
        folder: Path | None = None,
        folder_bytes: int = 1024 * _MIB,
    ) -> None:
        self._inner = inner
        self._memory_bytes = memory_bytes
        self._folder = folder
        self._folder_bytes = folder_bytes
        self._kept: OrderedDict[_Key, Float32Array] = OrderedDict()
        self._used_bytes = 0
        self._caches: OrderedDict[tuple[int, ...], tuple[KeysAndValues, ...]] = OrderedDict()

    @property
    def identity(self) -> str:
        return self._inner.identity

    @property
    def used_bytes(self) -> int:
        """Memory that the kept logits take."""
        return self._used_bytes

    def logits(self, tokens: tuple[int, ...], hidden: tuple[Hidden, ...] = ()) -> Float32Array:
        if (tokens, hidden) in self._kept:  # the most frequent case, and the scan below takes its time
            self._kept.move_to_end((tokens, hidden))
            return self._kept[tokens, hidden]
        for known, rows in self._kept.items():
            if known[1] == hidden and known[0][: len(tokens)] == tokens and tokens:
                self._kept.move_to_end(known)
                return rows[: len(tokens)]
        found = self._load(tokens) if not hidden else None
        if found is None:
            found = self._inner.logits(tokens, hidden)
            if not hidden:  # few sequences have any, and seldom the same
                self._store(tokens, found)
        found.setflags(write=False)
        self._keep((tokens, hidden), found)
        return found

    def cache(self, tokens: tuple[int, ...]) -> tuple[KeysAndValues, ...]:
        """In memory only, the newest few sequences."""
        if tokens not in self._caches:
            self._caches[tokens] = self._inner.cache(tokens)
            if len(self._caches) > _CACHES:
                self._caches.popitem(last=False)
        self._caches.move_to_end(tokens)
        return self._caches[tokens]

    def _keep(self, key: _Key, rows: Float32Array) -> None:
        if rows.nbytes > self._memory_bytes:
            return
        tokens, hidden = key
        for known in [k for k in self._kept if k[1] == hidden and tokens[: len(k[0])] == k[0]]:
            self._drop(known)  # the new, longer one answers for it
        self._kept[key] = rows
        self._used_bytes += rows.nbytes
        while self._used_bytes > self._memory_bytes:
            self._drop(next(iter(self._kept)))

    def _drop(self, key: _Key) -> None:
        self._used_bytes -= self._kept.pop(key).nbytes

    def _path(self, folder: Path, tokens: tuple[int, ...]) -> Path:
        digest = hashlib.sha256(self.identity.encode() + b"\n")
        digest.update(np.asarray(tokens, "<i8").tobytes())
        return folder / f"{digest.hexdigest()}.npy"

    def _load(self, tokens: tuple[int, ...]) -> Float32Array | None:
        """None also for a file that is not whole: it is computed and written again."""
        if self._folder is None:
            return None
        try:
            rows = np.load(self._path(self._folder, tokens), allow_pickle=False)
        except (OSError, ValueError, EOFError):
            return None
        right = isinstance(rows, np.ndarray) and rows.dtype == np.float32 and rows.ndim == 2
        return rows if right and len(rows) == len(tokens) else None

    def _store(self, tokens: tuple[int, ...], rows: Float32Array) -> None:
        if self._folder is None or rows.nbytes > self._folder_bytes:
            return
        self._folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=self._folder, suffix=".partial", delete=False) as file:
            try:
                np.save(file, rows, allow_pickle=False)
                file.close()
                os.replace(file.name, self._path(self._folder, tokens))
            except BaseException:
                Path(file.name).unlink(missing_ok=True)
                raise
        self._prune(self._folder)

    def _prune(self, folder: Path) -> None:
        """Delete the oldest files until the folder is within its limit."""
        ages = []
        for path in folder.glob("*.npy"):
            with suppress(FileNotFoundError):  # another process prunes too
                status = path.stat()
                ages.append((status.st_mtime_ns, status.st_size, path))
        excess = sum(size for _, size, _ in ages) - self._folder_bytes
        for _, size, path in sorted(ages):
            if excess <= 0:
                return
            path.unlink(missing_ok=True)
            excess -= size

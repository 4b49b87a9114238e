"""Artifacts that come to a lab host: room is made for them, and not at the cost of what is in use."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from device_agents.blobs import BlobStore, MissingBlob
from kvengine.artifact import Manifest


class Arrivals:
    """Thread-safe. in_use: ids of the artifacts that a lease has deployed now.

    limit_bytes: artifacts beyond it are evicted, longest unused first. clock: monotonic seconds.
    forgotten_s: what was announced so long ago and never came has lost its client.
    """

    def __init__(
        self,
        store: BlobStore,
        limit_bytes: int,
        in_use: Callable[[], set[str]],
        clock: Callable[[], float],
        forgotten_s: float,
    ) -> None:
        self._store = store
        self._limit = limit_bytes
        self._in_use = in_use
        self._clock = clock
        self._forgotten_s = forgotten_s
        self._making_room = threading.Lock()  # held while artifacts are evicted
        self._announcing = threading.Lock()  # guards what follows
        self._announced: dict[str, tuple[float, frozenset[str]]] = {}  # by artifact: when, what it is made of
        self._under_way: Counter[str] = Counter()  # deploys of an artifact

    def missing(self, manifest: Manifest) -> tuple[MissingBlob, ...]:
        """What is to be sent of it; makes room for that first."""
        # One at a time: what is announced between our look and our eviction would be evicted.
        with self._making_room:
            keep = self._announce(manifest)
            missing = self._store.missing(manifest)
            needed = sum(blob.size - blob.present for blob in missing)
            self._store.gc(max(0, self._limit - needed), keep | self._in_use())
        self._store.check_space(needed)
        return missing

    @contextmanager
    def deploying(self, manifest: Manifest) -> Iterator[Path]:
        """The artifact's folder, complete, which stays while the body runs; afterwards the lease keeps it.

        Another device may need room in the store meanwhile. Raises DeployFailed: a blob is missing.
        """
        self._announce(manifest)
        with self._announcing:
            self._under_way[manifest.id] += 1
        try:
            yield self._store.link(manifest)
        finally:
            with self._announcing:
                self._under_way[manifest.id] -= 1
                if not self._under_way[manifest.id]:
                    del self._under_way[manifest.id]
                    self._announced.pop(manifest.id, None)

    def _announce(self, manifest: Manifest) -> set[str]:
        """What may not be evicted: this artifact, and all others that are on their way to a device."""
        parts = frozenset({manifest.id, *(blob.sha256 for blob in manifest.blobs)})
        with self._announcing:
            self._announced[manifest.id] = (self._clock(), parts)
            oldest = self._clock() - self._forgotten_s
            self._announced = {id_: entry for id_, entry in self._announced.items() if entry[0] >= oldest}
            return {part for _, parts in self._announced.values() for part in parts}

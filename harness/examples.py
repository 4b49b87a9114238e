"""Failing examples that stay: Hypothesis' own database, read as it was at one moment."""

from __future__ import annotations

import os
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from hypothesis.database import DirectoryBasedExampleDatabase

MOST_REPLAYED = 20  # of one property


class AsItWas(DirectoryBasedExampleDatabase):
    """The smallest example of each failure in ``folder`` that was there at ``moment``, seconds since 1970.

    Nothing is written, and nothing deleted: what passes on one device may still fail on another.
    """

    def __init__(self, folder: Path, moment: float) -> None:
        super().__init__(folder)
        self._moment = moment

    def fetch(self, key: bytes) -> Iterable[bytes]:
        # Hypothesis keeps longer forms of the same failures under keys of their own.
        if key.endswith((b".secondary", b".pareto")):
            return
        folder = self._key_path(key)
        for name in sorted(os.listdir(folder)) if folder.is_dir() else ():
            with suppress(OSError):
                if (folder / name).stat().st_mtime <= self._moment:
                    yield (folder / name).read_bytes()

    def save(self, key: bytes, value: bytes) -> None:
        """Not here: new failures are kept by the draws of the seed, or were kept before."""

    def move(self, src: bytes, dest: bytes, value: bytes) -> None:
        """As ``save``."""

    def delete(self, key: bytes, value: bytes) -> None:
        """As ``save``."""

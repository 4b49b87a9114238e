"""Temporary folders named after their process: what killed processes leave can be told and removed.

A name is one of PREFIXES, the PID of its owner, "-" and something random.
"""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

PREFIXES = RAY, ADB, RUN, APT, MAKING = "kvfarm-ray-", "kvfarm-adb-", "kvfarm-run-", "kvfarm-apt-", ".making-"
_OWNED = re.compile(rf"({'|'.join(map(re.escape, PREFIXES))})(\d+)-")


def named(prefix: str) -> str:
    """The prefix of a folder of this process."""
    return f"{prefix}{os.getpid()}-"


def owned_folder(prefix: str, base: Path | None = None) -> tempfile.TemporaryDirectory[str]:
    """A new one in ``base``, by default where temporary files are; those of the dead there are removed."""
    base = base or Path(tempfile.gettempdir())
    remove_abandoned(base)
    return tempfile.TemporaryDirectory(prefix=named(prefix), dir=base, ignore_cleanup_errors=True)


def remove_abandoned(base: Path) -> None:
    for folder in abandoned(base):
        shutil.rmtree(folder, ignore_errors=True)


def abandoned(base: Path, proc: Path = Path("/proc")) -> Iterator[Path]:
    """Those in ``base`` whose process is gone."""
    for prefix in PREFIXES:
        for folder in base.glob(f"{prefix}*"):
            if is_of_the_dead(folder.name, proc):
                yield folder


def is_of_the_dead(text: str, proc: Path = Path("/proc")) -> bool:
    """Whether ``text``, a path or a command line, names a folder of a process that is gone."""
    found = _OWNED.search(text)
    return found is not None and not (proc / found[2]).exists()

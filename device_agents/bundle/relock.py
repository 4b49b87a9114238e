"""``kvfarm bundle --relock``: pin what the mirrors have now."""

from __future__ import annotations

import tempfile
from pathlib import Path

from device_agents.bundle import debian, wheels
from device_agents.bundle.contents import DEBS, WHEELS
from device_agents.bundle.lock import ABIS, LOCK_PATH, PLATFORMS, Lock, Packages
from device_agents.errors import BundleError


def relock(path: Path = LOCK_PATH) -> Lock:
    """Write ``path`` anew: Debian's newest, and the numpy and onnxruntime that this host runs.

    Raises:
        BundleError: see debian.newest and wheels.same_as_here; a file that cannot be written.
    """
    abis: dict[str, Packages] = {}
    with tempfile.TemporaryDirectory() as name:
        for abi in ABIS:
            known, folder = PLATFORMS[abi], Path(name, abi)
            folder.mkdir()
            debs = debian.newest(known.debian, DEBS, Path(name))
            abis[abi] = Packages(debs, wheels.same_as_here(known.machine, WHEELS, folder))
    lock = Lock(abis)
    try:
        path.write_text(lock.to_json())
    except OSError as error:
        raise BundleError(f"cannot write the lock file {path}: {error}") from error
    return lock

"""lock.json: the exact packages that a bundle is made of, each with its sha256.

Debian removes a version from its mirrors when the next point release comes, and the build
then stops with a BundleError. It does not take the newer version by itself: a phone must not
change what it runs, nor a regression appear, because a mirror moved. ``kvfarm bundle
--relock`` takes it, as a change to a file in the repository that a review sees.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from device_agents.errors import BundleError
from kvengine.codec import DecodeError, decode, encode

Abi = Literal["arm64-v8a", "x86_64"]  # Android's names
ABIS: tuple[Abi, ...] = get_args(Abi)
LOCK_PATH = Path(__file__).with_name("lock.json")
SUITE = "bookworm"
PYTHON = "3.11"
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class Platform:
    """What the rest of the world calls an ABI."""

    debian: str  # architecture
    triplet: str  # Debian's folder of libraries
    loader: str  # file name of the dynamic loader
    machine: str  # as uname -m says, and as in wheels' names


PLATFORMS: dict[Abi, Platform] = {
    "arm64-v8a": Platform("arm64", "aarch64-linux-gnu", "ld-linux-aarch64.so.1", "aarch64"),
    "x86_64": Platform("amd64", "x86_64-linux-gnu", "ld-linux-x86-64.so.2", "x86_64"),
}


@dataclass(frozen=True)
class Package:
    """A .deb or a wheel."""

    name: str
    version: str
    sha256: str
    size: int  # bytes


@dataclass(frozen=True)
class Packages:
    """All that one ABI's bundle is made of."""

    debs: tuple[Package, ...]
    wheels: tuple[Package, ...]

    @property
    def versions(self) -> dict[str, str]:
        return {package.name: package.version for package in (*self.debs, *self.wheels)}


@dataclass(frozen=True)
class Lock:
    """lock.json."""

    abis: dict[str, Packages]
    suite: str = SUITE
    python: str = PYTHON
    format: Literal["kvfarm-bundle-lock/1"] = "kvfarm-bundle-lock/1"

    def packages(self, abi: Abi) -> Packages:
        """Raises BundleError if this ABI is not locked."""
        try:
            return self.abis[abi]
        except KeyError:
            raise BundleError(
                f"sought packages for {abi} in the lock, found {sorted(self.abis)}; "
                "run: kvfarm bundle --relock"
            ) from None

    def to_json(self) -> str:
        return json.dumps(encode(self), indent=1, sort_keys=True) + "\n"


def parse_abi(text: str) -> Abi:
    """Raises BundleError for what is no ABI we know."""
    for abi in ABIS:
        if text == abi:
            return abi
    raise BundleError(f"sought one of {', '.join(ABIS)}, found ABI {text!r}")


def load_lock(path: Path = LOCK_PATH) -> Lock:
    """Raises BundleError: no lock, one of another format, a sha256 that is none."""
    try:
        lock = decode(Lock, json.loads(path.read_text()))
    except FileNotFoundError:
        raise BundleError(f"sought the lock file {path}, found none; run: kvfarm bundle --relock") from None
    except (DecodeError, ValueError, OSError) as error:
        raise BundleError(f"{path} is no lock of format kvfarm-bundle-lock/1: {error}") from error
    if lock.suite != SUITE or lock.python != PYTHON:
        raise BundleError(
            f"{path} is for Debian {lock.suite} and Python {lock.python}, this kvfarm "
            f"for {SUITE} and {PYTHON}; run: kvfarm bundle --relock"
        )
    for packages in lock.abis.values():
        for package in (*packages.debs, *packages.wheels):
            if not _SHA256.fullmatch(package.sha256):
                raise BundleError(f"{path}: {package.name}: {package.sha256!r} is no sha256")
    return lock

"""A bundle on this disk: a folder of files, each known by sha256, and bundle.json, written last."""

from __future__ import annotations

import hashlib
import json
import os
import stat
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from device_agents.bundle.lock import Abi
from device_agents.errors import BundleError
from kvengine.artifact import sha256_of
from kvengine.codec import DecodeError, decode, encode

MANIFEST = "bundle.json"
ENTRY = "run.sh"
RUNNER = ("-m", "device_agents.runner")
_EXECUTABLE, _PLAIN = 0o755, 0o644
MTIME = 315_532_800  # 1980-01-01 UTC, of every file: the oldest time that a zip file can say


@dataclass(frozen=True)
class BundleBlob:
    """One file. ``name`` is its path in the bundle, with "/", also below folders."""

    name: str
    sha256: str
    size: int  # bytes
    mode: int  # 0o755 or 0o644


@dataclass(frozen=True)
class BundleManifest:
    """bundle.json. runtime: "kvfarm", or "user" for a folder given by --runtime.

    versions: what is inside, by package; empty for a user's runtime, which is probed on the device.
    """

    abi: Abi
    runtime: Literal["kvfarm", "user"]
    versions: dict[str, str]
    blobs: tuple[BundleBlob, ...]  # sorted by name
    format: Literal["kvfarm-bundle/1"] = "kvfarm-bundle/1"

    @property
    def id(self) -> str:
        """sha256 over name, mode and sha256 of every file: the same files are the same bundle."""
        lines = (f"{blob.mode:o} {blob.sha256} {blob.name}\n" for blob in self.blobs)
        return hashlib.sha256("".join(sorted(lines)).encode()).hexdigest()

    @property
    def size(self) -> int:
        """Bytes of all files, each counted as often as it is named."""
        return sum(blob.size for blob in self.blobs)

    def to_json(self) -> str:
        return json.dumps(encode(self), indent=1, sort_keys=True) + "\n"


@dataclass(frozen=True)
class Bundle:
    """A whole bundle in ``folder``. On a device the same files lie in a folder of their own."""

    folder: Path
    manifest: BundleManifest

    @property
    def id(self) -> str:
        return self.manifest.id

    @property
    def abi(self) -> Abi:
        return self.manifest.abi

    @property
    def files(self) -> tuple[BundleBlob, ...]:
        return self.manifest.blobs

    def path(self, blob: BundleBlob) -> Path:
        """Where the blob lies on this disk."""
        return self.folder / blob.name

    @staticmethod
    def python_argv(remote_folder: str, *arguments: str) -> tuple[str, ...]:
        """What starts the bundle's Python from ``remote_folder`` on the device."""
        return ("sh", f"{remote_folder}/{ENTRY}", *arguments)

    @classmethod
    def runner_argv(cls, remote_folder: str) -> tuple[str, ...]:
        """What starts the runner from ``remote_folder`` on the device."""
        return cls.python_argv(remote_folder, *RUNNER)

    @classmethod
    def from_runtime(cls, runtime: Path, cache: Path, abi: Abi | None = None) -> Bundle:
        """A user's own Python and onnxruntime in place of ours; see device_agents.bundle.runtime."""
        from device_agents.bundle.runtime import bundle_of

        return bundle_of(runtime, cache, abi)

    @classmethod
    def open(cls, folder: Path, verify: bool = True) -> Bundle:
        """Read ``folder``/bundle.json and check every file.

        verify: compare sha256 (about 0.1 s for ours) and not just presence and size.

        Raises:
            BundleError: no or unreadable manifest; a missing, truncated or altered file.
        """
        try:
            manifest = decode(BundleManifest, json.loads((folder / MANIFEST).read_text()))
        except FileNotFoundError:
            raise BundleError(f"sought {MANIFEST} in {folder}, found none; make one: kvfarm bundle") from None
        except (DecodeError, ValueError, OSError) as error:
            raise BundleError(
                f"{folder / MANIFEST} is no manifest of format kvfarm-bundle/1: {error}"
            ) from error
        for blob in manifest.blobs:
            _check(folder / blob.name, blob, verify)
        return cls(folder, manifest)


def seal(
    folder: Path,
    abi: Abi,
    runtime: Literal["kvfarm", "user"],
    versions: dict[str, str],
    executable: Sequence[str],
) -> Bundle:
    """Give every file below ``folder`` its mode and time, and write bundle.json.

    executable: names of files that are started, besides those that are executable already
    in a user's runtime.

    Raises:
        BundleError: something that is no plain file.
    """
    blobs = []
    for path in files_below(folder):
        name = path.relative_to(folder).as_posix()
        if name == MANIFEST:
            continue
        started = name in executable or (runtime == "user" and os.access(path, os.X_OK))
        mode = _EXECUTABLE if started else _PLAIN
        path.chmod(mode)
        os.utime(path, (MTIME, MTIME))
        blobs.append(BundleBlob(name, sha256_of(path), path.stat().st_size, mode))
    manifest = BundleManifest(abi, runtime, versions, tuple(sorted(blobs, key=lambda b: b.name)))
    (folder / MANIFEST).write_text(manifest.to_json())
    return Bundle(folder, manifest)


def files_below(folder: Path) -> list[Path]:
    """Every plain file, sorted by path. Raises BundleError for a link, pipe, socket or odd name."""
    found = []
    for parent, folders, names in os.walk(folder):
        for name in [*folders, *names]:
            path = Path(parent, name)
            kind = path.lstat().st_mode
            if not (stat.S_ISREG(kind) or stat.S_ISDIR(kind)) or not name.isprintable():
                raise BundleError(f"sought plain files and folders only, found {str(path)!r}")
            if stat.S_ISREG(kind):
                found.append(path)
    return sorted(found)


def _check(path: Path, blob: BundleBlob, verify: bool) -> None:
    try:
        size = path.stat().st_size
        found = sha256_of(path) if verify and size == blob.size else blob.sha256
    except OSError as error:
        raise BundleError(f"the bundle lacks {blob.name}: {error}; make it again: kvfarm bundle") from error
    if size != blob.size or found != blob.sha256:
        raise BundleError(
            f"{path}: sought {blob.size:,} bytes of sha256 {blob.sha256[:16]}…, found {size:,} bytes"
            + (f" of {found[:16]}…" if size == blob.size else "")
            + "; make it again: kvfarm bundle"
        )

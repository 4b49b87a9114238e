"""Wheels for another machine, by this Python's own pip and its configured indexes."""

from __future__ import annotations

import importlib.metadata
import re
import sys
from pathlib import Path

from device_agents.apt import cause
from device_agents.bundle.commands import run, said
from device_agents.bundle.lock import PYTHON, Package
from device_agents.errors import BundleError
from kvengine.artifact import sha256_of

_DOWNLOAD_S = 900.0
# numpy's wheels carry the tags of 2_27 and 2_28, onnxruntime's of 2_28 alone; glibc here is 2.36.
_TAGS = ("manylinux_2_28", "manylinux_2_27", "manylinux_2_17")


def download(machine: str, packages: tuple[Package, ...], folder: Path) -> None:
    """Fetch exactly these wheels into ``folder``; pip already refuses another sha256.

    Raises:
        BundleError: no pip, no index that answers, no such wheel.
    """
    requirements = folder / "requirements.txt"
    requirements.write_text("".join(f"{p.name}=={p.version} --hash=sha256:{p.sha256}\n" for p in packages))
    _pip(machine, folder, "--require-hashes", "-r", str(requirements))
    requirements.unlink()


def same_as_here(machine: str, names: tuple[str, ...], folder: Path) -> tuple[Package, ...]:
    """The wheels of the versions that this host itself runs, so that phone and host agree.

    Raises:
        BundleError: as ``download``; or a package that is not installed here.
    """
    try:
        versions = {name: importlib.metadata.version(name) for name in names}
    except importlib.metadata.PackageNotFoundError as error:
        raise BundleError(f"sought an installed {error.name} whose version to lock, found none") from error
    _pip(machine, folder, *(f"{name}=={version}" for name, version in versions.items()))
    found = []
    for name, version in sorted(versions.items()):
        (wheel,) = folder.glob(f"{name}-{version}-*.whl")
        found.append(Package(name, version, sha256_of(wheel), wheel.stat().st_size))
    return tuple(found)


def _pip(machine: str, folder: Path, *arguments: str) -> None:
    platforms = [word for tag in _TAGS for word in ("--platform", f"{tag}_{machine}")]
    fixed = ("--no-deps", "--only-binary=:all:", "--implementation", "cp", "--python-version", PYTHON)
    quiet = ("--disable-pip-version-check", "--no-input", "--progress-bar", "off")
    argv = (sys.executable, "-m", "pip", "download", *fixed, *quiet, *platforms, "--dest", str(folder))
    done = run((*argv, *arguments), within_s=_DOWNLOAD_S)
    if done.returncode == 0:
        return
    words = said(done)
    if re.search(r"No module named pip", words):
        raise BundleError(f"{sys.executable} has no pip; run: {sys.executable} -m ensurepip")
    if why := cause(words):
        raise BundleError(f"pip could not fetch wheels for {machine}: {why}. pip said: {words}")
    raise BundleError(
        f"pip could not fetch wheels for {machine}: {words}\nCheck the network and pip's configuration; if a "
        "pinned wheel has been withdrawn: kvfarm bundle --relock"
    )

"""Debian packages of any architecture, of the release that bundles are made of, whatever this machine is.

A machine that has no Debian mirror among its sources (Ubuntu, say) is told one by KVFARM_DEBIAN_MIRROR.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from device_agents.apt import PrivateApt, Source, cause, machine_sources, missing_tools
from device_agents.bundle.commands import run, said
from device_agents.bundle.lock import SUITE, Package
from device_agents.deadline import Deadline
from device_agents.errors import BundleError, InfrastructureError

MIRROR_VARIABLE = "KVFARM_DEBIAN_MIRROR"
_KEYRING = Path("/usr/share/keyrings/debian-archive-keyring.gpg")
_UPDATE_S, _DOWNLOAD_S, _UNPACK_S = 300.0, 900.0, 120.0

# Names under which a Debian archive's sources are known; the archive has all of them.
_RELEASES = ("stable", "oldstable", "testing", "unstable", "sid", "bullseye", "bookworm", "trixie", "forky")
_SUFFIXES = ("", "-updates", "-security")


@dataclass(frozen=True)
class _Apt:
    """apt on SUITE. update_said: what it had to say while updating."""

    private: PrivateApt
    update_said: str

    def run(self, *arguments: str, folder: Path) -> tuple[int, str, str]:
        """Exit code, stdout, and what it complained about."""
        try:
            done = self.private.run(["apt-get", *arguments], Deadline(_DOWNLOAD_S), folder)
        except InfrastructureError as error:
            raise BundleError(f"apt-get for a bundle: {error}; is the network slow? try again") from error
        return done.returncode, done.stdout.decode(errors="replace"), said(done)


def download(architecture: str, packages: tuple[Package, ...], folder: Path, scratch: Path) -> None:
    """Fetch exactly these versions of ``packages`` into ``folder``; the caller checks their sha256.

    Raises:
        BundleError: no Debian mirror, none that answers, or a version that is no longer there.
    """
    apt = _apt(architecture, scratch)
    wanted = [f"{package.name}={package.version}" for package in packages]
    code, _, complaints = apt.run("download", *wanted, folder=folder)
    if code == 0:
        return
    if why := cause(f"{complaints}\n{apt.update_said}"):
        raise BundleError(f"the {architecture} packages of a bundle: {why}. apt-get said: {complaints}")
    there = {package.name: package.version for package in _candidates(apt, [p.name for p in packages])}
    gone = [p for p in packages if there.get(p.name, p.version) != p.version]
    if gone:
        table = "; ".join(f"{p.name} {p.version}, mirror has {there[p.name]}" for p in gone)
        raise BundleError(
            f"the mirrors no longer have versions that the lock pins ({architecture}): {table}. "
            "Debian has made a point release. Take the new versions: kvfarm bundle --relock "
            "(and commit lock.json)"
        )
    raise BundleError(_unreachable(architecture, apt, complaints))


def newest(
    architecture: str, names: tuple[str, ...], scratch: Path, deadline: Deadline | None = None
) -> tuple[Package, ...]:
    """The versions that the mirrors have now, with the sha256 of Debian's signed lists.

    deadline: default what a slow network needs.

    Raises:
        BundleError: no Debian mirror, none that answers, a package that it lacks.
    """
    apt = _apt(architecture, scratch, deadline)
    found = _candidates(apt, list(names))
    missing = sorted(set(names) - {package.name for package in found})
    if missing and (why := cause(apt.update_said)):
        raise BundleError(f"the {architecture} packages of a bundle: {why}. apt-get said: {apt.update_said}")
    if missing:
        raise BundleError(_unreachable(architecture, apt, f"no {', '.join(missing)} there"))
    return tuple(sorted(found, key=lambda p: p.name))


def unpack(deb: Path, folder: Path) -> None:
    """Raises BundleError if the package cannot be unpacked."""
    folder.mkdir(parents=True, exist_ok=True)
    done = run(("dpkg-deb", "-x", deb, folder), within_s=_UNPACK_S)
    if done.returncode:
        raise BundleError(f"dpkg-deb cannot unpack {deb.name}: {said(done)}")


def parse_uris(text: str) -> list[Package]:
    """Packages from ``apt-get download --print-uris``: 'URI' file size SHA256:digest."""
    found = []
    for line in text.splitlines():
        match = re.fullmatch(r"'[^']*' (\S+?)_(\S+)_[a-z0-9]+\.deb (\d+) SHA256:([0-9a-f]{64})", line.strip())
        if match:
            name, version, size, sha256 = match.groups()
            found.append(Package(name, version.replace("%3a", ":"), sha256, int(size)))
    return found


def debian_sources(known: Iterable[Source], mirror: str | None = None) -> list[Source]:
    """Where SUITE is to be had, by the Debian archives among ``known``, this machine's own sources.

    mirror: the URL of one more; its security archive is sought beside it, at URL-security.

    Raises:
        BundleError: none of the sources is a Debian archive.
    """
    found: dict[tuple[str, str], Source] = {}
    ours = str(_KEYRING) if _KEYRING.exists() else ""
    if mirror is not None:
        root = mirror.rstrip("/")
        for suffix in _SUFFIXES:
            uri = f"{root}-security" if suffix == "-security" else root
            found[uri, suffix] = Source(uri, SUITE + suffix, "main", ours)
    for source in known:
        base, dash, rest = source.suite.partition("-")
        suffix = dash + rest
        if source.component == "main" and base in _RELEASES and suffix in _SUFFIXES:
            # The key of another release need not be that of SUITE.
            key = source.signed_by if source.suite == SUITE + suffix else ""
            found[source.uri, suffix] = Source(source.uri, SUITE + suffix, "main", key or ours)
    if not found:
        raise BundleError(
            "sought a Debian archive among this machine's apt sources, found none; name one: "
            f"{MIRROR_VARIABLE}=URL (and install debian-archive-keyring)"
        )
    return list(found.values())


def _apt(architecture: str, scratch: Path, deadline: Deadline | None = None) -> _Apt:
    if missing := missing_tools():
        raise BundleError(
            f"sought the programs {missing}, found none; bundles are made on Debian and what derives from it"
        )
    try:
        sources = debian_sources(machine_sources(), os.environ.get(MIRROR_VARIABLE))
        private = PrivateApt(scratch / f"apt-{architecture}", architecture)
        return _Apt(private, said(private.use(sources, deadline or Deadline(_UPDATE_S))))
    except BundleError:
        raise
    except InfrastructureError as error:
        raise BundleError(f"apt-get for a bundle: {error}; is the network slow? try again") from error


def _candidates(apt: _Apt, names: list[str]) -> list[Package]:
    """What the mirrors have of ``names``."""
    code, text, _ = apt.run("download", "--print-uris", *names, folder=apt.private.folder)
    if code == 0:
        return parse_uris(text)
    if len(names) == 1:
        return []
    # apt gives up on all for want of one.
    return [package for name in names for package in _candidates(apt, [name])]


def _unreachable(architecture: str, apt: _Apt, complaints: str) -> str:
    return (
        f"this machine's Debian mirrors did not give the {architecture} packages of {SUITE}: {complaints}\n"
        f"apt-get update said: {apt.update_said}\n"
        f"Check the network and the apt sources, or name another mirror: {MIRROR_VARIABLE}=URL"
    )

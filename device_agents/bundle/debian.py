"""Debian packages of any architecture and their files, without root or the machine's own apt state.

apt runs with lists, cache and status of its own in a temporary folder. The mirrors, proxies
and keys are the machine's: no host is named here. A machine that has no Debian mirror among
its sources (Ubuntu, say) is told one by KVFARM_DEBIAN_MIRROR.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

from device_agents.bundle.commands import run, said
from device_agents.bundle.lock import SUITE, Package
from device_agents.errors import BundleError

MIRROR_VARIABLE = "KVFARM_DEBIAN_MIRROR"
_KEYRING = Path("/usr/share/keyrings/debian-archive-keyring.gpg")
_UPDATE_S, _DOWNLOAD_S, _UNPACK_S = 300.0, 900.0, 120.0

# Names under which a Debian archive's sources are known; the archive has all of them.
_RELEASES = ("stable", "oldstable", "testing", "unstable", "sid", "bullseye", "bookworm", "trixie", "forky")
_SUFFIXES = ("", "-updates", "-security")

# The machine's hooks act on the machine's own state, which is none of our business; and only
# English package lists are of use. "#clear" works in a file read by -c, not with -o.
_CONFIGURATION = """\
#clear APT::Update::Pre-Invoke;
#clear APT::Update::Post-Invoke;
#clear APT::Update::Post-Invoke-Success;
#clear DPkg::Pre-Invoke;
#clear DPkg::Post-Invoke;
#clear APT::Architectures;
APT::Architecture "{architecture}";
APT::Architectures {{ "{architecture}"; }};
APT::Sandbox::User "{user}";
Acquire::Languages "none";
Acquire::Retries "3";
Dir::State "{root}/state";
Dir::State::Lists "{root}/lists";
Dir::State::status "{root}/state/status";
Dir::State::extended_states "{root}/state/extended_states";
Dir::Cache "{root}/cache";
Dir::Cache::pkgcache "pkgcache.bin";
Dir::Cache::srcpkgcache "srcpkgcache.bin";
Dir::Log "{root}/log";
Dir::Etc::sourcelist "{root}/sources.list";
Dir::Etc::sourceparts "{root}/nothing";
Dir::Etc::preferences "{root}/nothing/preferences";
Dir::Etc::preferencesparts "{root}/nothing";
"""


@dataclass(frozen=True)
class _Apt:
    """apt of one architecture in a folder of its own. update_said: what it had to say while updating."""

    root: Path
    update_said: str

    def run(self, *arguments: str, folder: Path, within_s: float = _DOWNLOAD_S) -> tuple[int, str, str]:
        """Exit code, stdout, and what it complained about."""
        done = run(("apt-get", "-c", self.root / "apt.conf", *arguments), within_s=within_s, folder=folder)
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


def newest(architecture: str, names: tuple[str, ...], scratch: Path) -> tuple[Package, ...]:
    """The versions that the mirrors have now, with the sha256 of Debian's signed lists.

    Raises:
        BundleError: no Debian mirror, none that answers, a package that it lacks.
    """
    apt = _apt(architecture, scratch)
    found = _candidates(apt, list(names))
    missing = sorted(set(names) - {package.name for package in found})
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


def debian_sources(targets: str, mirror: str | None = None) -> list[str]:
    """Lines of a sources.list for SUITE, from this machine's own sources.

    targets: ``apt-get indextargets --format '$(REPO_URI) $(RELEASE) $(COMPONENT)'``.
    mirror: the URL of one more; its security archive is sought beside it, at URL-security.

    Raises:
        BundleError: none of the sources is a Debian archive.
    """
    found: dict[tuple[str, str], None] = {}
    if mirror is not None:
        root = mirror.rstrip("/")
        found = dict.fromkeys(
            [(root, SUITE), (root, f"{SUITE}-updates"), (f"{root}-security", f"{SUITE}-security")]
        )
    for line in targets.splitlines():
        words = line.split()
        if len(words) != 3 or words[2] != "main":
            continue
        base, dash, rest = words[1].partition("-")
        if base in _RELEASES and dash + rest in _SUFFIXES:
            found[words[0], SUITE + dash + rest] = None
    if not found:
        raise BundleError(
            "sought a Debian archive among this machine's apt sources, found none; name one: "
            f"{MIRROR_VARIABLE}=URL (and install debian-archive-keyring)"
        )
    option = f" [signed-by={_KEYRING}]" if _KEYRING.exists() else ""
    return [f"deb{option} {uri} {suite} main" for uri, suite in found]


def _apt(architecture: str, scratch: Path) -> _Apt:
    root = scratch / f"apt-{architecture}"
    for name in ("state", "lists/partial", "cache/archives/partial", "log", "nothing"):
        (root / name).mkdir(parents=True, exist_ok=True)
    (root / "state/status").touch()
    created_by = "Created-By: Packages"
    layout = "$(REPO_URI) $(RELEASE) $(COMPONENT)"
    targets = run(("apt-get", "indextargets", "--format", layout, created_by), within_s=_UPDATE_S)
    sources = debian_sources(targets.stdout.decode(errors="replace"), os.environ.get(MIRROR_VARIABLE))
    (root / "sources.list").write_text("\n".join(sources) + "\n")
    # apt as root would drop to a user that cannot write here.
    user = "root" if os.geteuid() == 0 else ""
    (root / "apt.conf").write_text(_CONFIGURATION.format(architecture=architecture, user=user, root=root))
    updated = _Apt(root, "").run("update", folder=root, within_s=_UPDATE_S)
    return _Apt(root, updated[2])


def _candidates(apt: _Apt, names: list[str]) -> list[Package]:
    """What the mirrors have of ``names``."""
    code, text, _ = apt.run("download", "--print-uris", *names, folder=apt.root)
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

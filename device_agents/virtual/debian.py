"""Packages from the machine's own Debian or Ubuntu archive, unpacked into a folder and never installed.

Mirror, keys, proxies and credentials are those that the machine's apt is configured with; lists, state
and downloads are private, so the machine stays as it is. Needs no root.
"""

from __future__ import annotations

import re
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from device_agents.deadline import Deadline
from device_agents.local import LocalTransport
from device_agents.virtual.errors import VirtualPhoneUnavailable

_OS_RELEASE = Path("/etc/os-release")
# Settings of the machine that are about its own packages, or that run commands after ours.
_NOT_OURS = re.compile(
    r"(?i)^(dir::state|dir::cache|dir::etc::(sourcelist|sourceparts|preferences|preferencesparts|parts|main)|dpkg|apt::update)\b"
)


@dataclass(frozen=True)
class _Source:
    """An archive as the machine's apt knows it."""

    uri: str
    components: str
    signed_by: str  # "" leaves it to apt's trusted keys; else a path or a key, as in a .sources file


def unpack_packages(
    names: Sequence[str], backported: str, folder: Path, deadline: Deadline
) -> tuple[str, ...]:
    """Unpack ``names`` and all they depend on into ``folder``; returns the names of the package files.

    backported: the source package that may come from this release's backports, if it has none itself.

    Raises:
        VirtualPhoneUnavailable: no apt here, no such package, or the archive does not answer.
        DeadlineExceeded.
    """
    require_tools()
    with _apt_offering(names, backported, deadline) as apt:
        files = apt.download(names)
        for file in files:
            apt.run("dpkg-deb", "-x", str(file), str(folder))
        return tuple(sorted(file.name for file in files))


def require_tools() -> None:
    """Raises VirtualPhoneUnavailable: no apt here."""
    missing = [tool for tool in ("apt-get", "apt-config", "dpkg-deb") if shutil.which(tool) is None]
    if missing:
        raise VirtualPhoneUnavailable(
            f"virtual phones are made of Debian packages; sought {', '.join(missing)}, found none; "
            "use a Debian or Ubuntu machine"
        )


def require_offered(names: Sequence[str], backported: str, deadline: Deadline) -> None:
    """As ``unpack_packages``, but nothing is fetched except the archive's lists."""
    with _apt_offering(names, backported, deadline) as apt:
        if not apt.offers(names):
            raise VirtualPhoneUnavailable(f"this machine's archive lacks one of {', '.join(names)}")


@contextmanager
def _apt_offering(names: Sequence[str], backported: str, deadline: Deadline) -> Iterator[_Apt]:
    """With backports only where the release itself does not have all of ``names``."""
    with tempfile.TemporaryDirectory(prefix="kvfarm-apt-") as work:
        apt = _Apt(Path(work), deadline)
        if not apt.offers(names):
            apt.add_backports(backported)
        yield apt


class _Apt:
    """A private apt in ``work``, on the machine's archive for its own release."""

    def __init__(self, work: Path, deadline: Deadline) -> None:
        self._work, self._deadline = work, deadline
        self._transport = LocalTransport()
        for part in ("lists/partial", "archives/partial", "state", "sources", "preferences"):
            (work / part).mkdir(parents=True)
        (work / "state" / "status").touch()
        self._codename = _codename()
        self._machine_config = self.run("apt-config", "dump", ours=False)
        self._sources = self._machine_sources()
        self._configure()
        self._write_sources(self._codename)

    def offers(self, names: Sequence[str]) -> bool:
        done = self.run("apt-cache", "madison", *names)
        return all(re.search(rf"^\s*{re.escape(name)} \|", done, re.MULTILINE) for name in names)

    def add_backports(self, source_package: str) -> None:
        suite = f"{self._codename}-backports"
        # Backports never win by themselves; only this source package is wanted from there.
        (self._work / "preferences" / "kvfarm").write_text(
            f"Package: src:{source_package}:any\nPin: release n={suite}\nPin-Priority: 990\n"
        )
        self._write_sources(f"{self._codename} {suite}")

    def download(self, names: Sequence[str]) -> list[Path]:
        self.run("apt-get", "-y", "--no-install-recommends", "--download-only", "install", *names)
        return sorted((self._work / "archives").glob("*.deb"))

    def run(self, *argv: str, ours: bool = True) -> str:
        """stdout. Raises VirtualPhoneUnavailable when it fails."""
        environment = ["LC_ALL=C", "DEBIAN_FRONTEND=noninteractive"]
        if ours:
            environment.append(f"APT_CONFIG={self._work / 'apt.conf'}")
        result = self._transport.run(["env", *environment, *argv], self._deadline)
        if result.returncode != 0:
            said = result.stderr.decode(errors="replace").strip().splitlines()
            raise VirtualPhoneUnavailable(
                f"{' '.join(argv[:1])} for the parts of a virtual phone failed: "
                f"{' '.join(said[-3:]) or f'exit code {result.returncode}'}; see whether "
                "`apt-get update` works on this machine"
            )
        return result.stdout.decode(errors="replace")

    def _configure(self) -> None:
        kept = [line for line in self._machine_config.splitlines() if not _NOT_OURS.match(line)]
        ours = {
            "Dir::Etc::parts": "/dev/null",
            "Dir::Etc::main": "/dev/null",
            "Dir::Etc::sourcelist": "/dev/null",
            "Dir::Etc::sourceparts": self._work / "sources",
            "Dir::Etc::preferences": "/dev/null",
            "Dir::Etc::preferencesparts": self._work / "preferences",
            "Dir::State": self._work / "state",
            "Dir::State::lists": self._work / "lists",
            "Dir::State::status": self._work / "state" / "status",
            "Dir::Cache": self._work,
            "Dir::Cache::archives": self._work / "archives",
            "Dir::Cache::pkgcache": "",
            "Dir::Cache::srcpkgcache": "",
            "Acquire::Languages": "none",
            "APT::Sandbox::User": "",  # it cannot write here
            "Debug::NoLocking": "true",
        }
        lines = [*kept, *(f'{key} "{value}";' for key, value in ours.items())]
        (self._work / "apt.conf").write_text("\n".join(lines) + "\n")

    def _write_sources(self, suites: str) -> None:
        stanzas = []
        for source in self._sources:
            signed = f"Signed-By: {source.signed_by}\n" if source.signed_by else ""
            stanzas.append(
                f"Types: deb\nURIs: {source.uri}\nSuites: {suites}\nComponents: {source.components}\n{signed}"
            )
        (self._work / "sources" / "kvfarm.sources").write_text("\n".join(stanzas))
        self.run("apt-get", "update")

    def _machine_sources(self) -> list[_Source]:
        """Where the machine gets its own release from."""
        listed = self.run("apt-get", "indextargets", "Created-By: Packages", ours=False)
        components: dict[tuple[str, str], list[str]] = {}
        for block in listed.split("\n\n"):
            fields = dict(line.split(": ", 1) for line in block.splitlines() if ": " in line)
            if fields.get("Release") == self._codename and fields.get("Repo-URI"):
                entry = fields.get("Sourcesentry", "").rpartition(":")[0]
                known = components.setdefault((fields["Repo-URI"], entry), [])
                if (component := fields.get("Component", "main")) not in known:
                    known.append(component)
        if not components:
            raise VirtualPhoneUnavailable(
                f"sought the archive of {self._codename} in this machine's apt sources, found none; "
                "add it, or use another lab host"
            )
        return [
            _Source(uri, " ".join(names), _signed_by(Path(entry), self._codename))
            for (uri, entry), names in components.items()
        ]


def _codename() -> str:
    """bookworm, trixie, noble. Raises VirtualPhoneUnavailable."""
    text = _OS_RELEASE.read_text() if _OS_RELEASE.exists() else ""
    found = re.search(r'^VERSION_CODENAME="?([\w.-]+)', text, re.MULTILINE)
    if found is None:
        raise VirtualPhoneUnavailable(
            f"sought this machine's release (VERSION_CODENAME) in {_OS_RELEASE}, found none; virtual phones "
            "need a released Debian or Ubuntu"
        )
    return found[1]


def _signed_by(entry: Path, suite: str) -> str:
    """The Signed-By of ``suite`` in one of the machine's source files; "" when it names no key."""
    try:
        text = entry.read_text()
    except OSError:
        return ""
    if entry.suffix != ".sources":
        lines = [line for line in text.splitlines() if re.search(rf"\s{re.escape(suite)}\s", line)]
        found = re.search(r"\[[^\]]*signed-by=([^\]\s]+)", "\n".join(lines))
        return found[1] if found else ""
    for stanza in re.split(r"\n\s*\n", re.sub(r"(?m)^#.*\n", "", text)):
        if re.search(rf"(?im)^suites:.*\b{re.escape(suite)}(\s|$)", stanza):
            # A key may stand here itself, on continuation lines.
            found = re.search(r"(?im)^signed-by:[ \t]*(.*(?:\n[ \t].*)*)", stanza)
            if found:
                return found[1].rstrip("\n")
    return ""

"""apt with lists, state and downloads of its own: packages are fetched and unpacked, never installed.

Mirrors, keys, proxies and credentials are those that the machine's apt is configured with (no host is
named here), and the machine stays as it is. Needs no root.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from device_agents.api import RunResult
from device_agents.deadline import Deadline
from device_agents.local import LocalTransport

TOOLS = ("apt-get", "apt-config", "dpkg-deb")
_READ_S = 60.0  # the machine's own configuration; a big apt cache is opened for it
# Settings of the machine that are about its own packages, or that run commands after ours.
_NOT_OURS = re.compile(
    r"(?i)^(dir::state|dir::cache|dir::log|dir::etc::(sourcelist|sourceparts|preferences|preferencesparts"
    r"|parts|main)|dpkg|apt::update|apt::architecture|apt::architectures)\b"
)


@dataclass(frozen=True)
class Source:
    """One component of one suite of an archive, as a line of sources.list has it."""

    uri: str
    suite: str
    component: str
    signed_by: str = ""  # "" leaves it to apt's trusted keys; else a path or a key, as in a .sources file


_FULL = re.compile(r"No space left on device|You don't have enough free space|Disk quota exceeded")
# Not "Failed to fetch" by itself: it is said of what a mirror lacks as well.
_NO_NETWORK = re.compile(
    r"Temporary failure|Could not resolve|Could not connect|Cannot initiate the connection|Unable to connect"
    r"|Network is unreachable|Connection timed out|Connection failed"
)


def cause(words: str) -> str:
    """Why apt or pip, which said ``words``, got nothing: the disk or the network; "" for neither."""
    if _FULL.search(words):
        return "no space is left on this machine's disk; free some (see `df -h . /tmp`) and try again"
    if _NO_NETWORK.search(words):
        return "this machine does not reach its package archive; check the network and its proxy"
    return ""


def missing_tools() -> str:
    """What of TOOLS is not on PATH; "" for nothing."""
    return ", ".join(tool for tool in TOOLS if shutil.which(tool) is None)


def machine_sources() -> list[Source]:
    """Where this machine gets its packages from. Raises InfrastructureError, DeadlineExceeded."""
    found: dict[Source, None] = {}
    for block in _plainly("apt-get", "indextargets", "Created-By: Packages").split("\n\n"):
        fields = dict(line.split(": ", 1) for line in block.splitlines() if ": " in line)
        if fields.get("Repo-URI") and fields.get("Release"):
            entry = Path(fields.get("Sourcesentry", "").rpartition(":")[0])
            uri, suite = fields["Repo-URI"], fields["Release"]
            found[Source(uri, suite, fields.get("Component", "main"), signed_by(entry, suite))] = None
    return list(found)


class PrivateApt:
    """apt in ``folder``. architecture: Debian's name of it; "" for the machine's own."""

    def __init__(self, folder: Path, architecture: str = "") -> None:
        self.folder = folder
        for part in ("lists/partial", "archives/partial", "state", "log", "sources", "preferences"):
            (folder / part).mkdir(parents=True, exist_ok=True)
        (folder / "state" / "status").touch()
        self._configure(architecture)

    def use(self, sources: Iterable[Source], deadline: Deadline) -> RunResult:
        """From now on these and no others; fetches their lists, which apt says nothing about but in words."""
        stanzas = []
        for source in sources:
            lines = (
                f"Types: deb\nURIs: {source.uri}\nSuites: {source.suite}\nComponents: {source.component}\n"
            )
            stanzas.append(lines + (f"Signed-By: {source.signed_by}\n" if source.signed_by else ""))
        (self.folder / "sources" / "kvfarm.sources").write_text("\n".join(stanzas))
        return self.run(["apt-get", "update"], deadline)

    def prefer(self, source_package: str, suite: str) -> None:
        """Take what is made of ``source_package`` from ``suite``, which never wins by itself."""
        (self.folder / "preferences" / "kvfarm").write_text(
            f"Package: src:{source_package}:any\nPin: release n={suite}\nPin-Priority: 990\n"
        )

    def run(self, argv: list[str], deadline: Deadline, folder: Path | None = None) -> RunResult:
        """A finished apt-get or apt-cache, whatever its exit code; ``folder``: where it runs.

        Raises:
            DeadlineExceeded: it was killed.
        """
        return _run(argv, deadline, f"APT_CONFIG={self.folder / 'apt.conf'}", folder=folder or self.folder)

    def _configure(self, architecture: str) -> None:
        dump = _plainly("apt-config", "dump").splitlines()
        native = next((line for line in dump if line.startswith("APT::Architecture ")), "")
        wanted = architecture or native.partition('"')[2].rstrip('";')
        ours = {
            "APT::Architecture": wanted,
            "APT::Architectures::": wanted,
            "APT::Sandbox::User": "",  # it cannot write here
            "Acquire::Languages": "none",
            "Acquire::Retries": "3",
            "Dir::Etc::parts": "/dev/null",
            "Dir::Etc::main": "/dev/null",
            "Dir::Etc::sourcelist": "/dev/null",
            "Dir::Etc::sourceparts": self.folder / "sources",
            "Dir::Etc::preferences": "/dev/null",
            "Dir::Etc::preferencesparts": self.folder / "preferences",
            "Dir::State": self.folder / "state",
            "Dir::State::lists": self.folder / "lists",
            "Dir::State::status": self.folder / "state" / "status",
            "Dir::Cache": self.folder,
            "Dir::Cache::archives": self.folder / "archives",
            "Dir::Cache::pkgcache": "",
            "Dir::Cache::srcpkgcache": "",
            "Dir::Log": self.folder / "log",
            "Debug::NoLocking": "true",
        }
        lines = [line for line in dump if not _NOT_OURS.match(line)]
        lines += [f'{key} "{value}";' for key, value in ours.items()]
        (self.folder / "apt.conf").write_text("\n".join(lines) + "\n")


def signed_by(entry: Path, suite: str) -> str:
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


def _plainly(*argv: str) -> str:
    """stdout of a command with the machine's own configuration."""
    return _run(list(argv), Deadline(_READ_S)).stdout.decode(errors="replace")


def _run(argv: list[str], deadline: Deadline, *settings: str, folder: Path = Path("/")) -> RunResult:
    environment = ["env", "-C", str(folder), "LC_ALL=C.UTF-8", "DEBIAN_FRONTEND=noninteractive"]
    return LocalTransport().run([*environment, *settings, *argv], deadline)

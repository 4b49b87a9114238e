"""The parts of virtual phones from the machine's own Debian or Ubuntu archive, of its own release."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from device_agents.apt import PrivateApt, Source, cause, machine_sources, missing_tools
from device_agents.deadline import Deadline
from device_agents.local import LocalTransport
from device_agents.scratch import APT, owned_folder
from device_agents.virtual.errors import VirtualPhoneUnavailable

_OS_RELEASE = Path("/etc/os-release")


def unpack_packages(
    names: Sequence[str], backported: str, folder: Path, deadline: Deadline
) -> tuple[str, ...]:
    """Unpack ``names`` and all they depend on into ``folder``; returns the names of the package files.

    backported: the source package that may come from this release's backports, if it has none itself.

    Raises:
        VirtualPhoneUnavailable: no apt here, no such package, or the archive does not answer.
        DeadlineExceeded.
    """
    with _archive(names, backported, deadline) as archive:
        files = archive.download(names)
        for file in files:
            unpacked = LocalTransport().run(["dpkg-deb", "-x", str(file), str(folder)], deadline)
            _check("dpkg-deb", unpacked.returncode, unpacked.stderr)
        return tuple(sorted(file.name for file in files))


def require_tools() -> None:
    """Raises VirtualPhoneUnavailable: no apt here."""
    if missing := missing_tools():
        raise VirtualPhoneUnavailable(
            f"virtual phones are made of Debian packages; sought {missing}, found none; "
            "use a Debian or Ubuntu machine"
        )


def require_offered(names: Sequence[str], backported: str, deadline: Deadline) -> None:
    """As ``unpack_packages``, but nothing is fetched except the archive's lists."""
    with _archive(names, backported, deadline) as archive:
        if not archive.offers(names):
            raise VirtualPhoneUnavailable(f"this machine's archive lacks one of {', '.join(names)}")


@contextmanager
def _archive(names: Sequence[str], backported: str, deadline: Deadline) -> Iterator[_Archive]:
    """With backports only where the release itself does not have all of ``names``."""
    require_tools()
    with owned_folder(APT) as work:
        archive = _Archive(Path(work), deadline)
        if not archive.offers(names):
            archive.add_backports(backported)
            if not archive.offers(names) and (why := cause(archive.update_said)):
                raise VirtualPhoneUnavailable(
                    f"the parts of a virtual phone: {why}. apt-get said: {archive.update_said}"
                )
        yield archive


class _Archive:
    """The machine's archive, of its own release."""

    def __init__(self, work: Path, deadline: Deadline) -> None:
        self._deadline = deadline
        self._codename = _codename()
        self._sources = [source for source in machine_sources() if source.suite == self._codename]
        if not self._sources:
            raise VirtualPhoneUnavailable(
                f"sought the archive of {self._codename} in this machine's apt sources, found none; "
                "add it, or use another lab host"
            )
        self._apt = PrivateApt(work)
        self.update_said = ""  # it succeeds without a network too
        self._use(self._sources)

    def offers(self, names: Sequence[str]) -> bool:
        listed = self._run("apt-cache", "madison", *names)
        return all(re.search(rf"^\s*{re.escape(name)} \|", listed, re.MULTILINE) for name in names)

    def add_backports(self, source_package: str) -> None:
        suite = f"{self._codename}-backports"
        self._apt.prefer(source_package, suite)
        self._use([*self._sources, *(replace(source, suite=suite) for source in self._sources)])

    def download(self, names: Sequence[str]) -> list[Path]:
        self._run("apt-get", "-y", "--no-install-recommends", "--download-only", "install", *names)
        return sorted((self._apt.folder / "archives").glob("*.deb"))

    def _use(self, sources: list[Source]) -> None:
        updated = self._apt.use(sources, self._deadline)
        self.update_said = _last_words(updated.stderr)
        _check("apt-get update", updated.returncode, updated.stderr)

    def _run(self, *argv: str) -> str:
        """stdout. Raises VirtualPhoneUnavailable when it fails."""
        done = self._apt.run(list(argv), self._deadline)
        _check(argv[0], done.returncode, done.stderr)
        return done.stdout.decode(errors="replace")


def _check(program: str, returncode: int, stderr: bytes) -> None:
    """Raises VirtualPhoneUnavailable unless it succeeded."""
    if returncode != 0:
        said = _last_words(stderr) or f"exit code {returncode}"
        do = cause(stderr.decode(errors="replace")) or "see whether `apt-get update` works on this machine"
        raise VirtualPhoneUnavailable(f"{program} for the parts of a virtual phone failed: {said}; {do}")


def _last_words(stderr: bytes) -> str:
    return " ".join(stderr.decode(errors="replace").strip().splitlines()[-3:])


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

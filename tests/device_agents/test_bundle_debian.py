"""Where a bundle's packages come from, and what is said where one cannot be had."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from device_agents.apt import Source
from device_agents.bundle import builder, contents, debian
from device_agents.bundle.compiling import host_abi
from device_agents.bundle.lock import ABIS, Lock, Package, Packages
from device_agents.errors import BundleError

MACHINE = [
    Source("http://mirror.example/debian/", "bookworm", "main", "/own.gpg"),
    Source("http://mirror.example/debian/", "bookworm", "contrib", "/own.gpg"),
    Source("http://mirror.example/debian/", "bookworm-updates", "main"),
    Source("http://mirror.example/debian/", "bookworm-backports", "main"),
    Source("http://mirror.example/debian-security/", "bookworm-security", "main"),
    Source("http://other.example/apt", "bookworm-pgdg", "main"),
    Source("http://other.example/docker", "bookworm", "stable"),
]


def places(sources: list[Source]) -> list[str]:
    return [f"{source.uri} {source.suite} {source.component}" for source in sources]


def test_mirrors_are_the_machines_own() -> None:
    assert places(debian.debian_sources(MACHINE)) == [
        "http://mirror.example/debian/ bookworm main",
        "http://mirror.example/debian/ bookworm-updates main",
        "http://mirror.example/debian-security/ bookworm-security main",
    ]
    assert debian.debian_sources(MACHINE)[0].signed_by == "/own.gpg"


def test_another_debian_is_asked_for_the_suite_that_we_need() -> None:
    trixie = [replace(source, suite=source.suite.replace("bookworm", "trixie")) for source in MACHINE]
    found = debian.debian_sources(trixie)
    assert places(found) == places(debian.debian_sources(MACHINE))
    assert "/own.gpg" not in [source.signed_by for source in found]  # which is trixie's


def test_a_machine_without_debian_needs_a_mirror() -> None:
    ubuntu = [Source("http://mirror.example/ubuntu", "noble", "main")]
    with pytest.raises(BundleError, match=f"{debian.MIRROR_VARIABLE}=URL"):
        debian.debian_sources(ubuntu)
    found = places(debian.debian_sources(ubuntu, "http://mirror.example/debian"))
    assert found == [
        "http://mirror.example/debian bookworm main",
        "http://mirror.example/debian bookworm-updates main",
        "http://mirror.example/debian-security bookworm-security main",
    ]


def test_what_apt_says_of_a_package() -> None:
    line = f"'http://m/z_1.2_arm64.deb' zlib1g_1%3a1.2.13.dfsg-1_arm64.deb 82744 SHA256:{'5' * 64}\n"
    assert debian.parse_uris("Get: nonsense\n" + line) == [
        Package("zlib1g", "1:1.2.13.dfsg-1", "5" * 64, 82744)
    ]


GONE = f"""\
case "$*" in
*indextargets*) printf "Repo-URI: http://mirror.example/debian/\\nRelease: bookworm\\n" ;;
*--print-uris*) echo "'http://m/libc6.deb' libc6_2.36-99_amd64.deb 5 SHA256:{"5" * 64}" ;;
*update*) ;;
*) echo "E: Version '2.36-1' for 'libc6' was not found" >&2; exit 100 ;;
esac
"""
UPDATE = '*update*) echo "W: Failed to fetch http://mirror.example/InRelease  {}" >&2 ;;'
FULL = GONE.replace(
    "*update*) ;;", UPDATE.format("Error writing to file - write (28: No space left on device)")
)
OFFLINE = GONE.replace("*update*) ;;", UPDATE.format("Temporary failure resolving 'mirror.example'"))
SILENT = """\
case "$*" in
*indextargets*) printf "Repo-URI: http://mirror.example/debian/\\nRelease: bookworm\\n" ;;
*update*) echo "W: Failed to fetch" >&2 ;;
*) echo "E: Unable to locate package libc6" >&2; exit 100 ;;
esac
"""
LOCKED = Package("libc6", "2.36-1", "a" * 64, 5)


@pytest.fixture
def apt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """An apt-get of our own."""

    def install(script: str) -> None:
        program = tmp_path / "bin" / "apt-get"
        program.parent.mkdir()
        program.write_text(f"#!/bin/sh\n{script}")
        program.chmod(0o755)
        monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")

    return install


@pytest.mark.parametrize(
    ("script", "complaint"),
    [
        (GONE, r"libc6 2\.36-1, mirror has 2\.36-99\..*bundle --relock"),
        (FULL, r"no space is left on this machine's disk.*Version '2\.36-1'"),
        (OFFLINE, r"does not reach its package archive; check the network"),
        (SILENT, r"(?s)Unable to locate package libc6.*Failed to fetch"),
    ],
)
def test_why_a_package_cannot_be_had(
    script: str, complaint: str, apt: Callable[[str], None], tmp_path: Path
) -> None:
    apt(script)
    with pytest.raises(BundleError, match=complaint):
        debian.download("amd64", (LOCKED,), tmp_path, tmp_path)


def test_without_apt_one_is_told_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(BundleError, match="sought the programs apt-get, apt-config, dpkg-deb"):
        debian.download("amd64", (LOCKED,), tmp_path, tmp_path)


def test_another_file_than_the_locked_one_is_refused(apt: Callable[[str], None], tmp_path: Path) -> None:
    apt(GONE.replace('*) echo "E:', '*) echo wrong > libc6_2.36-1_amd64.deb; exit 0; echo "E:'))
    abi = host_abi()
    lock = Lock({name: Packages(tuple(replace(LOCKED, name=n) for n in contents.DEBS), ()) for name in ABIS})
    with pytest.raises(BundleError, match=r"libc6 2\.36-1: sought sha256 aaaaaaaaaaaaaaaa…, the mirror gave"):
        builder.build(abi, tmp_path / "cache", lock=lock)
    assert list((tmp_path / "cache" / "downloads").iterdir()) == []
    assert not list((tmp_path / "cache").glob(".making-*"))

"""What the private apt takes from the machine's own: keys, release, settings."""

from __future__ import annotations

from pathlib import Path

import pytest

from device_agents.deadline import Deadline
from device_agents.virtual import debian
from device_agents.virtual.debian import _NOT_OURS, _codename, _signed_by, unpack_packages
from device_agents.virtual.errors import VirtualPhoneUnavailable

# deb822 with comments, two stanzas, a key in place; Debian's sources.list(5).
STANZAS = """\
# a comment
Types: deb
URIs: http://mirror.invalid/debian
Suites: bookworm bookworm-updates
Components: main
Signed-By: /usr/share/keyrings/archive.gpg

Types: deb
# another
URIs: http://mirror.invalid/other
Suites: trixie
Components: main contrib
Signed-By:
 -----BEGIN PGP PUBLIC KEY BLOCK-----
 .
 mQINBF
 -----END PGP PUBLIC KEY BLOCK-----
Architectures: amd64

Types: deb
URIs: http://mirror.invalid/third
Suites: forky
Components: main
"""
LINES = """\
# deb http://mirror.invalid/debian bookworm main
deb [arch=amd64 signed-by=/etc/keyrings/a.gpg] http://mirror.invalid/debian bookworm main
deb http://mirror.invalid/debian trixie main
"""


@pytest.mark.parametrize(
    ("suite", "expected"),
    [
        ("bookworm", "/usr/share/keyrings/archive.gpg"),
        ("bookworm-updates", "/usr/share/keyrings/archive.gpg"),
        ("forky", ""),
        ("book", ""),
        ("sid", ""),
    ],
)
def test_the_key_of_a_suite_is_found_in_stanzas(tmp_path: Path, suite: str, expected: str) -> None:
    entry = tmp_path / "debian.sources"
    entry.write_text(STANZAS)
    assert _signed_by(entry, suite) == expected


def test_a_key_in_place_is_kept_whole(tmp_path: Path) -> None:
    entry = tmp_path / "debian.sources"
    entry.write_text(STANZAS)
    assert _signed_by(entry, "trixie").splitlines() == [
        "",
        " -----BEGIN PGP PUBLIC KEY BLOCK-----",
        " .",
        " mQINBF",
        " -----END PGP PUBLIC KEY BLOCK-----",
    ]


def test_the_key_of_a_suite_is_found_in_lines(tmp_path: Path) -> None:
    entry = tmp_path / "sources.list"
    entry.write_text(LINES)
    assert _signed_by(entry, "bookworm") == "/etc/keyrings/a.gpg"
    assert _signed_by(entry, "trixie") == ""
    assert _signed_by(tmp_path / "absent.list", "trixie") == ""


@pytest.mark.parametrize(
    ("line", "ours"),
    [
        ('Acquire::http::Proxy "http://proxy.invalid";', True),
        ('Acquire::Check-Valid-Until "false";', True),
        ('Dir::Etc::trustedparts "trusted.gpg.d";', True),
        ('Dir::Etc::netrcparts "auth.conf.d";', True),
        ('APT::Architecture "amd64";', True),
        ('APT::Update::Post-Invoke:: "rm -f /var/cache/apt/archives/*.deb";', False),
        ('DPkg::Post-Invoke:: "something";', False),
        ('Dir::State::lists "lists/";', False),
        ('Dir::Cache "var/cache/apt";', False),
        ('Dir::Etc::sourceparts "sources.list.d";', False),
        ('Dir::Etc::preferencesparts "preferences.d";', False),
    ],
)
def test_the_machine_s_way_to_its_mirror_is_kept_and_its_hooks_are_not(line: str, ours: bool) -> None:
    assert (_NOT_OURS.match(line) is None) == ours


def test_without_apt_the_reason_is_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(VirtualPhoneUnavailable, match="sought apt-get, apt-config, dpkg-deb, found none"):
        unpack_packages(("adbd",), "android-platform-tools", tmp_path, Deadline(5))


def test_a_machine_without_a_codename_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    release = tmp_path / "os-release"
    monkeypatch.setattr(debian, "_OS_RELEASE", release)
    with pytest.raises(VirtualPhoneUnavailable, match="VERSION_CODENAME"):
        _codename()
    release.write_text('ID=debian\nVERSION_CODENAME="trixie"\n')
    assert _codename() == "trixie"

"""What the private apt takes from the machine's own: sources, keys, settings."""

from __future__ import annotations

from pathlib import Path

import pytest

from device_agents import apt
from device_agents.api import RunResult
from device_agents.apt import _NOT_OURS, PrivateApt, Source, machine_sources, signed_by
from device_agents.deadline import Deadline

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
    assert signed_by(entry, suite) == expected


def test_a_key_in_place_is_kept_whole(tmp_path: Path) -> None:
    entry = tmp_path / "debian.sources"
    entry.write_text(STANZAS)
    assert signed_by(entry, "trixie").splitlines() == [
        "",
        " -----BEGIN PGP PUBLIC KEY BLOCK-----",
        " .",
        " mQINBF",
        " -----END PGP PUBLIC KEY BLOCK-----",
    ]


def test_the_key_of_a_suite_is_found_in_lines(tmp_path: Path) -> None:
    entry = tmp_path / "sources.list"
    entry.write_text(LINES)
    assert signed_by(entry, "bookworm") == "/etc/keyrings/a.gpg"
    assert signed_by(entry, "trixie") == ""
    assert signed_by(tmp_path / "absent.list", "trixie") == ""


@pytest.mark.parametrize(
    ("line", "ours"),
    [
        ('Acquire::http::Proxy "http://proxy.invalid";', True),
        ('Acquire::Check-Valid-Until "false";', True),
        ('Dir::Etc::trustedparts "trusted.gpg.d";', True),
        ('Dir::Etc::netrcparts "auth.conf.d";', True),
        ('APT::Architecture "amd64";', False),
        ('APT::Architectures:: "i386";', False),
        ('APT::Get::AllowUnauthenticated "false";', True),
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


TARGETS = """\
MetaKey: main/binary-amd64/Packages
Release: bookworm
Component: main
Repo-URI: http://mirror.example/debian/
Sourcesentry: {entry}:1

MetaKey: contrib/binary-amd64/Packages
Release: bookworm
Component: contrib
Repo-URI: http://mirror.example/debian/
Sourcesentry: {entry}:1

MetaKey: main/binary-all/Packages
Release: bookworm
Component: main
Repo-URI: http://mirror.example/debian/
Sourcesentry: {entry}:1

MetaKey: nothing that we know
"""


def test_the_machine_s_sources_are_read_with_their_keys(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    entry = tmp_path / "debian.sources"
    entry.write_text(STANZAS)
    monkeypatch.setattr(apt, "_plainly", lambda *argv: TARGETS.format(entry=entry))
    uri, key = "http://mirror.example/debian/", "/usr/share/keyrings/archive.gpg"
    assert machine_sources() == [
        Source(uri, "bookworm", "main", key),
        Source(uri, "bookworm", "contrib", key),
    ]


def settings(private: PrivateApt) -> str:
    """What apt itself makes of our configuration."""
    done = private.run(["apt-config", "dump"], Deadline(20))
    assert done.returncode == 0, done.stderr
    return done.stdout.decode()


@pytest.mark.parametrize("architecture", ["arm64", "amd64"])
def test_all_of_its_state_is_in_its_folder(tmp_path: Path, architecture: str) -> None:
    said = settings(PrivateApt(tmp_path / "apt", architecture))
    assert f'APT::Architecture "{architecture}";' in said
    assert said.count("APT::Architectures:: ") == 1
    assert "Post-Invoke" not in said
    for place in ("Dir::State", "Dir::State::lists", "Dir::State::status", "Dir::Cache", "Dir::Log"):
        assert f'{place} "{tmp_path}/apt' in said


def test_it_knows_the_sources_that_it_is_told_and_no_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    private = PrivateApt(tmp_path, "arm64")
    run = private.run

    def no_network(argv: list[str], deadline: Deadline, folder: Path | None = None) -> RunResult:
        return RunResult(0, b"", b"") if argv[-1] == "update" else run(argv, deadline, folder)

    monkeypatch.setattr(private, "run", no_network)
    private.use([Source("http://mirror.example/debian", "trixie", "main", "/k.gpg")], Deadline(20))
    done = run(["apt-get", "--print-uris", "update"], Deadline(20))
    lines = done.stdout.decode().splitlines()
    assert any("/trixie/main/binary-arm64/" in line for line in lines)
    assert [
        line for line in lines if not line.startswith("'http://mirror.example/debian/dists/trixie/")
    ] == []

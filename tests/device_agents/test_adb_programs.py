"""Which adb there is, and whether programs and server would kill each other."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from device_agents.adb import programs
from device_agents.adb.connection import AdbServer
from device_agents.api import Finding
from device_agents.deadline import Deadline
from device_agents.errors import AdbFailure
from tests.device_agents.fake_adb import FakeAdb

Install = Callable[[str, int, str], Path]
NO_SERVER = 1  # a port that nobody listens on


@pytest.fixture
def server(tmp_path: Path) -> Iterator[FakeAdb]:
    with FakeAdb(tmp_path) as server:  # it speaks protocol 41
        yield server


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Install:
    """Puts an adb of this protocol and version on PATH, before others. Nothing else is there."""
    monkeypatch.delenv("ADBUTILS_ADB_PATH", raising=False)
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    monkeypatch.setattr("adbutils.__file__", str(tmp_path / "adbutils" / "__init__.py"))

    def put(folder: str, protocol: int, version: str) -> Path:
        path = tmp_path / folder / "adb"
        path.parent.mkdir(parents=True)
        path.write_text(
            f"#!/bin/sh\necho 'Android Debug Bridge version 1.0.{protocol}'; echo 'Version {version}'\n"
        )
        path.chmod(0o755)
        monkeypatch.setenv("PATH", f"{path.parent}:{os.environ['PATH']}")
        return path

    return put


def look(port: int = NO_SERVER) -> dict[str, Finding]:
    return {finding.what: finding for finding in programs.diagnose_adb(AdbServer(port), Deadline(20))}


def test_one_program_and_its_server_are_well(install: Install, server: FakeAdb) -> None:
    path = install("a", 41, "34.0.5-debian")
    found = look(server.port)
    assert [(f.what, f.state) for f in found.values()] == [("program", "ok"), ("server", "ok")]
    assert found["program"].found == f"{path}, 34.0.5-debian"


@pytest.mark.usefixtures("install")
def test_without_any_program_one_is_told_to_get_one() -> None:
    found = look()
    assert found["program"].state == "fix"
    assert "platform-tools" in found["program"].do


def test_adbutils_own_program_counts(install: Install, monkeypatch: pytest.MonkeyPatch) -> None:
    install("adbutils/binaries", 41, "36.0.0")
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    assert look()["program"].state == "ok"


def test_a_named_program_that_is_not_there_is_told(install: Install, monkeypatch: pytest.MonkeyPatch) -> None:
    install("a", 41, "34.0.5")
    monkeypatch.setenv("ADBUTILS_ADB_PATH", "/nowhere/adb")
    found = look()["program"]
    assert (found.state, found.found.split()[0]) == ("fix", "/nowhere/adb")


def test_a_program_that_fails_is_told(install: Install) -> None:
    install("a", 41, "34.0.5").write_text("#!/bin/sh\necho lib missing >&2; exit 127\n")
    assert look()["program"].state == "fix"
    assert "gave 127: lib missing" in look()["program"].found


def test_one_that_fails_is_passed_over_for_one_that_runs(install: Install) -> None:
    good = install("good", 41, "34.0.5")
    install("bad", 41, "34.0.5").write_text("#!/bin/sh\nexit 127\n")
    assert look()["program"] == Finding("program", "ok", f"{good}, 34.0.5")


@pytest.mark.parametrize(("protocol", "state"), [(41, "ok"), (39, "fix")])
def test_programs_of_two_protocols_kill_each_others_server(
    install: Install, protocol: int, state: str
) -> None:
    install("old", protocol, "28.0.2")
    install("new", 41, "34.0.5")
    assert look()["versions"].state == state


def test_a_server_of_another_protocol_is_told(install: Install, server: FakeAdb) -> None:
    install("a", 39, "28.0.2")
    found = look(server.port)["server"]
    assert found.state == "fix"
    assert "speaks protocol 41" in found.found
    assert "speaks 39" in found.found


def test_no_server_is_no_trouble_and_none_is_started(install: Install) -> None:
    path = install("a", 41, "34.0.5")
    with path.open("a") as file:
        file.write(f'[ "$1" = version ] || touch {path}.started\n')
    assert look()["server"].state == "ok"
    assert not path.with_name("adb.started").exists()


def test_a_server_that_hangs_is_told(
    install: Install, server: FakeAdb, monkeypatch: pytest.MonkeyPatch
) -> None:
    install("a", 41, "34.0.5")
    monkeypatch.setattr(programs, "_ASK_S", 0.2)
    server.frozen.set()
    found = look(server.port)["server"]
    server.frozen.clear()
    assert (found.state, found.do) == ("fix", f"stop it: adb -P {server.port} kill-server")


def test_a_port_that_is_none_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ANDROID_ADB_SERVER_PORT", "tcp:5037")
    with pytest.raises(AdbFailure, match="found 'tcp:5037'; correct or unset it"):
        AdbServer.default()

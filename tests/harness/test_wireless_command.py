"""kvfarm connect and pair on the command line."""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from harness import cli
from tests.device_agents.adb_fixtures import add_command
from tests.device_agents.fake_adb import ADDRESS, SERIAL, FakeAdb

CODE = "123456"


@pytest.fixture
def adb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeAdb]:
    with FakeAdb(tmp_path) as server:
        monkeypatch.setenv("ANDROID_ADB_SERVER_PORT", str(server.port))
        yield server


def test_connect_says_what_to_write_into_farm_toml(
    adb: FakeAdb, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    add_command(tmp_path, "getprop", 'echo "Pixel 8"')
    assert cli.run(["connect", "127.0.0.1"]) == 0
    assert f'options = {{ serial = "{ADDRESS}" }}' in capsys.readouterr().out


def test_connect_to_a_phone_that_does_not_answer_is_refused(
    adb: FakeAdb, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    adb.state = "offline"
    monkeypatch.setattr("harness.cli.wireless._CONNECT_S", 0.3)
    assert cli.run(["connect", "--json", ADDRESS]) == 2
    assert json.loads(capsys.readouterr().out)["error"]["type"] == "DeviceUnreachable"


@pytest.mark.parametrize("accepted", [CODE, "654321"])
def test_the_pairing_code_is_read_from_stdin_and_told_nobody(
    adb: FakeAdb,
    accepted: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    adb.pairing_code = accepted
    caplog.set_level(logging.DEBUG)
    monkeypatch.setattr("sys.stdin", io.StringIO(f"{CODE}\n"))
    assert cli.run(["pair", "--json", "192.0.2.7:37123"]) == (0 if accepted == CODE else 2)
    assert adb.requests == [f"host:pair:{CODE}:192.0.2.7:37123"]
    said = capsys.readouterr()
    assert (f"adb-{SERIAL}" in said.out) == (accepted == CODE)
    assert CODE not in said.out + said.err + caplog.text


def test_a_malformed_address_is_refused_before_a_code_is_asked_for(
    adb: FakeAdb, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Unread(io.StringIO):
        def readline(self, *_: object) -> Any:
            raise AssertionError("a code was asked for")

    monkeypatch.setattr("sys.stdin", Unread())
    assert cli.run(["pair", "192.0.2.7"]) == 2
    said = capsys.readouterr().err
    assert "sought an address such as 192.0.2.7:37123, found '192.0.2.7'" in said
    assert cli.run(["connect", "192.0.2.7:phone"]) == 2
    assert "connecting to" not in capsys.readouterr().err
    assert adb.requests == []


def test_the_pairing_code_is_no_option() -> None:
    assert cli.run(["pair", "--code", CODE, "192.0.2.7:37123"]) == 2

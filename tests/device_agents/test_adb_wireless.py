"""Phones without a cable are there when their shell answers, and paired when the server says so."""

from __future__ import annotations

from pathlib import Path

import pytest

from device_agents.adb.connection import AdbServer
from device_agents.adb.wireless import Connected, connect, pair
from device_agents.deadline import Deadline
from device_agents.errors import AdbFailure, DeadlineExceeded, DeviceUnreachable, Unauthorized
from tests.device_agents.adb_fixtures import adb, add_command, commands
from tests.device_agents.fake_adb import ADDRESS, SERIAL, FakeAdb

__all__ = ["adb", "commands"]  # fixtures


@pytest.fixture
def server(adb: FakeAdb) -> AdbServer:
    return AdbServer(adb.port, start=False)


def test_a_phone_whose_shell_answers_is_connected(adb: FakeAdb, server: AdbServer, commands: Path) -> None:
    add_command(commands, "getprop", 'echo "Pixel 8"')
    assert connect(server, "127.0.0.1", Deadline(20)) == Connected(ADDRESS, "Pixel 8")
    assert f"host:connect:{ADDRESS}" in adb.requests


@pytest.mark.parametrize("state", ["offline", "absent"])
def test_the_word_of_connect_is_not_believed(adb: FakeAdb, server: AdbServer, state: str) -> None:
    adb.state, adb.connect_answer = state, f"already connected to {ADDRESS}"
    with pytest.raises(DeviceUnreachable, match=r"no shell answers.*adb said: already connected"):
        connect(server, ADDRESS, Deadline(0.5))


def test_a_phone_that_does_not_trust_us_says_so(adb: FakeAdb, server: AdbServer) -> None:
    adb.state = "unauthorized"
    with pytest.raises(Unauthorized, match="accept this computer's key"):
        connect(server, ADDRESS, Deadline(20))


def test_a_frozen_phone_is_given_up(adb: FakeAdb, server: AdbServer) -> None:
    adb.frozen.set()
    with pytest.raises(DeadlineExceeded):
        connect(server, ADDRESS, Deadline(0.3))
    adb.frozen.clear()


@pytest.mark.parametrize("version", [30, 34])
def test_the_right_code_pairs(adb: FakeAdb, server: AdbServer, version: int) -> None:
    adb.version = version
    assert pair(server, "192.0.2.7:37123", "123456", Deadline(20)) == f"adb-{SERIAL}"
    assert adb.requests == ["host:pair:123456:192.0.2.7:37123"]


@pytest.mark.parametrize("version", [30, 34])
def test_a_wrong_code_is_an_error_that_does_not_tell_it(
    adb: FakeAdb, server: AdbServer, version: int
) -> None:
    adb.version = version
    with pytest.raises(AdbFailure, match="was not paired: Failed: Wrong password") as found:
        pair(server, "192.0.2.7:37123", "654321", Deadline(20))
    assert "654321" not in str(found.value)


def test_no_error_tells_the_code() -> None:
    with pytest.raises(AdbFailure, match="no adb server") as found:
        pair(AdbServer(1, start=False), "192.0.2.7:37123", "654321", Deadline(20))
    assert "654321" not in str(found.value)


@pytest.mark.parametrize("address", ["", "192.0.2.7:", "192.0.2.7:x", "a b:5", ":5", "h:70000", "[::1]"])
def test_what_is_no_address_is_refused(server: AdbServer, adb: FakeAdb, address: str) -> None:
    with pytest.raises(AdbFailure, match="sought an address such as"):
        pair(server, address, "123456", Deadline(20))
    assert adb.requests == []


@pytest.mark.parametrize("code", ["", "12 34", "1:192.0.2.9"])
def test_what_is_no_code_is_refused(server: AdbServer, adb: FakeAdb, code: str) -> None:
    with pytest.raises(AdbFailure, match="sought the pairing code"):
        pair(server, "192.0.2.7:37123", code, Deadline(20))
    assert adb.requests == []

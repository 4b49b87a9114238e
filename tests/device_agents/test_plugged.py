"""Phones that come and go at the adb server are noticed as it tells it, and a server that goes is too."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from device_agents.adb.connection import AdbServer
from device_agents.adb.plugged import Plugged, parse_devices
from device_agents.deadline import Deadline
from tests.device_agents.adb_fixtures import adb, commands
from tests.device_agents.conftest import wait_for
from tests.device_agents.fake_adb import SERIAL, FakeAdb

__all__ = ["adb", "commands"]  # fixtures


@pytest.fixture
def plugged(adb: FakeAdb) -> Iterator[Plugged]:
    found = Plugged(AdbServer(adb.port))
    found.start()
    yield found
    found.stop()


def test_what_comes_and_goes_is_told_at_once(adb: FakeAdb, plugged: Plugged) -> None:
    assert plugged.wait({}, Deadline(5)) == {SERIAL: "device"}
    adb.state = "absent"
    assert plugged.wait({SERIAL: "device"}, Deadline(5)) == {}
    adb.state = "unauthorized"
    assert plugged.wait({}, Deadline(5)) == {SERIAL: "unauthorized"}
    assert plugged.now() == ({SERIAL: "unauthorized"}, "")
    assert adb.requests == ["host:track-devices"], "it is told, and does not ask again"


def test_a_server_that_goes_away_has_no_phones_until_it_is_back(adb: FakeAdb, plugged: Plugged) -> None:
    assert plugged.wait({}, Deadline(5)) == {SERIAL: "device"}
    adb.hang_up()
    assert plugged.wait({SERIAL: "device"}, Deadline(5)) == {}
    assert "ended" in plugged.now()[1]
    assert plugged.wait({}, Deadline(5)) == {SERIAL: "device"}


def test_where_no_server_is_none_is_started_and_it_is_told() -> None:
    plugged = Plugged(AdbServer(1))
    plugged.start()
    wait_for(lambda: "no adb server at port 1" in plugged.now()[1])
    plugged.stop()


def test_what_a_server_says_is_read_with_care() -> None:
    assert parse_devices("A\tdevice\n\n\tx\nno tab\n B \t offline ") == {"A": "device", "B": "offline"}
    assert len(parse_devices("".join(f"{number}\tdevice\n" for number in range(100_000)))) == 256

"""What the actor on a lab host does with its agent; here without Ray."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

import kvengine
from device_agents.config import DeviceConfig
from device_agents.errors import InfrastructureError, NoSuchDevice
from harness.lab import LabActor

ONE, TWO = DeviceConfig("one"), DeviceConfig("two")


@pytest.fixture
def actor(tmp_path: Path) -> Iterator[LabActor]:
    actor = LabActor()
    assert actor.start(tmp_path, (ONE,)).value == kvengine.__version__
    yield actor
    actor.stop(even_if_leased=True)


def test_errors_travel_as_values(actor: LabActor) -> None:
    answer = actor.call("acquire", ("pixel8", "me", 30.0))
    assert isinstance(answer.error, NoSuchDevice)
    assert actor.call("acquire", ("one", "me", 30.0)).value.device == "one"


def test_starting_again_with_the_same_devices_joins(actor: LabActor, tmp_path: Path) -> None:
    actor.call("acquire", ("one", "me", 30.0))
    assert actor.start(tmp_path, (ONE,)).error is None
    assert len(actor.call("leases", ()).value) == 1


def test_an_idle_agent_gives_way_to_another_farm_toml(actor: LabActor, tmp_path: Path) -> None:
    assert actor.start(tmp_path, (ONE, TWO)).error is None
    assert actor.call("acquire", ("two", "me", 30.0)).error is None


def test_an_agent_in_use_does_not(actor: LabActor, tmp_path: Path) -> None:
    actor.call("acquire", ("one", "me", 30.0))
    answer = actor.start(tmp_path, (DeviceConfig("one", threads=3),))
    assert isinstance(answer.error, InfrastructureError)
    assert "describes device 'one' otherwise" in str(answer.error)
    assert len(actor.call("leases", ()).value) == 1


def test_it_stops_with_its_last_user(actor: LabActor) -> None:
    lease = actor.call("acquire", ("one", "me", 30.0)).value
    assert actor.stop(even_if_leased=False).value is False
    assert not actor.call("leases", ()).ended
    actor.call("release", ("one", lease.token))
    assert actor.stop(even_if_leased=False).value is True
    assert actor.call("leases", ()).ended


def test_what_cannot_start_says_why(tmp_path: Path) -> None:
    answer = LabActor().start(tmp_path, (DeviceConfig("one", kind="toaster"),))
    assert "unknown kind 'toaster'" in str(answer.error)


def test_a_second_run_in_one_folder_has_an_agent_of_its_own_and_stands_in_line(
    actor: LabActor, tmp_path: Path
) -> None:
    lease = actor.call("acquire", ("one", "me", 30.0)).value
    second = LabActor()
    assert second.start(tmp_path, (ONE,)).error is None
    assert "one is leased to 'me'" in str(second.call("acquire", ("one", "you", 30.0)).error)
    actor.call("release", ("one", lease.token))
    assert second.call("acquire", ("one", "you", 30.0)).error is None
    assert actor.stop(even_if_leased=False).value is True  # what the other lends is not its concern
    second.stop(even_if_leased=True)


def test_another_client_s_devices_are_added_while_the_first_works(actor: LabActor, tmp_path: Path) -> None:
    actor.call("acquire", ("one", "me", 30.0))
    assert actor.start(tmp_path, (TWO,)).error is None
    assert actor.call("acquire", ("two", "you", 30.0)).error is None
    assert len(actor.call("leases", ()).value) == 2


def test_the_agent_of_a_lab_host_outlives_its_last_user_and_keeps_its_devices(tmp_path: Path) -> None:
    actor = LabActor()
    assert actor.start(tmp_path, (ONE,), own=True).error is None
    assert actor.start(tmp_path, (ONE,)).error is None
    assert actor.stop(even_if_leased=False).value is False
    assert not actor.call("leases", ()).ended
    other = actor.start(tmp_path, (DeviceConfig("one", threads=3),))
    assert "describes device 'one' otherwise" in str(other.error)
    assert actor.stop(even_if_leased=True).value is True

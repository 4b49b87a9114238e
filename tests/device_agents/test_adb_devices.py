"""What farm.toml may say of an android device, and what comes of it."""

from __future__ import annotations

from pathlib import Path

import pytest

from device_agents.adb.android import AndroidDevice
from device_agents.adb.devices import make_android
from device_agents.blobs import BlobStore
from device_agents.config import DeviceConfig
from device_agents.deadline import Deadline
from device_agents.errors import AdbFailure, NoSuchDevice, UnsupportedDevice
from device_agents.lab_agent import LabAgent, make_device
from tests.device_agents.adb_fixtures import PROPERTIES, adb, commands, set_properties
from tests.device_agents.fake_adb import SERIAL, FakeAdb

__all__ = ["adb", "commands"]  # fixtures


def android(adb: FakeAdb, tmp_path: Path, **options: str) -> AndroidDevice:
    options = {"adb_port": str(adb.port), "root": str(tmp_path / "phone"), **options}
    return make_android(DeviceConfig("pixel8", "android", options=options), tmp_path / "lab")


def test_a_device_is_found_by_its_serial(adb: FakeAdb, tmp_path: Path) -> None:
    assert android(adb, tmp_path, serial=SERIAL).facts(Deadline(20)).serial == SERIAL


def test_the_lab_agent_knows_android_devices(adb: FakeAdb, tmp_path: Path) -> None:
    config = DeviceConfig("pixel8", "android", options={"serial": SERIAL, "adb_port": str(adb.port)})
    device = make_device(config, BlobStore(tmp_path / "store"))
    assert isinstance(device, AndroidDevice)
    agent = LabAgent(tmp_path / "lab", [config], reap_every_s=None)
    assert agent.vitals("pixel8").mem_available_bytes
    agent.shutdown()


def test_an_absent_device_delays_no_other_and_says_why(adb: FakeAdb, tmp_path: Path) -> None:
    adb.state = "unauthorized"
    options = {"serial": SERIAL, "adb_port": str(adb.port)}
    agent = LabAgent(
        tmp_path / "lab", [DeviceConfig("pixel8", "android", options=options)], reap_every_s=None
    )
    (status,) = agent.status()
    assert status.identity is None
    assert "accept this computer's key" in status.error
    agent.shutdown()


def test_without_a_serial_the_known_ones_are_named(adb: FakeAdb, tmp_path: Path) -> None:
    with pytest.raises(AdbFailure, match=rf"'pixel8' has no serial.*adb knows {SERIAL}"):
        android(adb, tmp_path).facts(Deadline(20))


@pytest.mark.parametrize(
    "options",
    [
        {"seriel": "X"},
        {"serial": "X", "profile": "pixel-8"},
        {"serial": "X", "virtual": "true"},
        {"virtual": "yes"},
    ],
)
def test_options_that_make_no_sense_are_refused(options: dict[str, str], tmp_path: Path) -> None:
    with pytest.raises(NoSuchDevice, match="its options make no sense"):
        make_android(DeviceConfig("pixel8", "android", options=options), tmp_path)


def test_an_abi_without_a_bundle_is_unsupported(adb: FakeAdb, commands: Path, tmp_path: Path) -> None:
    set_properties(commands, {**PROPERTIES, "ro.product.cpu.abi": "armeabi-v7a"})
    with pytest.raises(UnsupportedDevice, match="sought a device of ABI arm64-v8a or x86_64, found armeabi"):
        android(adb, tmp_path, serial=SERIAL).identity(Deadline(20))

"""Each thing that can be wrong with a phone is one finding, with what to do; a healthy one has none."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from device_agents.adb.android import AndroidDevice
from device_agents.adb.connection import AdbServer
from device_agents.adb.diagnose import clock
from device_agents.adb.settings import JOURNAL
from device_agents.adb.transport import AdbTransport
from device_agents.api import Finding
from device_agents.bundle import Bundle
from device_agents.deadline import Deadline
from device_agents.errors import AdbFailure
from tests.device_agents.adb_fixtures import PROPERTIES, adb, add_command, commands, set_properties
from tests.device_agents.conftest import wait_for
from tests.device_agents.fake_adb import SERIAL, FakeAdb

__all__ = ["adb", "commands"]  # fixtures

BATTERY = """\
Current Battery Service state:
  AC powered: false
  USB powered: false
  Wireless powered: false
  status: 3
  present: true
  level: 72
  scale: 100
  voltage: 3912
  temperature: 284
  technology: Li-ion
"""
THERMAL = "IsStatusOverride: false\nThermalEventListeners:\nThermal Status: 0\nHAL Ready: true\n"


class Phone:
    """A healthy phone, which a test spoils. root: our folder on it."""

    def __init__(self, adb: FakeAdb, commands: Path, root: Path) -> None:
        self.adb, self.commands, self.root = adb, commands, root
        self.dumps(BATTERY, THERMAL)
        self.says("getenforce", "Permissive")
        self.free(20 << 20)

    def dumps(self, battery: str = BATTERY, thermal: str = THERMAL) -> None:
        (self.commands / "dump-battery").write_text(battery)
        (self.commands / "dump-thermalservice").write_text(thermal)
        add_command(self.commands, "dumpsys", f'cat "{self.commands}/dump-$1"')

    def says(self, command: str, words: str) -> None:
        add_command(self.commands, command, f"echo '{words}'")

    def free(self, kilobytes: int) -> None:
        self.says("df", f"/dev/block/dm-5 99999999 1 {kilobytes} 1% /data")

    def executes_nothing(self, selinux: str = "Permissive") -> None:
        add_command(self.commands, "chmod", "true")
        self.says("getenforce", selinux)

    def left_changed(self, journal: str) -> None:
        self.root.mkdir(parents=True)
        (self.root / JOURNAL).write_text(journal)

    def diagnose(self, reach_s: float = 0.2) -> dict[str, Finding]:
        transport = AdbTransport(AdbServer(self.adb.port, start=False), SERIAL, reach_s=reach_s)
        device = AndroidDevice("pixel8", lambda deadline: transport, no_bundle, root=str(self.root))
        return {finding.what: finding for finding in device.diagnose(Deadline(20))}


def no_bundle(abi: str) -> Bundle:
    raise AssertionError("a diagnosis brings no bundle")


@pytest.fixture
def phone(adb: FakeAdb, commands: Path, tmp_path: Path) -> Phone:
    return Phone(adb, commands, tmp_path / "data" / "kvfarm")


def test_a_healthy_phone_has_nothing_to_fix_and_keeps_nothing_of_it(phone: Phone) -> None:
    found = phone.diagnose()
    assert {f.what: f.state for f in found.values()} == dict.fromkeys(
        ("reachable", "ABI", "space", "executes", "battery", "thermal", "clock", "settings"), "ok"
    )
    assert list(phone.root.iterdir()) == []


def spoil_properties(phone: Phone, **changed: str) -> None:
    set_properties(phone.commands, PROPERTIES | changed)


SPOILS: dict[str, tuple[Callable[[Phone], object], str, str, str, str]] = {
    # what is wrong: the spoiler, then the finding: what, state, a word found, a word to do
    "unauthorized": (
        lambda p: setattr(p.adb, "state", "unauthorized"),
        *("authorized", "fix", "does not trust", "accept this computer's key"),
    ),
    "offline": (
        lambda p: setattr(p.adb, "state", "offline"),
        *("reachable", "fix", "device offline", "plug it in"),
    ),
    "absent": (
        lambda p: setattr(p.adb, "state", "absent"),
        *("reachable", "fix", f"device '{SERIAL}' not found", "kvfarm connect"),
    ),
    "too old": (
        lambda p: setattr(p.adb, "features", "cmd"),
        *("shell v2", "fix", "found cmd", "Android 7"),
    ),
    "wrong ABI": (
        lambda p: spoil_properties(p, **{"ro.product.cpu.abi": "armeabi-v7a"}),
        *("ABI", "fix", "armeabi-v7a", "arm64-v8a and x86_64"),
    ),
    "no Android": (
        lambda p: set_properties(p.commands, {}),
        *("ABI", "fix", "ro.product.cpu.abi", "ask again"),
    ),
    "too little space": (
        lambda p: p.free(300 << 10),
        *("space", "fix", "0.3 GiB", "free 1 GiB"),
    ),
    "no df": (
        lambda p: p.says("df", "nonsense"),
        *("space", "note", "says nothing", ""),
    ),
    "executes nothing": (
        lambda p: p.executes_nothing(),
        *("executes", "fix", "ermission denied; SELinux is permissive", "options.root"),
    ),
    "SELinux": (
        lambda p: p.executes_nothing("Enforcing"),
        *("executes", "fix", "SELinux is enforcing", "avc"),
    ),
    "cannot be written": (
        lambda p: p.root.parent.write_text("a file"),
        *("executes", "fix", "mkdir", "options.root"),
    ),
    "battery stopped": (
        lambda p: p.dumps(BATTERY.replace("state:", "state:\n  (UPDATES STOPPED -- use 'reset' to restart)")),
        *("battery", "fix", "UPDATES STOPPED", "dumpsys battery reset"),
    ),
    "charger cut": (
        lambda p: add_command(
            p.commands, "getprop", f"[ $# = 0 ] && cat {p.commands}/properties || echo true"
        ),
        *("battery", "note", "suspended", "unsupported"),
    ),
    "low battery": (
        lambda p: p.dumps(BATTERY.replace("level: 72", "level: 9")),
        *("battery", "fix", "9 %", "charge it"),
    ),
    "plugged in": (
        lambda p: p.dumps(BATTERY.replace("USB powered: false", "USB powered: true")),
        *("battery", "note", "plugged in", "unplug it"),
    ),
    "no battery": (
        lambda p: p.dumps(battery=""),
        *("battery", "note", "no charge", "unsupported"),
    ),
    "throttling": (
        lambda p: p.dumps(thermal=THERMAL.replace("Status: 0", "Status: 3")),
        *("thermal", "fix", "status 3", "cool down"),
    ),
    "thermal override": (
        lambda p: p.dumps(thermal=THERMAL.replace("Override: false", "Override: true")),
        *("thermal", "fix", "overridden", "thermalservice reset"),
    ),
    "no thermal status": (
        lambda p: p.dumps(thermal=""),
        *("thermal", "note", "no status", "sensors"),
    ),
    "clock behind": (
        lambda p: p.says("date", str(int(time.time()) - 3600)),
        *("clock", "note", "behind the lab host's", "automatic date"),
    ),
    "settings left": (
        lambda p: p.left_changed("stay_on 0\nbrightness 60\n"),
        *("settings", "note", "brightness, stay_on", "puts them back"),
    ),
}


@pytest.mark.parametrize("name", SPOILS)
def test_what_is_wrong_is_found_and_nothing_else(phone: Phone, name: str) -> None:
    spoil, what, state, found, do = SPOILS[name]
    spoil(phone)
    findings = phone.diagnose()
    assert [f.what for f in findings.values() if f.state != "ok"] == [what]
    assert findings[what].state == state
    assert found in findings[what].found
    assert do in findings[what].do


def test_a_folder_that_is_mounted_noexec_is_called_so(phone: Phone) -> None:
    mounts = "/dev/root / ext4 ro 0 0\ndm-5 /data f2fs rw,noexec 0 0\ndm-6 /data/local f2fs rw 0 0\n"
    add_command(phone.commands, "cat", f'[ "$1" = /proc/mounts ] && printf "{mounts}" || exec /bin/cat "$@"')
    phone.executes_nothing()
    assert "noexec" not in phone.diagnose()["executes"].found  # /data is not where our folder is
    add = mounts + f"dm-7 {phone.root.parent} f2fs rw,nosuid,noexec,relatime 0 0\n"
    add_command(phone.commands, "cat", f'[ "$1" = /proc/mounts ] && printf "{add}" || exec /bin/cat "$@"')
    assert f"{phone.root} is mounted noexec" in phone.diagnose()["executes"].found


def test_a_phone_that_dies_meanwhile_is_told_once(phone: Phone) -> None:
    add_command(phone.commands, "getprop", "sleep 60")

    def pull_the_plug() -> None:
        wait_for(lambda: any("getprop" in service for service in phone.adb.services))
        phone.adb.hang_up()

    plug = threading.Thread(target=pull_the_plug)
    plug.start()
    findings = phone.diagnose()
    plug.join()
    assert [f.what for f in findings.values()] == ["reachable", "ABI"]
    assert findings["ABI"].state == "fix"


def test_a_device_without_a_serial_is_told_what_to_write(phone: Phone) -> None:
    def attach(deadline: Deadline) -> AdbTransport:
        raise AdbFailure("device 'x' has no serial; add options to farm.toml")

    (finding,) = AndroidDevice("x", attach, no_bundle).diagnose(Deadline(5))
    assert finding == Finding("reachable", "fix", "device 'x' has no serial", "add options to farm.toml")


@pytest.mark.parametrize(
    ("said", "state"), [("1000", "ok"), ("1006", "note"), ("994", "ok"), ("993", "note"), ("noon", "note")]
)
def test_a_clock_of_whole_seconds_is_wrong_only_beyond_doubt(said: str, state: str) -> None:
    assert clock(said, 1000.0, 1000.5).state == state

"""Settings of a phone: read back, put back, also by the next user when the last one was killed."""

from __future__ import annotations

from pathlib import Path

import pytest

from device_agents.adb import settings as knobs
from device_agents.adb.connection import AdbServer
from device_agents.adb.transport import AdbTransport
from device_agents.config import DeviceSettings
from device_agents.deadline import Deadline
from device_agents.errors import SettingFailed
from tests.device_agents.adb_fixtures import adb, add_command, commands, phone
from tests.device_agents.fake_adb import FakeAdb

__all__ = ["adb", "commands", "phone"]  # fixtures

BEFORE = {
    "stay_on_while_plugged_in": "0",
    "screen_brightness_mode": "1",
    "screen_brightness": "102",
    "airplane_mode_on": "0",
}
ALL = DeviceSettings(fixed_performance=True, stay_on=True, airplane=True, brightness=60)


class Values:
    """What the fake phone's `settings` and `cmd` keep, a file each."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir()
        for key, value in {**BEFORE, "fixed": "false"}.items():
            (folder / key).write_text(f"{value}\n")

    def now(self) -> dict[str, str]:
        return {path.name: path.read_text().strip() for path in self.folder.iterdir()}


@pytest.fixture
def values(tmp_path: Path, commands: Path) -> Values:
    values = Values(tmp_path / "values")
    at = values.folder
    add_command(
        commands,
        "settings",
        f'case $1 in get) cat {at}/$3 2>/dev/null || echo null;; put) echo "$4" > {at}/$3;; '
        f"delete) rm -f {at}/$3;; esac",
    )
    add_command(
        commands,
        "cmd",
        f"case $3 in enable) echo 1 > {at}/airplane_mode_on;; disable) echo 0 > {at}/airplane_mode_on;; "
        f"*) echo $3 > {at}/fixed;; esac",
    )
    return values


@pytest.fixture
def root(tmp_path: Path) -> str:
    return str(tmp_path / "data local tmp" / "kvfarm")


def test_each_setting_is_put_read_back_and_put_back(phone: AdbTransport, values: Values, root: str) -> None:
    before = values.now()
    said = knobs.apply(phone, root, ALL, Deadline(20))
    assert values.now() == {
        "stay_on_while_plugged_in": "15",
        "screen_brightness_mode": "0",
        "screen_brightness": "60",
        "airplane_mode_on": "1",
        "fixed": "true",
    }
    assert said["brightness"] == "60"
    assert said["fixed_performance"].startswith("on, ")
    knobs.restore(phone, root, Deadline(20))
    assert values.now() == before
    assert knobs.left_changed(phone, root, Deadline(20)) == ""


def test_nothing_is_touched_that_was_not_asked_for(phone: AdbTransport, values: Values, root: str) -> None:
    assert knobs.apply(phone, root, DeviceSettings(), Deadline(20)) == {}
    assert knobs.apply(phone, root, DeviceSettings(stay_on=True), Deadline(20)) == {"stay_on": "15"}
    assert values.now() == {**BEFORE, "fixed": "false", "stay_on_while_plugged_in": "15"}


def test_the_next_user_puts_back_what_a_killed_one_left(
    phone: AdbTransport, values: Values, root: str
) -> None:
    before = values.now()
    knobs.apply(phone, root, ALL, Deadline(20))  # and then nothing: killed
    assert "screen" not in knobs.left_changed(phone, root, Deadline(20))
    assert "brightness 102" in knobs.left_changed(phone, root, Deadline(20))
    knobs.apply(phone, root, DeviceSettings(), Deadline(20))
    assert values.now() == before


def test_a_second_user_with_settings_does_not_take_the_firsts_for_the_phones_own(
    phone: AdbTransport, values: Values, root: str
) -> None:
    before = values.now()
    knobs.apply(phone, root, DeviceSettings(brightness=10), Deadline(20))
    knobs.apply(phone, root, DeviceSettings(brightness=200), Deadline(20))
    knobs.restore(phone, root, Deadline(20))
    assert values.now() == before


def test_a_key_that_was_never_put_is_deleted_again(phone: AdbTransport, values: Values, root: str) -> None:
    (values.folder / "stay_on_while_plugged_in").unlink()
    before = values.now()
    knobs.apply(phone, root, DeviceSettings(stay_on=True), Deadline(20))
    knobs.restore(phone, root, Deadline(20))
    assert values.now() == before


def test_a_refusal_leaves_nothing_changed(
    phone: AdbTransport, values: Values, commands: Path, root: str
) -> None:
    before = values.now()
    add_command(
        commands, "cmd", '[ "$3" = false ] || { echo Failed to set FIXED_PERFORMANCE mode >&2; exit 255; }'
    )
    with pytest.raises(SettingFailed, match=r"(?s)fixed_performance.*FIXED_PERFORMANCE.*farm\.toml"):
        knobs.apply(phone, root, DeviceSettings(fixed_performance=True, brightness=60), Deadline(20))
    assert values.now() == before
    assert knobs.left_changed(phone, root, Deadline(20)) == ""


def test_a_value_that_does_not_stick_is_found_out(
    phone: AdbTransport, values: Values, commands: Path, root: str
) -> None:
    add_command(commands, "settings", "[ $1 != get ] || echo 102")
    with pytest.raises(SettingFailed, match="sought brightness_mode 0, found 102"):
        knobs.apply(phone, root, DeviceSettings(brightness=60), Deadline(20))


def test_a_value_that_cannot_be_put_back_stays_in_the_journal(
    phone: AdbTransport, values: Values, commands: Path, root: str
) -> None:
    knobs.apply(phone, root, DeviceSettings(brightness=60), Deadline(20))
    add_command(commands, "settings", "[ $1 != get ] || echo 7")
    with pytest.raises(SettingFailed, match="put brightness back to 102, found 7"):
        knobs.restore(phone, root, Deadline(20))
    assert "brightness 102" in knobs.left_changed(phone, root, Deadline(20))


@pytest.mark.parametrize("hostile", ["1; reboot", "$(reboot)", "", "x" * 1000])
def test_what_a_phone_says_its_value_is_never_becomes_a_command(
    hostile: str, phone: AdbTransport, values: Values, root: str
) -> None:
    (values.folder / "screen_brightness").write_text(hostile)
    with pytest.raises(SettingFailed, match="present value of brightness"):
        knobs.apply(phone, root, DeviceSettings(brightness=60), Deadline(20))
    assert values.now()["screen_brightness"] == hostile


def test_airplane_mode_is_refused_where_it_would_cut_our_own_link(adb: FakeAdb) -> None:
    wireless = AdbTransport(AdbServer(adb.port, start=False), "192.0.2.7:5555", reach_s=0.2)
    with pytest.raises(SettingFailed, match="attach it by USB"):
        knobs.apply(wireless, "/data/local/tmp/kvfarm", DeviceSettings(airplane=True), Deadline(5))

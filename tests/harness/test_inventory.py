"""farm.toml says which devices there are; without it there is this host."""

from __future__ import annotations

from pathlib import Path

import pytest

from harness import inventory
from harness.errors import InventoryError
from harness.inventory import FOREIGN_EFFORT, DeviceEntry, LabEntry, load, select

FARM = """
[devices.host]
threads = 2
[devices.pixel8]
kind = "android"
lab = "rack1"
options = { serial = "X1" }
[devices.mi6]
kind = "android"
[labs.rack1]
node = "192.0.2.10"
[pools]
phones = ["mi6", "pixel8"]
mixed = ["host", "virtual:1:galaxy-s24"]
"""


@pytest.fixture
def farm_toml(tmp_path: Path) -> Path:
    path = tmp_path / "farm.toml"
    path.write_text(FARM)
    return path


def test_a_file_is_read(farm_toml: Path) -> None:
    found = load(farm_toml)
    assert found.devices["host"] == DeviceEntry(threads=2)
    assert found.devices["pixel8"] == DeviceEntry("android", "rack1", options={"serial": "X1"})
    assert found.labs == {"rack1": LabEntry("192.0.2.10")}


def test_without_a_file_there_is_this_host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert load() == inventory.DEFAULT
    assert select("farm", load()) == select("host", load()) == ("host",)


def test_the_file_in_the_current_folder_is_found(farm_toml: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(farm_toml.parent)
    assert load() == load(farm_toml)


@pytest.mark.parametrize(
    ("expression", "names"),
    [
        ("host", ("host",)),
        ("farm", ("host", "pixel8", "mi6")),
        ("phones", ("mi6", "pixel8")),
        ("pixel8, host", ("pixel8", "host")),
        ("mi6,phones,mi6", ("mi6", "pixel8")),
        ("virtual:2,host", ("virtual-1", "virtual-2", "host")),
        ("virtual:1:arm64-v8a,virtual:1", ("virtual-arm64-v8a-1", "virtual-1")),
        ("virtual-2,virtual:2", ("virtual-2", "virtual-1")),
        ("mixed", ("host", "virtual-galaxy-s24-1")),
    ],
)
def test_selecting(expression: str, names: tuple[str, ...], farm_toml: Path) -> None:
    assert select(expression, load(farm_toml)) == names


@pytest.mark.parametrize("expression", ["pixel9", "host,pixel9"])
def test_an_unknown_name_is_refused_with_those_there_are(expression: str, farm_toml: Path) -> None:
    with pytest.raises(InventoryError, match=r"'pixel9'; there are host, pixel8, mi6, phones, mixed, farm"):
        select(expression, load(farm_toml))


@pytest.mark.parametrize(
    ("expression", "options"),
    [
        ("virtual:1", {"virtual": "true"}),
        ("virtual:1:arm64-v8a", {"virtual": "true", "abi": "arm64-v8a"}),
        ("virtual:1:pixel-8", {"virtual": "true", "profile": "pixel-8"}),
        ("virtual:1:x86_64:pixel-8", {"virtual": "true", "abi": "x86_64", "profile": "pixel-8"}),
    ],
)
def test_a_virtual_phone_is_known_by_its_name_alone(expression: str, options: dict[str, str]) -> None:
    (name,) = select(expression, inventory.DEFAULT)
    assert inventory.DEFAULT.device(name) == DeviceEntry("android", options=options)


def test_a_listed_device_goes_before_a_virtual_one_of_its_name(tmp_path: Path) -> None:
    (tmp_path / "farm.toml").write_text("[devices.virtual-1]")
    known = load(tmp_path / "farm.toml")
    assert known.device("virtual-1").kind == "host"


@pytest.mark.parametrize(
    "expression",
    ["virtual:0", "virtual:65", "virtual:", "virtual:x", "virtual:1:sparc", "virtual:1:pixel-8:x86_64"],
)
def test_a_wrong_number_or_kind_of_virtual_phones_is_refused(expression: str) -> None:
    with pytest.raises(InventoryError, match=r"sought virtual:N.*pixel-8"):
        select(expression, inventory.DEFAULT)


@pytest.mark.parametrize("name", ["virtual", "virtual-", "virtual-sparc-1", "-1", "virtual-x"])
def test_a_name_that_is_no_virtual_phones_is_unknown(name: str) -> None:
    with pytest.raises(InventoryError, match=r"virtual:N \(virtual phones\)"):
        inventory.DEFAULT.device(name)


@pytest.mark.parametrize("expression", ["", " , "])
def test_selecting_nothing_is_refused(expression: str, farm_toml: Path) -> None:
    with pytest.raises(InventoryError, match="no device in"):
        select(expression, load(farm_toml))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[devices.host]\nthread = 2", "unknown key 'thread'"),
        ("[devices.host]\nkind = 'toaster'", "'toaster'"),
        ("[devices.host]\nthreads = '2'", "sought int, found str"),
        ("[devices.host]\nthreads = 0", "at least 1"),
        ("[devices.host]\nlab = 'rack9'", "at lab 'rack9'; there are: none"),
        ("[devices.host]\n[pools]\np = ['mi6']", "names device 'mi6'"),
        ("[devices.host]\n[pools]\np = ['virtual:0']", "sought virtual:N"),
        ("[devices.'a:b']", "'a:b' cannot name a device"),
        ("[devices.host]\n[pools]\nhost = ['host']", "pool 'host'"),
        ("[devices.farm]", "'farm' cannot name a device"),
        ("[devices.host]\npower_cycle = ['uhubctl']", "only real phones are power-cycled"),
        ("[devices.a]\nkind = 'android'\npower_cycle = 'uhubctl -a 2'", "sought list, found str"),
        ("[devices.a]\nkind = 'android'\npower_cycle = ['']", "sought a program and its arguments"),
        ("[devices.host]\n[limits]\npower_cycles_per_day = -1", "sought power_cycles_per_day of 0 or more"),
        ("[devices.host]\n[limits]\nlongest_lease_s = 5.0", "sought longest_lease_s from 60"),
        ("[devices.host]\n[labs.local]\nnode = 'x'", "sought a lab host other than 'local'"),
        (
            "[devices.a]\nkind = 'android'\noptions = { serial = 'X' }\n"
            "[devices.b]\nkind = 'android'\noptions = { serial = 'X' }",
            "a and b are one phone, serial X",
        ),
        ("[pools]", "lists no device"),
        ("devices = [", "is not an inventory"),
    ],
)
def test_a_wrong_file_is_refused(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "farm.toml"
    path.write_text(text)
    with pytest.raises(InventoryError, match=message.replace("(", r"\(")):
        load(path)


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InventoryError, match="No such file"):
        load(tmp_path / "lab.toml")


@pytest.mark.parametrize(
    ("device", "effort"),
    [
        ("virtual-1", 1.0),
        ("virtual-x86_64-1", 1.0),
        ("virtual-arm64-v8a-1", FOREIGN_EFFORT),
        ("virtual-arm64-v8a-galaxy-s24-1", FOREIGN_EFFORT),
        ("host", 1.0),
    ],
)
def test_an_emulated_phone_gets_a_smaller_share(
    device: str, effort: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inventory, "native_abi", lambda: "x86_64")
    assert inventory.effort_of(inventory.DEFAULT.device(device)) == effort


def test_recipes_of_a_device_are_patterns(farm_toml: Path) -> None:
    farm_toml.write_text('[devices.old]\nrecipes = ["hybrid*", "int4"]\n[devices.new]\n')
    old, new = (load(farm_toml).device(name) for name in ("old", "new"))
    asked = ("naive", "hybrid", "hybrid-int8kv", "int4", "int4-b128")
    assert [name for name in asked if old.wants(name)] == ["hybrid", "hybrid-int8kv", "int4"]
    assert all(new.wants(name) for name in asked)


def test_effort_is_read_and_bounded(farm_toml: Path) -> None:
    farm_toml.write_text("[devices.old]\neffort = 0.5\n")
    assert inventory.effort_of(load(farm_toml).device("old")) == 0.5
    for wrong in ("0", "-1", "1.5"):
        farm_toml.write_text(f"[devices.old]\neffort = {wrong}\n")
        with pytest.raises(InventoryError, match=r"effort above 0, up to 1"):
            load(farm_toml)


def test_a_share_is_never_nothing() -> None:
    assert [inventory.share(count, 0.12, 1) for count in (1, 3, 25, 100)] == [1, 1, 3, 12]
    assert [inventory.share(count, 0.12, 2) for count in (1, 2, 5, 50)] == [1, 2, 2, 6]
    assert inventory.share(25, 1.0, 1) == 25


def test_owners_power_and_limits_are_read(tmp_path: Path) -> None:
    path = tmp_path / "farm.toml"
    path.write_text(
        """
        [devices.a]
        kind = "android"
        lab = "rack1"
        options = { serial = "X" }
        power_cycle = ["uhubctl", "--ports", "2"]
        [devices.b]
        lab = "rack1"
        owner = "bob"
        [labs.rack1]
        node = "rack1"
        owner = "ann"
        [limits]
        power_cycles_per_day = 1
        """
    )
    known = load(path)
    assert (known.owner("a"), known.owner("b")) == ("ann", "bob")
    config = known.config("a")
    assert (config.power_cycle, config.power_cycles_per_day) == (("uhubctl", "--ports", "2"), 1)
    assert known.limits.longest_lease_s == 24 * 3600


def test_the_same_serial_at_two_hosts_is_two_phones(tmp_path: Path) -> None:
    path = tmp_path / "farm.toml"
    one = "[devices.{}]\nkind = 'android'\nlab = '{}'\noptions = {{ serial = 'emulator-5554' }}\n"
    labs = "[labs.l1]\nnode = 'l1'\n[labs.l2]\nnode = 'l2'\n"
    path.write_text(one.format("a", "l1") + one.format("b", "l2") + labs)
    assert set(load(path).devices) == {"a", "b"}

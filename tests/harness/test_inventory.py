"""farm.toml says which devices there are; without it there is this host."""

from __future__ import annotations

from pathlib import Path

import pytest

from harness import inventory
from harness.errors import InventoryError
from harness.inventory import DeviceEntry, LabEntry, load, select

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
    ],
)
def test_selecting(expression: str, names: tuple[str, ...], farm_toml: Path) -> None:
    assert select(expression, load(farm_toml)) == names


@pytest.mark.parametrize("expression", ["pixel9", "host,pixel9"])
def test_an_unknown_name_is_refused_with_those_there_are(expression: str, farm_toml: Path) -> None:
    with pytest.raises(InventoryError, match=r"'pixel9'; there are host, pixel8, mi6, phones, farm"):
        select(expression, load(farm_toml))


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
        ("[devices.host]\n[pools]\nhost = ['host']", "pool 'host'"),
        ("[devices.farm]", "'farm' cannot name a device"),
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

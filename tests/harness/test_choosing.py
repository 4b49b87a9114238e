"""Which devices --devices means, and why the others are not among them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from device_agents.adb.plugged import parse_devices
from device_agents.api import DeviceIdentity
from device_agents.lab_types import DeviceStatus, Lease
from harness import discovery
from harness.choosing import read, what_is_known
from harness.discovery import Found, PassedOver, find
from harness.errors import InventoryError
from harness.inventory import DEFAULT, DeviceEntry, Inventory, load
from tests.device_agents.fake_adb import SERIAL, FakeAdb

FARM = Inventory(
    devices={
        "host": DeviceEntry(),
        "pixel8": DeviceEntry("android", "local", options={"serial": "X1"}),
        "mi6": DeviceEntry("android", options={"serial": "X2"}),
    },
    pools={"release": ("pixel8", "virtual:1"), "old": ("mi6",)},
)


def nobody(known: Inventory, start: bool) -> Found:
    raise AssertionError("adb was asked")


def identity(name: str, ram_gib: float = 8, abi: str = "arm64-v8a") -> DeviceIdentity:
    return DeviceIdentity(
        name=name,
        kind="android",
        model="Google Pixel 8",
        soc="",
        abi=abi,
        os="Android 15 (API 35)",
        build="b",
        cores=8,
        ram_bytes=int(ram_gib * 2**30),
        providers=("CPUExecutionProvider", "NnapiExecutionProvider"),
        runtime={"onnxruntime": "1.32.0"},
        api_level=35,
    )


def status(
    name: str, ram_gib: float = 8, error: str = "", holder: str = "", quarantined: str = ""
) -> DeviceStatus:
    lease = Lease(name, holder, 1) if holder else None
    who = None if error else identity(name, ram_gib)
    return DeviceStatus(name, "android", who, error, lease, quarantined)


def test_names_ask_neither_devices_nor_adb() -> None:
    meant = read("host,old,virtual:1", FARM, nobody)
    assert (meant.names, meant.condition, meant.passed_over) == (("host", "mi6", "virtual-1"), None, ())


def test_a_condition_asks_only_devices_that_farm_toml_does_not_rule_out() -> None:
    meant = read("kind==android and ram>=8GiB", FARM, nobody)
    assert meant.names == ("pixel8", "mi6")
    assert meant.passed_over == (PassedOver("host", "kind==android is false: host"),)


def test_a_condition_on_pools_looks_at_all_that_pools_name() -> None:
    assert read("pool==release", FARM, nobody).names == ("pixel8", "virtual-1")
    assert read("cores>=1", FARM, nobody).names == ("host", "pixel8", "mi6")


def test_those_that_satisfy_the_condition_are_chosen_and_the_others_say_why() -> None:
    meant = read("kind==android and ram>=8GiB", FARM, nobody)
    choice = meant.choose([status("pixel8", 8), status("mi6", 5.6)])
    assert choice.names == ("pixel8",)
    assert [each.name for each in choice.passed_over] == ["host", "mi6"]
    assert choice.passed_over[1].reason == "ram>=8GiB is false: 5.6 GiB"


def test_silent_and_quarantined_devices_are_not_chosen_and_named() -> None:
    meant = read("kind==android and ram>=1GiB", FARM, nobody)
    with pytest.raises(InventoryError) as found:
        meant.choose([status("pixel8", error="unplugged"), status("mi6", quarantined="by ann: swollen")])
    assert str(found.value).splitlines() == [
        "no device for 'kind==android and ram>=1GiB':",
        "  host: kind==android is false: host",
        "  pixel8: does not answer: unplugged",
        "  mi6: quarantined by ann: swollen",
    ]


def test_a_leased_device_is_chosen_only_where_none_is_free() -> None:
    meant = read("kind==android and ram>=1GiB", FARM, nobody)
    leased = status("mi6", holder="ann@lab")
    choice = meant.choose([status("pixel8"), leased])
    assert choice.names == ("pixel8",)
    assert choice.passed_over[-1] == PassedOver("mi6", "leased to ann@lab")
    assert meant.choose([status("pixel8", error="unplugged"), leased]).names == ("mi6",)


def test_what_no_device_can_be_is_an_error_before_any_is_asked() -> None:
    with pytest.raises(InventoryError, match=r"(?s)no device for.*host: lab==moon is false: local\n  pixel8"):
        read("lab==moon", FARM, nobody)


def test_every_field_is_known_of_a_device_that_answered() -> None:
    from harness.selection import FIELDS

    known = what_is_known("pixel8", FARM, identity("pixel8"))
    assert set(known) == set(FIELDS)
    assert known["provider"] == ("cpu", "nnapi")
    assert known["pool"] == ("release",)
    assert (known["soc"], known["serial"], known["numpy"]) == (None, None, None)


# -- phones that adb knows -----------------------------------------------------------------


def phones(*serials: str, unready: tuple[PassedOver, ...] = ()) -> Found:
    return Found({s: DeviceEntry("android", options={"serial": s}) for s in serials}, unready)


def test_adb_is_every_phone_that_adb_knows_and_may_start_a_server() -> None:
    asked = []

    def found(known: Inventory, start: bool) -> Found:
        asked.append(start)
        return phones("A", "B", unready=(PassedOver("C", "offline; plug it in again"),))

    meant = read("adb,host", FARM, found)
    assert meant.names == ("A", "B", "host")
    assert meant.inventory.device("A").options == {"serial": "A"}
    assert meant.passed_over == (PassedOver("C", "offline; plug it in again"),)
    assert asked == [True]


def test_adb_without_a_phone_says_why() -> None:
    unready = (PassedOver("C", "unauthorized; unlock it and accept this computer's key"),)
    with pytest.raises(InventoryError, match="C: unauthorized; unlock it"):
        read("adb", FARM, lambda known, start: phones(unready=unready))
    with pytest.raises(InventoryError, match="adb: knows no phone; plug one in"):
        read("adb", FARM, lambda known, start: phones())


@pytest.mark.parametrize("text", ["farm", "cores>=1"])
def test_without_a_farm_toml_the_farm_is_the_host_and_the_phones_of_a_running_server(text: str) -> None:
    def found(known: Inventory, start: bool) -> Found:
        assert not start
        return phones("A")

    assert read(text, DEFAULT, found).names == ("host", "A")
    assert read("host", DEFAULT, nobody).names == ("host",)


def test_with_a_farm_toml_the_farm_is_what_it_lists(tmp_path: Path) -> None:
    (tmp_path / "farm.toml").write_text("[devices.host]")
    assert read("farm", load(tmp_path / "farm.toml"), nobody).names == ("host",)


@pytest.mark.parametrize(
    "text", ["[devices.adb]", "[devices.'a=b']", "[devices.host]\n[pools]\nadb=['host']"]
)
def test_names_that_mean_something_else_are_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "farm.toml").write_text(text)
    with pytest.raises(InventoryError, match="'adb'"):
        load(tmp_path / "farm.toml")


@pytest.fixture
def adb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeAdb]:
    with FakeAdb(tmp_path) as server:
        monkeypatch.setenv("ANDROID_ADB_SERVER_PORT", str(server.port))
        yield server


def test_a_phone_in_state_device_is_found(adb: FakeAdb) -> None:
    options = {"serial": SERIAL, "adb_port": str(adb.port)}
    assert find(DEFAULT, start=False) == Found({SERIAL: DeviceEntry("android", options=options)})


def test_a_listed_phone_keeps_its_name(adb: FakeAdb) -> None:
    entry = DeviceEntry("android", options={"serial": SERIAL, "root": "/data/local/tmp/mine"})
    assert find(Inventory({"pixel8": entry}), start=False).phones == {"pixel8": entry}


@pytest.mark.parametrize(
    ("state", "words"),
    [
        ("unauthorized", "accept this computer's key"),
        ("offline", "plug it in again"),
        ("no permissions; see the udev rules", "add udev rules"),
        ("bootloader", "start Android"),
        ("wobbly", "see `adb devices`"),
    ],
)
def test_a_phone_in_any_other_state_is_named_with_what_to_do(adb: FakeAdb, state: str, words: str) -> None:
    adb.state = state
    found = find(DEFAULT, start=False)
    assert found.phones == {}
    ((name, reason),) = [(each.name, each.reason) for each in found.unready]
    assert name == SERIAL
    assert reason.startswith(f"{state}; ")
    assert words in reason


def test_no_server_is_started_for_farm_and_none_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ANDROID_ADB_SERVER_PORT", "1")
    monkeypatch.setattr("device_agents.adb.connection.subprocess.run", nobody)
    assert find(DEFAULT, start=False) == Found({})


def test_a_server_that_hangs_is_named_and_stops_nothing(
    adb: FakeAdb, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(discovery, "_ASK_S", 0.2)
    adb.frozen.set()
    found = find(DEFAULT, start=False)
    adb.frozen.clear()
    assert [each.name for each in found.unready] == ["adb"]
    assert "no answer within" in found.unready[0].reason


def test_serials_become_names_that_do_not_clash(adb: FakeAdb, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = "192.0.2.7:5555\tdevice\n192.0.2.7-5555\tdevice\nhost\tdevice\n(::)\tdevice\nrubbish\n"
    monkeypatch.setattr("device_agents.adb.connection.AdbServer.query", lambda *_: lines)
    named = {name: entry.options["serial"] for name, entry in find(DEFAULT, start=False).phones.items()}
    assert named == {
        "192.0.2.7-5555": "192.0.2.7:5555",
        "192.0.2.7-5555-2": "192.0.2.7-5555",
        "host-2": "host",
        "phone": "(::)",
    }


def test_a_device_list_is_read() -> None:
    assert parse_devices("A\tdevice\nB\tno permissions (x); see [y]\n\n") == {
        "A": "device",
        "B": "no permissions (x); see [y]",
    }

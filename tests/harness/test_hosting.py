"""What a lab host offers, tells and follows; here without Ray. (Really joined in tests/e2e/test_hosts.py.)"""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path

import pytest
from rich.text import Text

from device_agents.errors import InfrastructureError
from device_agents.lab_types import DeviceStatus
from harness.cli.hosts import _cells
from harness.errors import InventoryError, TooOpen, VersionMismatch
from harness.hosting.head import VERSIONS, Head, versions
from harness.hosting.node import Ports, check_interfaces
from harness.hosting.offer import Offer
from harness.hosting.records import HOSTS, Host, HostDevice, HostRecord, inventory_of
from harness.inventory import DeviceEntry, Inventory, LabEntry
from harness.plugging import overlay
from tests.harness.hosts import Store, head, record, store

__all__ = ["head", "store"]  # fixtures


FARM = """
[devices.pixel8]
kind = "android"
lab = "rack1"
options = { serial = "X1" }
[devices.board]
lab = "rack1"
owner = "bob"
[devices.mi6]
kind = "android"
lab = "rack2"
options = { serial = "X2" }
[labs.rack1]
node = "host-1"
owner = "ann"
[labs.rack2]
node = "rack2"
[pools]
phones = ["pixel8", "mi6"]
"""


# -- versions and what the head keeps -----------------------------------------------------------------


@pytest.mark.parametrize("what", ["ray", "python", "kvfarm"])
def test_another_version_is_refused_and_both_are_named(what: str, store: Store, head: Head) -> None:
    theirs = versions() | {what: "0.0.7"}
    metadata = {"ray_version": theirs["ray"], "python_version": theirs["python"]}
    store.kept[b"CLUSTER_METADATA"] = json.dumps(metadata).encode()
    head.put(VERSIONS, {"kvfarm": theirs["kvfarm"]})
    with pytest.raises(VersionMismatch, match=rf"{what} 0\.0\.7 at the head and .* here; "):
        head.check_versions()


def test_the_same_versions_and_a_head_that_tells_none_are_taken(store: Store, head: Head) -> None:
    head.check_versions()
    head.put(VERSIONS, versions())
    head.check_versions()


@pytest.mark.parametrize("said", [b"", b"{", b'{"name": 1}', b"[]", b'"' + b"x" * (2 << 20) + b'"', b"\xff"])
def test_what_a_hostile_neighbour_writes_is_no_record(said: bytes, store: Store, head: Head) -> None:
    store.kept[b"host/evil"] = said
    assert head.all(HostRecord, HOSTS) == {}


def test_a_record_of_any_size_is_not_read(store: Store, head: Head) -> None:
    head.put(f"{HOSTS}rack1", record("rack1", {}))
    assert set(head.all(HostRecord, HOSTS)) == {"rack1"}
    store.kept[b"host/rack1"] += b" " * (1 << 20)
    assert head.all(HostRecord, HOSTS) == {}


def test_a_head_that_is_away_is_an_infrastructure_error_of_one_line(store: Store, head: Head) -> None:
    store.away = True
    with pytest.raises(InfrastructureError, match=r"at 192\.0\.2\.1:6379 does not answer: no route$"):
        head.alive()


# -- where Ray listens ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("listen", "interfaces", "refused"),
    [
        ("127.0.0.1", {"eth0": ["192.0.2.5"]}, None),
        ("192.0.2.5", {"eth0": ["192.0.2.5", "fe80::1"]}, None),
        ("192.0.2.5", {"eth0": ["192.0.2.5"], "lan": ["172.17.0.1"]}, r"also on lan \(172\.17\.0\.1\)"),
        ("127.0.0.2", {"eth0": ["192.0.2.5"]}, "every interface for 127.0.0.2"),
    ],
)
def test_ray_listens_on_no_network_that_nobody_named(
    listen: str, interfaces: dict[str, list[str]], refused: str | None
) -> None:
    if refused is None:
        check_interfaces(listen, lambda: interfaces)
    else:
        with pytest.raises(TooOpen, match=refused):
            check_interfaces(listen, lambda: interfaces)


def test_an_address_of_another_machine_is_refused_with_ours() -> None:
    with pytest.raises(InfrastructureError, match=r"found 192\.0\.2\.9; it has 192\.0\.2\.5"):
        check_interfaces("192.0.2.9", lambda: {"eth0": ["192.0.2.5"]})


def test_ports_are_all_within_those_named() -> None:
    params = Ports.parse("20000-20099").params()
    assert set(params.values()) == {*range(20000, 20007), 20099}
    for text in ("", "20000", "20000-20010", "80-200", "65000-70000", "b-a", "20099-20000"):
        with pytest.raises(InfrastructureError, match="sought FIRST-LAST"):
            Ports.parse(text)


# -- what a host offers ---------------------------------------------------------------------------------


@pytest.fixture
def farm_toml(tmp_path: Path) -> str:
    path = tmp_path / "farm.toml"
    path.write_text(FARM)
    return str(path)


@pytest.mark.parametrize("name", ["rack1", "host-1"])
def test_a_host_offers_its_part_of_the_labs_farm_toml(name: str, farm_toml: str) -> None:
    offer = Offer.read(name, farm_toml, True)
    assert offer.names() == ("pixel8", "board")
    assert offer.pools() == {"phones": ("pixel8",)}
    found = offer.devices({"X1": "offline", "STRAY": "device"}, {"board": "eve"})
    assert {name: each.state for name, each in found.items()} == {
        "pixel8": "offline",
        "board": "leased to eve",
        "STRAY": "not in farm.toml (device)",
    }
    assert (found["pixel8"].entry.owner, found["board"].entry.owner) == ("ann", "bob")
    assert offer.adopt({"STRAY": "device"}) == (), "what farm.toml does not list is not lent"
    assert offer.devices({}, {})["pixel8"].state == "unplugged"


def test_a_host_that_farm_toml_does_not_know_is_refused(farm_toml: str) -> None:
    with pytest.raises(InventoryError, match=r"name or node 'rack9', found rack1, rack2"):
        Offer.read("rack9", farm_toml, True)


def test_without_farm_toml_it_offers_itself_and_each_phone_that_comes() -> None:
    offer = Offer.read("lab7", "", True)
    assert offer.names() == ("lab7",)
    assert offer.adopt({"A": "unauthorized"}) == ()
    (config,) = offer.adopt({"A": "device"})
    assert (config.name, config.kind, config.options) == ("A", "android", {"serial": "A"})
    assert offer.adopt({"A": "device"}) == (), "once"
    assert [each.name for each in offer.configs()] == ["lab7", "A"]
    assert set(offer.devices({"A": "device"}, {})) == {"lab7", "A"}
    assert set(offer.devices({}, {})) == {"lab7"}, "it went"


def test_what_all_hosts_offer_is_one_inventory() -> None:
    a = HostDevice(DeviceEntry(lab="rack1"))
    b = HostDevice(DeviceEntry("android", lab="rack2", options={"serial": "B"}), "device")
    stray = replace(b, listed=False)
    both = (
        Host(record("rack1", {"a": a}, pools={"all": ("a",)}), True),
        Host(record("rack2", {"b": b, "stray": stray}, pools={"all": ("b",)}), True),
        Host(record("rack3", {"c": a}), False),
    )
    known = inventory_of(both)
    assert known.devices == {"a": a.entry, "b": b.entry}
    assert known.labs == {"rack1": LabEntry("rack1"), "rack2": LabEntry("rack2")}
    assert known.pools == {"all": ("a", "b"), "rack1": ("a",), "rack2": ("b",)}


def test_how_a_host_is() -> None:
    well = record("rack1", {})
    late = replace(well, seen=time.time() - 60)
    found = [Host(well, True), Host(replace(well, drained="by ann: hub"), True), Host(late, True)]
    assert [host.state for host in found] == ["ready", "drained", "late"]
    assert Host(well, False).state == "lost"


def test_what_hosts_say_commands_no_terminal() -> None:
    evil = "[red]\x1b]0;owned\x07[/]"
    hostile = record(
        "rack1", {evil: HostDevice(DeviceEntry(), holder=evil)}, drained=evil, owner=evil, adb=evil
    )
    cells = "".join(_cells(Host(hostile, True)))
    assert "\x1b" not in cells
    assert Text.from_markup(cells).plain.count("[red]") == 5


def test_phones_that_come_and_go_show_beside_what_agents_said() -> None:
    known = Inventory({"p": DeviceEntry("android", "rack1", options={"serial": "P"}), "h": DeviceEntry()})
    statuses = (DeviceStatus("p", "android", None), DeviceStatus("h", "host", None))
    assert overlay(statuses, known, {"rack1": {"P": "device"}}) == statuses
    gone = overlay(statuses, known, {"rack1": {"NEW": "device"}, "local": {}})
    assert [(each.name, each.error) for each in gone] == [
        ("p", "unplugged; adb does not know it"),
        ("h", ""),
        ("NEW", "new at rack1, not in this farm; adb says device"),
    ]
    assert overlay(statuses, known, {}) == statuses, "a host that cannot tell says nothing of its phones"

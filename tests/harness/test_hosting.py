"""What a lab host offers, tells and follows; here without Ray. (Really joined in tests/e2e/test_hosts.py.)"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
from rich.text import Text

from device_agents.adb.plugged import Plugged
from device_agents.errors import InfrastructureError
from device_agents.lab_types import DeviceStatus, Lease
from device_agents.leases import protocol
from device_agents.leases.ledger import Ledger
from device_agents.leases.model import Request
from harness.cli.hosts import _cells
from harness.errors import HostTaken, InventoryError, TooOpen, VersionMismatch
from harness.hosting import keeper as keeping
from harness.hosting import supervisor
from harness.hosting.head import VERSIONS, Head, versions
from harness.hosting.keeper import LEFT, LOST, REFUSED, Keeper, Lost, Options
from harness.hosting.node import Ports, RayNode, check_interfaces
from harness.hosting.offer import Offer
from harness.hosting.records import HOSTS, ORDERS, Host, HostDevice, HostRecord, Order, inventory_of
from harness.inventory import DeviceEntry, Inventory, LabEntry, Limits
from harness.lab import Lab, leases_folder
from harness.plugging import overlay
from harness.reaching import Address
from kvengine.codec import encode

ADDRESS = Address("192.0.2.1", 6379)
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


class Store:
    """Ray's store of keys, and its nodes, as far as Head uses them."""

    def __init__(self) -> None:
        self.kept: dict[bytes, bytes] = {}
        self.nodes = {"n1"}
        self.away = False

    def _answer(self) -> None:
        if self.away:
            raise RuntimeError("no route\nand a long tail")

    def internal_kv_get(self, key: bytes, *_: object) -> bytes | None:
        self._answer()
        return self.kept.get(key)

    def internal_kv_put(self, key: bytes, value: bytes, *_: object) -> None:
        self._answer()
        self.kept[key] = value

    def internal_kv_del(self, key: bytes, *_: object) -> None:
        self.kept.pop(key, None)

    def internal_kv_keys(self, prefix: bytes, *_: object) -> list[bytes]:
        self._answer()
        return [key for key in self.kept if key.startswith(prefix)]

    def get_all_node_info(self, *_: object) -> Mapping[Any, Any]:
        class Info:
            state = 0

        class Id(str):
            def hex(self) -> str:
                return self

        self._answer()
        return {Id(node): Info() for node in self.nodes}


@pytest.fixture
def store() -> Store:
    return Store()


@pytest.fixture
def head(store: Store) -> Head:
    return Head(ADDRESS, store)


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


def record(name: str, devices: dict[str, HostDevice], **more: Any) -> HostRecord:
    now = time.time()
    return HostRecord(name, "192.0.2.7", f"node of {name}", versions(), "Linux", now, now, devices, **more)


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


# -- one stay -------------------------------------------------------------------------------------------


class FakeNode:
    id = "n1"

    def __init__(self) -> None:
        self.ended: list[str] = []

    def dead(self) -> list[str]:
        return self.ended


class FakeLab:
    running = True

    def __init__(self) -> None:
        self.leases: tuple[Lease, ...] = ()
        self.added: list[str] = []

    def call(self, method: str, seconds: float, *arguments: Any) -> Any:
        if method == "add":
            self.added += [config.name for config in arguments[0]]
        return self.leases if method == "leases" else None


class FakePlugged:
    states: dict[str, str]

    def __init__(self) -> None:
        self.states = {}

    def now(self) -> tuple[dict[str, str], str]:
        return self.states, ""


class World:
    """A keeper, and all that it looks at."""

    def __init__(self, head: Head, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(keeping, "PUBLISH_S", 0.0)
        self.node, self.lab, self.plugged, self.head = FakeNode(), FakeLab(), FakePlugged(), head
        self.keeper = Keeper(
            Options("rack1", "192.0.2.1:6379", "192.0.2.7"),
            head,
            cast(RayNode, self.node),
            cast(Lab, self.lab),
            cast(Plugged, self.plugged),
        )
        self.ledger = Ledger(leases_folder())

    @property
    def told(self) -> HostRecord:
        found = self.head.get(HostRecord, f"{HOSTS}rack1")
        assert found is not None
        return found


@pytest.fixture
def world(head: Head, monkeypatch: pytest.MonkeyPatch) -> World:
    return World(head, monkeypatch)


def test_it_tells_who_has_what_and_what_is_plugged_in(world: World) -> None:
    world.keeper.turn()
    assert {name: each.state for name, each in world.told.devices.items()} == {"rack1": "free"}
    world.plugged.states = {"X9": "device"}
    world.lab.leases = (Lease("rack1", "ann@ci pid 7", 5),)
    world.keeper.turn()
    states = {name: each.state for name, each in world.told.devices.items()}
    assert states == {"rack1": "leased to ann@ci pid 7", "X9": "free"}
    assert world.lab.added == ["X9"], "its lab agent can lend it"
    world.plugged.states = {}
    world.keeper.turn()
    assert set(world.told.devices) == {"rack1"}


def test_an_order_to_drain_is_followed_once_and_undone(world: World) -> None:
    world.head.put(f"{ORDERS}rack1", Order(True, "ann", "new hub"))
    world.keeper.turn()
    assert world.told.drained == "by ann: new hub"
    world.ledger.act(protocol.drain("root", ""))  # on the host itself, later
    world.keeper.turn()
    assert world.told.drained == ""
    world.head.put(f"{ORDERS}rack1", Order(True, "bob", "again"))
    world.keeper.turn()
    world.head.put(f"{ORDERS}rack1", Order(False, "bob", ""))
    world.keeper.turn()
    assert world.told.drained == ""


def test_who_keeps_a_device_longer_than_the_host_lends_loses_it(world: World) -> None:
    world.ledger.act(protocol.ask(Request("1", "ann", "ann", ("rack1",)), world.ledger.rules, wait=False))
    world.keeper.turn()
    assert world.ledger.state()[0].held["rack1"].ended == ""
    inventory = Inventory({"rack1": DeviceEntry()}, limits=Limits(longest_lease_s=0.0))
    world.keeper._offer = Offer("rack1", inventory, adopts=False)
    world.keeper.turn()
    assert world.ledger.state()[0].held["rack1"].ended == "this lab host lends for 0 s at most"


def test_a_stay_is_over_when_the_node_died_or_the_head_forgot_it(world: World, store: Store) -> None:
    store.nodes = {"another"}
    with pytest.raises(Lost, match="takes this host for dead"):
        world.keeper.turn()
    world.node.ended = ["raylet"]
    with pytest.raises(Lost, match="raylet has ended"):
        world.keeper.turn()


def test_a_head_that_is_away_is_waited_for_and_another_in_its_place_is_joined_anew(
    world: World, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    def connect(text: str, what: str) -> Head:
        if store.away:
            raise InfrastructureError("nothing answers there")
        return Head(ADDRESS, other)

    other = Store()
    monkeypatch.setattr(keeping, "connect", connect)
    store.away = True
    world.keeper.turn()  # cut off for now
    monkeypatch.setattr(keeping, "connect", lambda text, what: Head(ADDRESS, other))
    world.keeper.turn()  # the same head, on another line
    assert other.kept == {}
    other.nodes = set()
    with pytest.raises(Lost):
        world.keeper.turn()


def test_a_head_that_is_away_for_long_ends_the_stay(
    world: World, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(keeping, "_SILENT_S", 0.0)
    store.away = True
    with pytest.raises(Lost, match="nothing from the head for"):
        world.keeper.turn()


def test_a_name_or_a_device_that_another_host_has_is_refused(world: World, store: Store) -> None:
    other = replace(record("rack1", {}), node="n2", address="192.0.2.8")
    world.head.put(f"{HOSTS}rack1", other)
    world.keeper.claim_name()  # its node is dead
    store.nodes = {"n1", "n2"}
    with pytest.raises(HostTaken, match=r"another lab host, at 192\.0\.2\.8, is called rack1"):
        world.keeper.claim_name()
    store.kept.clear()
    world.head.put(f"{HOSTS}rack2", replace(record("rack2", {"rack1": HostDevice(DeviceEntry())}), node="n2"))
    with pytest.raises(HostTaken, match="device rack1 is at lab host rack2 already"):
        world.keeper.claim_name()


# -- one stay after the other ---------------------------------------------------------------------------


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path


OPTIONS = Options("rack1", "192.0.2.1:6379", "192.0.2.7")


def stays(monkeypatch: pytest.MonkeyPatch, *codes: int) -> list[Options]:
    """Instead of real ones, each ends with the next code."""
    left, seen = list(codes), list[Options]()

    def stay(options: Options, stopped: threading.Event) -> int:
        seen.append(options)
        return left.pop(0)

    monkeypatch.setattr(supervisor, "_stay", stay)
    monkeypatch.setattr(supervisor, "_AGAIN_S", 0.0)
    monkeypatch.setattr(supervisor, "_LONGEST_AGAIN_S", 0.0)
    return seen


@pytest.mark.parametrize("last", [LEFT, REFUSED])
def test_it_joins_again_until_it_leaves_or_is_refused(
    last: int, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = stays(monkeypatch, LOST, LOST, last)
    assert supervisor.keep_joined(OPTIONS, threading.Event(), lambda said: None) == last
    assert seen == [OPTIONS] * 3


def test_a_machine_joins_once_under_a_name_and_is_found_by_it(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refused: list[Exception] = []

    def stay(options: Options, stopped: threading.Event) -> int:
        with pytest.raises(HostTaken, match="joined as rack1 already") as taken:
            supervisor.keep_joined(OPTIONS, stopped, lambda said: None)
        refused.append(taken.value)
        assert list(supervisor.joined()) == ["rack1"]
        return LEFT

    monkeypatch.setattr(supervisor, "_stay", stay)
    supervisor.keep_joined(OPTIONS, threading.Event(), lambda said: None)
    assert len(refused) == 1
    assert supervisor.joined() == {}


def test_a_real_stay_is_told_its_options_on_stdin_and_ends_when_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = tmp_path / "harness" / "hosting" / "keeper.py"
    script.parent.mkdir(parents=True)
    (tmp_path / "harness" / "__init__.py").touch()
    (script.parent / "__init__.py").touch()
    script.write_text(
        "import json, pathlib, signal, sys\n"
        "options = json.loads(sys.stdin.readline())\n"
        "signal.signal(signal.SIGTERM, lambda *_: sys.exit(7))\n"
        "pathlib.Path('told.json').write_text(json.dumps([options, sys.argv[1:]]))\n"
        "signal.pause()\n"
    )
    monkeypatch.chdir(tmp_path)
    stopped = threading.Event()
    codes: list[int] = []
    thread = threading.Thread(target=lambda: codes.append(supervisor._stay(OPTIONS, stopped)))
    thread.start()
    deadline = time.monotonic() + 30
    while not (tmp_path / "told.json").exists() and time.monotonic() < deadline:
        stopped.wait(0.02)
    stopped.set()
    thread.join(30)
    assert codes == [7]
    assert json.loads((tmp_path / "told.json").read_text()) == [encode(OPTIONS), []]

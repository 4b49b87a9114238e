"""One stay of a lab host in a cluster, and one after the other; here without Ray."""

from __future__ import annotations

import json
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest

from device_agents.adb.plugged import Plugged
from device_agents.errors import InfrastructureError
from device_agents.lab_types import Lease
from device_agents.leases import protocol
from device_agents.leases.ledger import Ledger
from device_agents.leases.model import Request
from harness.errors import HostTaken
from harness.hosting import keeper as keeping
from harness.hosting import supervisor
from harness.hosting.head import Head
from harness.hosting.keeper import LEFT, LOST, REFUSED, Keeper, Lost, Options
from harness.hosting.node import RayNode
from harness.hosting.offer import Offer
from harness.hosting.records import HOSTS, ORDERS, HostDevice, HostRecord, Order
from harness.inventory import DeviceEntry, Inventory, Limits
from harness.lab import Lab, leases_folder
from kvengine.codec import encode
from tests.harness.hosts import ADDRESS, Store, head, record, store

__all__ = ["head", "store"]  # fixtures


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
    seen = stays(monkeypatch, LOST, -6, last)  # Ray aborts processes
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

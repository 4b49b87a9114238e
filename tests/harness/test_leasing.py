"""How a client gets leases: in line, told why, never longer than it may; shares of several lab hosts."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from device_agents.config import DeviceConfig
from device_agents.deadline import Deadline
from device_agents.errors import InfrastructureError, LeaseError, LeaseNotGranted
from device_agents.lab_agent import LabAgent
from device_agents.lab_types import Lease, Standing
from harness.cluster import RayConnection
from harness.errors import HarnessError
from harness.farm import Farm, _Device
from harness.inventory import LOCAL_LAB, DeviceEntry, Inventory, LabEntry
from harness.lab import Lab, Node
from harness.leasing import Terms, duration, lease

HELD = Standing((), ("bob@lab",), ("a is leased to 'ann@lab'",))
GIVEN = Standing((Lease("a", "me", 7),))


class FakeLab:
    """Answers ``ask`` with one standing after the other, and dies where there is an error in its place."""

    def __init__(self, *answers: Standing | InfrastructureError) -> None:
        self.answers = list(answers)
        self.running = True
        self.ids: list[str] = []
        self.withdrawn: list[str] = []

    def call(self, method: str, seconds: float, *arguments: Any) -> Any:
        if method == "withdraw":
            self.withdrawn += arguments
            return None
        self.ids.append(arguments[0].id)
        answer = self.answers.pop(0)
        if isinstance(answer, InfrastructureError):
            self.running = False
            raise answer
        return answer


def get(
    lab: FakeLab, wait_s: float = 30, said: Callable[[str], None] = lambda reason: None
) -> tuple[Lease, ...]:
    def restart() -> None:
        lab.running = True

    return lease(cast("Lab", lab), ("a",), 1, Terms(), Deadline(wait_s), said, restart)


def test_it_asks_with_one_id_until_it_is_granted_and_says_why_it_waits() -> None:
    lab, said = FakeLab(HELD, GIVEN), list[str]()
    assert get(lab, said=said.append) == GIVEN.granted
    assert said == ["waits: a is leased to 'ann@lab' (in line behind bob@lab)"]
    assert len(set(lab.ids)) == 1
    assert lab.withdrawn == []


def test_of_many_reasons_some_are_said() -> None:
    why = ("z is free, but 6 are wanted at once", *(f"{name} is leased to 'ann@lab'" for name in "abcde"))
    with pytest.raises(LeaseNotGranted) as found:
        get(FakeLab(Standing((), (), why)), wait_s=0)
    named = "; ".join(f"{name} is leased to 'ann@lab'" for name in "abc")
    assert str(found.value) == f"waited 0 s: {named}; and 2 more"


def test_who_gives_up_leaves_the_line() -> None:
    lab = FakeLab(HELD)
    with pytest.raises(LeaseNotGranted, match="waited 0 s: a is leased to 'ann@lab'"):
        get(lab, wait_s=0)
    assert lab.withdrawn == lab.ids


def test_who_is_interrupted_leaves_the_line() -> None:
    def interrupt(reason: str) -> None:
        raise KeyboardInterrupt

    lab = FakeLab(HELD)
    with pytest.raises(KeyboardInterrupt):
        get(lab, said=interrupt)
    assert lab.withdrawn == lab.ids


def test_an_agent_that_dies_meanwhile_is_started_again_and_asked_the_same() -> None:
    lab = FakeLab(HELD, InfrastructureError("died"), GIVEN)
    assert get(lab) == GIVEN.granted
    assert len(set(lab.ids)) == 1


@pytest.mark.parametrize(
    ("text", "seconds"), [("90", 90), ("90s", 90), ("20m", 1200), ("1.5h", 5400), ("0", 0)]
)
def test_durations(text: str, seconds: float) -> None:
    assert duration(text) == seconds


@pytest.mark.parametrize("text", ["", "m", "-1s", "1d", "infh", "nan", "ten"])
def test_what_is_no_duration(text: str) -> None:
    with pytest.raises(HarnessError, match="sought a time such as 90s"):
        duration(text)


class Host:
    """A lab host with some devices leased."""

    running = True

    def __init__(self, name: str, *leased: str) -> None:
        self.name = name
        self._leased = leased

    def call(self, *_: Any) -> tuple[Lease, ...]:
        return tuple(Lease(device, "ann", 1) for device in self._leased)


@pytest.mark.parametrize(
    ("count", "leased", "shares"),
    [
        (2, (), {"left": 2, "right": 0}),
        (3, (), {"left": 2, "right": 1}),
        (2, ("l1",), {"left": 1, "right": 1}),
        (2, ("l1", "l2"), {"left": 0, "right": 2}),
        (3, ("l1", "l2"), {"left": 1, "right": 2}),
        (4, ("l1", "r1", "r2"), {"left": 2, "right": 2}),
    ],
)
def test_of_several_hosts_what_is_free_is_taken_first(
    count: int, leased: tuple[str, ...], shares: dict[str, int]
) -> None:
    names = {"left": ("l1", "l2"), "right": ("r1", "r2")}
    entries = {name: DeviceEntry(lab=lab) for lab, devices in names.items() for name in devices}
    farm = Farm(Inventory(entries, {lab: LabEntry(lab) for lab in names}), tuple(entries))
    hosts = {lab: Host(lab, *(set(leased) & set(devices))) for lab, devices in names.items()}
    devices = [_Device(e.config(name), cast("Lab", hosts[e.lab])) for name, e in entries.items()]
    assert {lab.name: share for lab, share in farm._shares(count, devices)} == shares
    with pytest.raises(LeaseError, match="sought 5 of 4 devices: l1, l2, r1, r2"):
        farm._shares(5, devices)


class AgentLab:
    """A lab host without Ray."""

    node: Node | None = None
    name = LOCAL_LAB
    running = True

    def __init__(self, agent: LabAgent) -> None:
        self._agent = agent

    def call(self, method: str, seconds: float, *arguments: Any) -> Any:
        return getattr(self._agent, method)(*arguments)


def test_who_holds_one_of_its_devices_asks_for_the_others_alone(tmp_path: Path) -> None:
    """To ask for all at once would be to wait for oneself."""
    entries = {name: DeviceEntry("simulated") for name in "abc"}
    agent = LabAgent(tmp_path, [e.config(name) for name, e in entries.items()], reap_every_s=None)
    farm = Farm(Inventory(entries), tuple(entries), terms=Terms(wait_s=0))
    farm._ray = cast("RayConnection", object())
    lab = cast("Lab", AgentLab(agent))
    farm._devices = {name: _Device(e.config(name), lab) for name, e in entries.items()}
    farm._labs = {LOCAL_LAB: lab}
    try:
        (held,) = farm.hold(1, ["b", "c"])
        assert farm.holding("abc") == ("b",) == (held.device,)
        farm.lease("a")
        assert farm.holding("abc") == ("a", "b", "c")
        with pytest.raises(LeaseNotGranted):
            farm.hold(1, ["a"], wait_s=0.0)
    finally:
        agent.shutdown()


NOW = Node("new", "10.0.0.2")


class FarmWithoutRay(Farm):
    """Of one device, at a lab host that is found at NOW."""

    def __init__(self, lab: AgentLab, entry: DeviceEntry) -> None:
        super().__init__(Inventory({"a": entry}), ("a",), terms=Terms(wait_s=0))
        self._ray = cast("RayConnection", SimpleNamespace(close=lambda: None, check_alive=lambda: None))
        self._devices = {"a": _Device(entry.config("a"), cast("Lab", lab))}
        self._labs = {LOCAL_LAB: cast("Lab", lab)}

    def _node_of(self, lab: str) -> Node:
        return NOW


class DeafLab(AgentLab):
    """Its agent dies instead of hearing of the first acknowledgements. heard: those that it did hear of."""

    def __init__(self, agent: LabAgent, deaf: int) -> None:
        super().__init__(agent)
        self._deaf, self.heard = deaf, list[str]()

    def call(self, method: str, seconds: float, *arguments: Any) -> Any:
        if method != "acknowledge":
            return super().call(method, seconds, *arguments)
        self._deaf -= 1
        if self._deaf >= 0:
            self.running = False
            raise InfrastructureError("it was killed")
        self.heard += arguments
        return None

    def start(self, configs: list[DeviceConfig]) -> None:
        self.running = True

    def close(self) -> None:
        self.running = False


@pytest.mark.parametrize(("deaf", "heard"), [(0, ["x", "y"]), (2, ["y", "x"]), (1, ["y", "x"]), (9, [])])
def test_a_host_that_did_not_hear_that_a_leg_is_stored_is_told_again_when_the_farm_closes(
    tmp_path: Path, deaf: int, heard: list[str]
) -> None:
    entry = DeviceEntry("simulated")
    agent = LabAgent(tmp_path, [entry.config("a")], reap_every_s=None)
    lab = DeafLab(agent, deaf)
    farm = FarmWithoutRay(lab, entry)
    try:
        farm.acknowledge("a", "x")
        farm.acknowledge("a", "y")
        farm.close()
        assert lab.heard == heard
    finally:
        agent.shutdown()


def test_a_host_that_joined_anew_after_its_network_was_cut_is_found_where_it_is_now(tmp_path: Path) -> None:
    entry = DeviceEntry("simulated")
    agent = LabAgent(tmp_path, [entry.config("a")], reap_every_s=None)
    lab = DeafLab(agent, 0)
    farm = FarmWithoutRay(lab, entry)
    try:
        farm.lease("a")
        assert lab.node is None, "as long as its agent answers it is where it was"
        lab.running = False
        farm.vitals("a")
        assert lab.node == NOW
    finally:
        farm.close()
        agent.shutdown()


class MortalLab(DeafLab):
    """Its agent dies instead of hearing of the first claim."""

    def call(self, method: str, seconds: float, *arguments: Any) -> Any:
        if method == "claim" and self._deaf > 0:
            self._deaf -= 1
            self.running = False
            raise InfrastructureError("it was killed")
        return AgentLab.call(self, method, seconds, *arguments)


def test_who_was_granted_a_device_and_could_not_claim_it_does_not_wait_for_itself(tmp_path: Path) -> None:
    """The agent that is started again knows the lease, which nobody could have given back to the dead one."""
    entry = DeviceEntry("simulated")
    agent = LabAgent(tmp_path, [entry.config("a")], reap_every_s=None)
    lab = MortalLab(agent, 1)
    farm = FarmWithoutRay(lab, entry)
    try:
        farm.lease("a")
        assert farm.holding("a") == ("a",)
        assert farm._devices["a"].claimed
    finally:
        farm.close()
        agent.shutdown()

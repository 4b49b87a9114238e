"""The lease protocol, explored whole for two clients and two devices, and at random for more.

The invariants, and for each a mutation of the protocol that it, and maybe others, finds:

EXCLUSIVE  nothing runs on a device for anybody but the one holder (a device counts as free while its last
           holder's work is still being stopped)
FENCED     a client with an older token is refused (the token is not compared)
FREED      a dead client has no device longer than its heartbeat allows (silence ends nothing)
GRANTED    whoever waits for devices that are free and kept for nobody before him has them (nothing is granted
           after a release)
SERVED     nobody starves, neither behind more important work nor, wanting many, behind those who want few
           (waiting gives no priority; free devices are not kept)
"""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from device_agents.errors import LeaseError, LeaseNotGranted
from device_agents.leases import protocol
from device_agents.leases.check import violations
from device_agents.leases.ledger import Entry
from device_agents.leases.model import Booted, Fact, Facts, Process, Request, Rules, State
from tests.device_agents.lease_world import Explorer, mutated

NOT_CLEAN = ("device not in state.held and", "(device not in state.held or state.held[device].ended) and")
NO_TOKEN = ("    if held.token != token:\n", "    if False:\n")
NO_SILENCE = ("now >= held.beat + held.request.beat_s", "False")
NO_GRANT = (
    "        if len(free) >= request.count:",
    "        if len(free) >= request.count and not state.used:",
)
NO_AGEING = (" + (now - waiting.since) // rules.ageing_s", "")
NO_KEEPING = ("            kept |= dict.fromkeys(free, waiting)", "            pass")


def test_two_clients_two_devices_one_crash_one_death_one_message_twice() -> None:
    worlds, wrong = Explorer().explore()
    assert wrong == ""
    assert worlds > 10_000


def test_two_requests_of_each() -> None:
    worlds, wrong = Explorer(last=1, asks=2, budget=(1, 0, 0)).explore()
    assert wrong == ""
    assert worlds > 10_000


@pytest.mark.parametrize(
    ("mutation", "invariant"),
    [(NOT_CLEAN, "EXCLUSIVE"), (NO_TOKEN, "FENCED"), (NO_SILENCE, "FREED"), (NO_GRANT, "GRANTED")],
)
def test_each_invariant_finds_its_mutation(mutation: tuple[str, str], invariant: str) -> None:
    _, wrong = Explorer(mutated(*mutation)).explore()
    assert invariant in wrong


# -- nobody starves ---------------------------------------------------------------------------

RULES = Rules(ageing_s=20.0, half_life_s=50.0)
LIMIT_S = 5.0


class Stream:
    """While somebody waits, others at priority 3 stand in line for each device all the time."""

    def __init__(self, rules: Any) -> None:
        self.rules = rules
        self.state = State()
        self.now = 0.0

    def waited(self, big: Request) -> float:
        """Seconds until ``big``, asked at 3 s, is granted."""
        for second in range(400):
            self.now = float(second)
            self._act(lambda state, now: ())
            for held in list(self.state.held.values()):
                if held.ended:
                    self._act(self.rules.freed(held.device, held.token))
            wanted = {waiting.request.devices for waiting in self.state.waiting.values()}
            for device in big.devices:
                if (device,) not in wanted:
                    name = f"{device} {second}"
                    small = Request(name, name, name, (device,), 1, 3, LIMIT_S, 1e3)
                    self._act(self.rules.ask(small, RULES, wait=True))
            if second == 3:
                self._act(self.rules.ask(big, RULES, wait=True))
            if self.state.of(big.id):
                return self.now - 3
        return float("inf")

    def _act(self, command: Any) -> None:
        """As Ledger.act."""
        self._fold(self.rules.due(self.state, self.now))
        self._fold(command(self.state, self.now))
        self._fold(self.rules.grants(self.state, self.now, RULES))

    def _fold(self, facts: Facts) -> None:
        self.state = self.rules.fold(self.state, self.now, facts, RULES)


BIG = Request("big", "big user", "", ("a", "b", "c"), 3, 0, LIMIT_S, 1e3)


def test_a_big_unimportant_request_is_served_behind_an_endless_stream_of_small_important_ones() -> None:
    assert Stream(protocol).waited(BIG) <= 4 * RULES.ageing_s + LIMIT_S


@pytest.mark.parametrize("mutation", [NO_AGEING, NO_KEEPING])
def test_that_it_is_served_finds_its_mutations(mutation: tuple[str, str]) -> None:
    assert Stream(mutated(*mutation)).waited(BIG) == float("inf")


# -- larger, at random ------------------------------------------------------------------------

DEVICES = ("a", "b", "c", "d")
CLIENTS = 5


class Leases(RuleBasedStateMachine):
    """Five users, four devices, quarantine, two agents; its facts are judged by the journal's checker too."""

    protocol: Any = protocol

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0
        self.state = State()
        self.entries: list[Entry] = []
        self.dead: dict[int, float] = {}
        self.asks = 0
        self.latest: dict[int, str] = {}
        self.clean_at: dict[str, int] = {}  # device: token that its agent works for
        self._write((Booted("boot", 0),))
        for agent in ("left", "right"):
            self._do(self.protocol.start(agent, Process("host", 1, 1)))

    def _write(self, facts: Facts) -> None:
        self.state = self.protocol.fold(self.state, self.now, facts, RULES)
        self.entries += [Entry(self.now, "", fact) for fact in facts]

    def _do(self, command: Any) -> tuple[Fact, ...]:
        """As Ledger.act."""
        self._write(self.protocol.due(self.state, self.now))
        facts: tuple[Fact, ...] = ()
        try:
            facts = command(self.state, self.now)
            self._write(facts)
        except LeaseError:
            pass
        self._write(self.protocol.grants(self.state, self.now, RULES))
        return facts

    @rule(
        client=st.integers(0, CLIENTS - 1),
        devices=st.lists(st.sampled_from(DEVICES), min_size=1, max_size=4, unique=True),
        share=st.floats(0, 1),
        priority=st.integers(-1, 2),
        wait=st.booleans(),
    )
    def ask(self, client: int, devices: list[str], share: float, priority: int, wait: bool) -> None:
        if client in self.dead:
            return
        self.asks += 1
        self.latest[client] = f"{client}.{self.asks}"
        request = Request(
            self.latest[client], f"user {client}", "", tuple(devices), max(1, round(share * len(devices))),
            priority, LIMIT_S * 2, LIMIT_S, ("left", "right")[client % 2],
        )  # fmt: skip
        self._do(self.protocol.ask(request, RULES, wait=wait))
        if not wait:
            assert request.id not in self.state.waiting

    @rule(client=st.integers(0, CLIENTS - 1))
    def beat(self, client: int) -> None:
        if client in self.latest and client not in self.dead:
            self._do(self.protocol.beat(self.latest[client], RULES))

    @rule(client=st.integers(0, CLIENTS - 1))
    def give_back(self, client: int) -> None:
        if client in self.latest:
            self._do(self.protocol.withdraw(self.latest[client], "released"))

    @rule(client=st.integers(0, CLIENTS - 1))
    def die(self, client: int) -> None:
        self.dead.setdefault(client, self.now)

    @rule(seconds=st.sampled_from((0.5, 1.0, LIMIT_S)))
    def time(self, seconds: float) -> None:
        self.now += seconds
        self._do(lambda state, now: ())

    @precondition(lambda self: any(held.ended for held in self.state.held.values()))
    @rule(data=st.data())
    def clean(self, data: st.DataObject) -> None:
        ended = sorted(device for device, held in self.state.held.items() if held.ended)
        device = data.draw(st.sampled_from(ended))
        self._do(self.protocol.freed(device, self.state.held[device].token))

    @rule(device=st.sampled_from(DEVICES), seconds=st.sampled_from((None, 3.0)))
    def quarantine(self, device: str, seconds: float | None) -> None:
        self._do(self.protocol.quarantine(device, "fell off the shelf", "somebody", seconds))

    @rule(device=st.sampled_from(DEVICES))
    def lift(self, device: str) -> None:
        self._do(self.protocol.lift(device, "somebody"))

    @rule(agent=st.sampled_from(("left", "right")))
    def restart_an_agent(self, agent: str) -> None:
        self._do(self.protocol.start(agent, Process("host", 1, 2)))

    @rule()
    def reboot(self) -> None:
        self._write((Booted(f"boot {len(self.entries)}", self.state.token),))
        assert not self.state.held
        assert not self.state.waiting

    @invariant()
    def the_journal_is_as_it_should_be(self) -> None:
        assert violations(self.entries) == []

    @invariant()
    def who_waits_for_what_is_free_has_it(self) -> None:
        wanted: set[str] = set()  # by others; what nobody else wants cannot be kept
        for waiting in self.state.waiting.values():
            wanted = {
                device
                for other in self.state.waiting.values()
                if other is not waiting
                for device in other.request.devices
            }
            free = set(waiting.request.devices) - wanted - set(self.state.held) - set(self.state.quarantined)
            assert len(free) < waiting.request.count

    @invariant()
    def the_dead_have_nothing(self) -> None:
        for held in self.state.held.values():
            died = self.dead.get(int(held.request.id.split(".")[0]))
            if died is not None and not held.ended:
                # Granted while it waited, it has a heartbeat's time for the grant as well.
                assert self.now < max(died, held.since) + LIMIT_S or self.now == self.state.at

    @invariant()
    def who_waits_is_told_why(self) -> None:
        for id_, waiting in self.state.waiting.items():
            said = self.protocol.why_not(self.state, id_, self.now, RULES)
            assert len(said) == len(waiting.request.devices)


QUICK = settings(
    max_examples=60, stateful_step_count=30, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)


def test_five_users_four_devices() -> None:
    run_state_machine_as_test(Leases, settings=QUICK)


@pytest.mark.parametrize("mutation", [NOT_CLEAN, NO_GRANT])
def test_the_random_machine_finds_mutations_too(mutation: tuple[str, str]) -> None:
    mutant = type("Mutant", (Leases,), {"protocol": mutated(*mutation)})
    # The same programs each time: how soon one of them finds it would else be luck.
    patient = settings(QUICK, max_examples=2000, derandomize=True, phases=(Phase.generate,), database=None)
    with pytest.raises(AssertionError):
        run_state_machine_as_test(mutant, settings=patient)


def test_who_may_not_wait_is_refused_with_the_reason() -> None:
    first, second = (Request(name, name, name, ("a",)) for name in ("alice", "bob"))
    state = State()
    state = protocol.fold(state, 0, protocol.ask(first, RULES, wait=False)(state, 0), RULES)
    state = protocol.fold(state, 0, protocol.grants(state, 0, RULES), RULES)
    with pytest.raises(LeaseNotGranted, match="a is leased to 'alice'"):
        protocol.ask(second, RULES, wait=False)(state, 1)

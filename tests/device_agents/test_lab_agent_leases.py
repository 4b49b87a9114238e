"""LabAgent: a device is its holder's alone, until the lease ends, however that comes about."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from device_agents.api import Device
from device_agents.blobs import BlobStore
from device_agents.config import DeviceConfig
from device_agents.deadline import Deadline
from device_agents.errors import (
    InfrastructureError,
    LeaseError,
    LeaseNotGranted,
)
from device_agents.host import HostDevice
from device_agents.lab_agent import LabAgent
from device_agents.leases.check import violations
from device_agents.leases.ledger import JOURNAL, read
from device_agents.leases.model import Request
from device_agents.local import LocalTransport
from device_agents.remote_session import RunnerSession
from kvengine.program import Prefill, Program, Workload
from kvengine.recipe import SessionRecipe
from tests.device_agents import fake_runner
from tests.device_agents.conftest import FAKE_RUNNER, GRACE_S, children, wait_for
from tests.device_agents.lab_agents import (
    GOOD,
    RECIPE,
    TWO,
    Clock,
    agent,
    clock,
    make_fake,
    open_session,
    upload,
)

__all__ = ["agent", "clock"]  # fixtures


def test_a_device_has_one_holder(agent: LabAgent) -> None:
    lease = agent.acquire("left", "first", 60)
    with pytest.raises(LeaseError, match="left is leased to 'first' since 0 s"):
        agent.acquire("left", "second", 60)
    agent.acquire("right", "second", 60)
    agent.release("left", lease.token)
    agent.acquire("left", "second", 60)


def test_of_many_at_once_one_gets_the_device(agent: LabAgent) -> None:
    outcomes: list[str] = []
    start = threading.Barrier(8)

    def call() -> None:
        start.wait(10)
        try:
            agent.acquire("left", "someone", 60)
            outcomes.append("got it")
        except LeaseError:
            outcomes.append("refused")

    threads = [threading.Thread(target=call) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert sorted(outcomes) == ["got it"] + ["refused"] * 7


def test_tokens_grow_over_restarts(tmp_path: Path) -> None:
    tokens: list[int] = []
    for _ in range(3):
        agent = LabAgent(tmp_path, TWO, make=make_fake, reap_every_s=None)
        tokens.extend(agent.acquire(device, "me", 60).token for device in ("left", "right"))
        agent.shutdown()
    assert tokens == sorted(set(tokens))


def test_a_damaged_journal_is_not_guessed_around(tmp_path: Path) -> None:
    agent = LabAgent(tmp_path, TWO, make=make_fake, reap_every_s=None)
    before = agent.acquire("left", "me", 60).token
    agent.shutdown()
    journal = tmp_path / "leases" / JOURNAL
    whole = journal.read_bytes()
    journal.write_bytes(whole.replace(b"granted", b"graanted"))
    with pytest.raises(LeaseError, match=r"line 4 is no fact about leases"):
        LabAgent(tmp_path, TWO, make=make_fake, reap_every_s=None)
    journal.unlink()  # as the message says; tokens do not begin again for all that
    agent = LabAgent(tmp_path, TWO, make=make_fake, reap_every_s=None)
    assert agent.acquire("left", "me", 60).token >= before
    agent.shutdown()


def test_an_expired_lease_frees_the_device_and_ends_its_runner(agent: LabAgent, clock: Clock) -> None:
    lease = agent.acquire("left", "asleep", 60)
    session = open_session(agent, "left", lease.token)
    clock.now += 59
    assert len(agent.run_program(session, lease.token, GOOD)) == 1
    clock.now += 1
    successor = agent.acquire("left", "awake", 60)
    assert successor.token > lease.token
    assert children() == set()
    with pytest.raises(LeaseError, match="not the current one; it is leased to 'awake'"):
        agent.run_program(session, lease.token, GOOD)
    with pytest.raises(LeaseError, match="no session"):
        agent.run_program(session, successor.token, GOOD)


def test_expiry_ends_a_program_in_the_middle(agent: LabAgent, clock: Clock, tmp_path: Path) -> None:
    lease = agent.acquire("left", "asleep", 60)
    recipe = SessionRecipe(environment={"FAKE_STARTED": str(tmp_path / "started")})
    session = open_session(agent, "left", lease.token, recipe)
    errors: list[BaseException] = []

    def call() -> None:
        try:
            agent.run_program(session, lease.token, Program(8, (Prefill((fake_runner.HANG,)),)))
        except InfrastructureError as error:
            errors.append(error)

    thread = threading.Thread(target=call)
    thread.start()
    wait_for((tmp_path / "started").exists)
    clock.now += 61
    agent.acquire("left", "awake", 60)
    thread.join(10)
    assert [type(error) for error in errors] == [LeaseError]
    assert children() == set()


def test_the_reaper_frees_without_anybody_calling(tmp_path: Path, clock: Clock) -> None:
    agent = LabAgent(tmp_path, TWO, make=make_fake, clock=clock, reap_every_s=0.01)
    lease = agent.acquire("left", "dead", 60)
    open_session(agent, "left", lease.token)
    assert len(children()) == 1
    clock.now += 61
    wait_for(lambda: not children())
    agent.shutdown()


def test_renewing_moves_the_end(agent: LabAgent, clock: Clock) -> None:
    lease = agent.acquire("left", "me", 60)
    clock.now += 50
    renewed = agent.renew("left", lease.token, 60)
    assert (renewed.token, renewed.holder) == (lease.token, "me")
    clock.now += 50
    agent.renew("left", lease.token, 60)
    clock.now += 61
    with pytest.raises(LeaseError, match="no lease any more"):
        agent.renew("left", lease.token, 60)


@pytest.mark.parametrize("ttl_s", [0, -1, 1e9, float("nan"), float("inf")])
def test_time_limits_are_limited(agent: LabAgent, ttl_s: float) -> None:
    with pytest.raises(LeaseError, match="time limit"):
        agent.acquire("left", "me", ttl_s)


def test_without_a_current_token_nothing_is_done(agent: LabAgent) -> None:
    manifest = upload(agent)
    old = agent.acquire("left", "first", 60)
    agent.deploy("left", old.token, manifest.to_json())
    session = open_session(agent, "left", old.token)
    agent.release("left", old.token)
    agent.acquire("left", "second", 60)
    calls = (
        lambda: agent.renew("left", old.token, 60),
        lambda: agent.release("left", old.token),
        lambda: agent.deploy("left", old.token, manifest.to_json()),
        lambda: agent.open_session("left", old.token, manifest.id, RECIPE),
        lambda: agent.run_program(session, old.token, GOOD),
        lambda: agent.run_workload(session, old.token, Workload((1,), 2)),
        lambda: agent.close_session(session, old.token),
    )
    for call in calls:
        with pytest.raises(LeaseError):
            call()
    assert agent.status()[0].lease is not None


def test_a_token_is_good_for_its_own_device_only(agent: LabAgent) -> None:
    left, right = agent.acquire("left", "me", 60), agent.acquire("right", "you", 60)
    session = open_session(agent, "left", left.token)
    with pytest.raises(LeaseError):
        agent.run_program(session, right.token, GOOD)


def test_the_holder_is_shown_until_the_lease_ends(agent: LabAgent, clock: Clock) -> None:
    lease = agent.acquire("left", "me", 60)
    left, right = agent.status()
    assert left.lease is not None
    assert (left.lease.token, left.lease.holder) == (lease.token, "me")
    assert right.lease is None
    assert [each.token for each in agent.leases()] == [lease.token]
    clock.now += 60
    assert agent.leases() == ()
    assert [s.lease for s in agent.status()] == [None, None]


def test_two_agents_of_one_machine_share_one_line(tmp_path: Path, clock: Clock) -> None:
    ours, theirs = (
        LabAgent(
            tmp_path / name, TWO, leases=tmp_path / "leases", make=make_fake, clock=clock, reap_every_s=None
        )
        for name in ("ours", "theirs")
    )
    lease = ours.acquire("left", "me", 60)
    session = open_session(ours, "left", lease.token)
    next_ = Request("next", "you", "you", ("left", "right"), 2)
    assert theirs.ask(next_).why == (
        "left is leased to 'me' since 0 s, for 86400 s more at most, last heartbeat 0 s ago",
        "right is free, but 2 are wanted at once",
    )
    with pytest.raises(LeaseNotGranted, match="right is kept for 'you', who is before you in line"):
        ours.acquire("right", "me", 60)
    ours.release("left", lease.token)
    left, right = theirs.ask(next_).granted
    assert left.token == right.token > lease.token
    with pytest.raises(LeaseError, match="leased to 'you'"):
        ours.run_program(session, lease.token, GOOD)
    with pytest.raises(LeaseError, match="given by another lab agent"):
        ours.claim("left", left.token)
    assert not ours.in_use
    theirs.withdraw("next")
    assert ours.leases() == ()
    assert violations(read(tmp_path / "leases" / JOURNAL)) == []
    ours.shutdown()
    theirs.shutdown()


def test_an_agent_that_was_killed_goes_on_with_its_leases(tmp_path: Path, clock: Clock) -> None:
    def start() -> LabAgent:
        return LabAgent(tmp_path / "lab", TWO, make=make_fake, clock=clock, reap_every_s=None)

    killed = start()
    lease, ended = killed.acquire("left", "me", 60), killed.acquire("right", "dead", 60)
    session = open_session(killed, "left", lease.token)
    clock.now += 50
    killed.renew("left", lease.token, 60)
    killed.ask(waiting := Request("next", "you", "you", ("left",)))
    killed._root_lock.close()  # as the kernel does it
    clock.now += 25
    again = start()
    assert [each.token for each in again.leases()] == [lease.token]
    with pytest.raises(LeaseError, match="no session"):
        again.run_program(session, lease.token, GOOD)
    with pytest.raises(LeaseError, match="no lease any more"):
        again.claim("right", ended.token)
    assert again.run_program(open_session(again, "left", lease.token), lease.token, GOOD)
    again.release("left", lease.token)
    assert again.ask(waiting).granted
    again.shutdown()
    for engine in killed._slots["left"].sessions.values():
        engine.close()  # which the kernel would have ended


def test_a_device_in_quarantine_is_nobodys(agent: LabAgent, clock: Clock) -> None:
    lease = agent.acquire("left", "me", 60)
    session = open_session(agent, "left", lease.token)
    agent.quarantine("left", "no answer for 180 s", "the nightly", 100)
    assert children() == set()
    with pytest.raises(LeaseError, match="quarantined by the nightly: no answer"):
        agent.run_program(session, lease.token, GOOD)
    with pytest.raises(LeaseNotGranted, match="left is quarantined by the nightly for 100 s more: no answer"):
        agent.acquire("left", "you", 60)
    assert agent.status()[0].quarantined == "by the nightly: no answer for 180 s"
    agent.lift("left", "ann")
    agent.release("left", agent.acquire("left", "you", 60).token)
    agent.quarantine("left", "no answer for 180 s", "the nightly", 100)
    clock.now += 100
    agent.acquire("left", "you", 60)


def test_a_lease_can_be_revoked(agent: LabAgent) -> None:
    lease = agent.acquire("left", "me", 60)
    agent.revoke("left", "ann", "the device is going to the repair shop")
    with pytest.raises(LeaseError, match="revoked by ann: the device is going"):
        agent.renew("left", lease.token, 60)
    agent.acquire("left", "you", 60)


def test_a_lease_that_ends_while_a_session_opens_leaves_no_runner(tmp_path: Path, clock: Clock) -> None:
    agents: list[LabAgent] = []

    class Slow(HostDevice):
        def open_session(
            self, remote_folder: str, recipe: SessionRecipe, deadline: Deadline
        ) -> RunnerSession:
            session = super().open_session(remote_folder, recipe, deadline)
            clock.now += 61
            with pytest.raises(LeaseError, match="still finishes work of an ended lease"):
                agents[0].acquire("left", "next", 60)
            return session

    def make(config: DeviceConfig, store: BlobStore) -> Device:
        transport = LocalTransport(GRACE_S)
        return Slow(config.name, store.root, transport, store=store, runner_argv=FAKE_RUNNER)

    agent = LabAgent(tmp_path, TWO, make=make, clock=clock, reap_every_s=None)
    agents.append(agent)
    lease = agent.acquire("left", "me", 60)
    with pytest.raises(LeaseError, match="expired while the session was being opened"):
        open_session(agent, "left", lease.token)
    assert children() == set()
    agent.acquire("left", "next", 60)
    agent.shutdown()


def test_one_call_renews_all_and_says_which_have_ended(agent: LabAgent, clock: Clock) -> None:
    left, right = (agent.acquire(name, "me", 30.0).token for name in ("left", "right"))
    agent.revoke("right", "admin", "needed elsewhere")
    clock.now += 20
    pairs = [("left", left), ("right", right), ("no such", 7)]
    ended = agent.renew_all(pairs, 30.0)
    assert set(ended) == {"right", "no such"}
    assert "needed elsewhere" in ended["right"]
    clock.now += 20
    agent.claim("left", left)

"""LabAgent: exclusive use by lease, artifacts, sessions, and devices that do not disturb each other."""

from __future__ import annotations

import hashlib
import os
import pickle
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from device_agents.api import Device, DeviceIdentity
from device_agents.blobs import BlobStore
from device_agents.config import DeviceConfig
from device_agents.deadline import Deadline
from device_agents.errors import (
    BlobsMissing,
    DeployFailed,
    InfrastructureError,
    LeaseError,
    LeaseNotGranted,
    NoSuchDevice,
    RunnerDied,
)
from device_agents.host import HostDevice
from device_agents.lab_agent import LabAgent, make_device
from device_agents.lab_types import AgentBudgets
from device_agents.leases.check import violations
from device_agents.leases.ledger import JOURNAL, read
from device_agents.leases.model import Request
from device_agents.local import LocalTransport
from device_agents.remote_session import Budgets, RunnerSession
from kvengine.artifact import Manifest
from kvengine.errors import ArtifactError
from kvengine.program import Prefill, Program, Workload
from kvengine.recipe import SessionRecipe
from tests.device_agents import fake_runner
from tests.device_agents.conftest import FAKE_RUNNER, GRACE_S, children, make_manifest, wait_for

GOOD = Program(8, (Prefill((1, 2, 3)),))
CONTENTS = {"model.onnx": b"graph", "weights.bin": b"numbers"}
TWO = (DeviceConfig("left", threads=1), DeviceConfig("right", threads=2))
RECIPE = SessionRecipe()


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def make_fake(config: DeviceConfig, store: BlobStore) -> Device:
    argv = ["sh", "-c", "echo unplugged >&2; exit 9"] if "broken" in config.options else FAKE_RUNNER
    budgets = Budgets(program_s=30, close_s=5)
    return HostDevice(
        config.name, store.root, LocalTransport(GRACE_S), store=store, runner_argv=argv, budgets=budgets
    )


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def agent(tmp_path: Path, clock: Clock) -> Iterator[LabAgent]:
    agent = LabAgent(tmp_path / "lab", TWO, make=make_fake, clock=clock, reap_every_s=None)
    yield agent
    agent.shutdown()


def upload(agent: LabAgent, contents: dict[str, bytes] = CONTENTS, chunk: int = 4) -> Manifest:
    """As a client does it."""
    manifest = make_manifest(contents)
    by_sha256 = {hashlib.sha256(data).hexdigest(): data for data in contents.values()}
    for blob in agent.missing_blobs(manifest.to_json()):
        data = by_sha256[blob.sha256]
        for offset in range(blob.present, len(data), chunk):
            agent.put_chunk(blob.sha256, offset, data[offset : offset + chunk])
        agent.commit_blob(blob.sha256)
    return manifest


def open_session(agent: LabAgent, device: str, token: int, recipe: SessionRecipe = RECIPE) -> str:
    artifact = agent.deploy(device, token, upload(agent).to_json())
    session_id, _ = agent.open_session(device, token, artifact, recipe)
    return session_id


def test_the_whole_way_from_upload_to_measurement(agent: LabAgent) -> None:
    lease = agent.acquire("left", "me", 60)
    artifact = agent.deploy("left", lease.token, upload(agent).to_json())
    session, info = agent.open_session("left", lease.token, artifact, SessionRecipe())
    assert info.artifact_id == "fake"
    assert agent.run_program(session, lease.token, GOOD)[0].position == 3
    assert len(agent.run_workload(session, lease.token, Workload((1,), 3, repeats=2)).samples) == 2
    assert agent.vitals("left").mem_available_bytes
    agent.close_session(session, lease.token)
    assert children() == set()
    agent.close_session(session, lease.token)  # again: nothing to do
    with pytest.raises(LeaseError, match="no session"):
        agent.run_program(session, lease.token, GOOD)


def test_arguments_and_results_can_be_pickled(agent: LabAgent) -> None:
    lease = agent.acquire("left", "me", 60)
    session = open_session(agent, "left", lease.token)
    results = [
        agent.status(),
        agent.missing_blobs(make_manifest({"new.bin": b"x"}).to_json()),
        lease,
        agent.run_program(session, lease.token, GOOD),
        agent.run_workload(session, lease.token, Workload((1,), 3)),
        agent.vitals("left"),
        TWO,
        AgentBudgets(),
    ]
    for result in results:
        assert type(pickle.loads(pickle.dumps(result))) is type(result)


# -- devices ---------------------------------------------------------------------------------


def test_devices_tells_who_is_there(agent: LabAgent) -> None:
    assert [identity.name for identity in agent.devices()] == ["left", "right"]


def test_a_broken_device_is_reported_and_disturbs_no_other(tmp_path: Path) -> None:
    configs = (DeviceConfig("broken", options={"broken": "yes"}), DeviceConfig("sound"))
    agent = LabAgent(tmp_path, configs, make=make_fake, reap_every_s=None)
    broken, sound = agent.status()
    assert broken.identity is None
    assert "unplugged" in broken.error
    assert isinstance(sound.identity, DeviceIdentity)
    assert [identity.name for identity in agent.devices()] == ["sound"]
    bad, good = agent.acquire("broken", "me", 60), agent.acquire("sound", "me", 60)
    with pytest.raises(RunnerDied, match="unplugged"):
        open_session(agent, "broken", bad.token)
    session = open_session(agent, "sound", good.token)
    assert len(agent.run_program(session, good.token, GOOD)) == 1
    agent.shutdown()


def test_a_runner_that_dies_disturbs_no_other_session(agent: LabAgent) -> None:
    left, right = agent.acquire("left", "me", 60), agent.acquire("right", "me", 60)
    doomed, sound = open_session(agent, "left", left.token), open_session(agent, "right", right.token)
    with pytest.raises(RunnerDied, match="killed by SIGKILL"):
        agent.run_program(doomed, left.token, Program(8, (Prefill((fake_runner.DIE,)),)))
    with pytest.raises(RunnerDied, match="session is closed"):
        agent.run_program(doomed, left.token, GOOD)
    assert len(agent.run_program(sound, right.token, GOOD)) == 1
    again = open_session(agent, "left", left.token)
    assert len(agent.run_program(again, left.token, GOOD)) == 1


def test_a_hanging_device_delays_no_other(agent: LabAgent, tmp_path: Path) -> None:
    left, right = agent.acquire("left", "me", 60), agent.acquire("right", "me", 60)
    recipe = SessionRecipe(environment={"FAKE_STARTED": str(tmp_path / "started")})
    hanging = open_session(agent, "left", left.token, recipe)
    sound = open_session(agent, "right", right.token)
    hang = Program(8, (Prefill((fake_runner.HANG,)),))
    errors: list[BaseException] = []

    def call() -> None:
        try:
            agent.run_program(hanging, left.token, hang)
        except InfrastructureError as error:
            errors.append(error)

    thread = threading.Thread(target=call)
    thread.start()
    wait_for((tmp_path / "started").exists)
    assert len(agent.run_program(sound, right.token, GOOD)) == 1
    assert thread.is_alive()
    agent.release("left", left.token)
    thread.join(10)
    assert [type(error) for error in errors] == [LeaseError]


def test_threads_left_open_become_the_devices(agent: LabAgent) -> None:
    lease = agent.acquire("right", "me", 60)
    artifact = agent.deploy("right", lease.token, upload(agent).to_json())
    _, filled = agent.open_session("right", lease.token, artifact, SessionRecipe())
    _, chosen = agent.open_session("right", lease.token, artifact, SessionRecipe(threads=7))
    assert (filled.session.threads, chosen.session.threads) == (2, 7)


def test_an_unknown_device_is_named_with_those_there_are(agent: LabAgent) -> None:
    with pytest.raises(NoSuchDevice, match=r"no device 'up' at this lab host; it has \['left', 'right'\]"):
        agent.acquire("up", "me", 60)


def test_configs_must_make_sense(tmp_path: Path) -> None:
    with pytest.raises(NoSuchDevice, match="unknown kind 'toaster'"):
        LabAgent(tmp_path / "a", (DeviceConfig("x", kind="toaster"),), reap_every_s=None)
    with pytest.raises(NoSuchDevice, match="a name of its own"):
        LabAgent(tmp_path / "b", (DeviceConfig("x"), DeviceConfig("x")), reap_every_s=None)


def test_a_host_device_shares_the_agents_disk(tmp_path: Path) -> None:
    device = make_device(DeviceConfig("bench"), BlobStore(tmp_path))
    assert isinstance(device, HostDevice)
    manifest = make_manifest({"a.bin": b"a"})
    store = BlobStore(tmp_path)
    store.write(manifest.blobs[0].sha256, 0, b"a")
    store.commit(manifest.blobs[0].sha256)
    device.deploy(store.link(manifest), Deadline(10))
    assert device.bytes_moved == 0


# -- leases ----------------------------------------------------------------------------------


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


# -- artifacts -------------------------------------------------------------------------------


def test_an_upload_goes_on_where_it_stopped(agent: LabAgent) -> None:
    manifest = make_manifest({"a.bin": b"abcdef"})
    (blob,) = agent.missing_blobs(manifest.to_json())
    agent.put_chunk(blob.sha256, 0, b"abc")
    (blob,) = agent.missing_blobs(manifest.to_json())
    assert (blob.present, blob.size) == (3, 6)
    upload(agent, {"a.bin": b"abcdef"})
    assert agent.missing_blobs(manifest.to_json()) == ()


def test_deploying_what_was_not_uploaded_is_refused(agent: LabAgent) -> None:
    lease = agent.acquire("left", "me", 60)
    with pytest.raises(DeployFailed, match=r"no blob model\.onnx here"):
        agent.deploy("left", lease.token, make_manifest(CONTENTS).to_json())


def test_opening_what_was_not_deployed_is_refused(agent: LabAgent) -> None:
    lease = agent.acquire("left", "me", 60)
    with pytest.raises(DeployFailed, match="deploy it first"):
        agent.open_session("left", lease.token, upload(agent).id, RECIPE)


def test_another_lease_deploys_anew(agent: LabAgent) -> None:
    """Between the leases the artifact may have been evicted."""
    lease = agent.acquire("left", "me", 60)
    artifact = agent.deploy("left", lease.token, upload(agent).to_json())
    agent.release("left", lease.token)
    lease = agent.acquire("left", "me", 60)
    with pytest.raises(DeployFailed, match="deploy it first"):
        agent.open_session("left", lease.token, artifact, RECIPE)


def test_an_engine_refusal_passes_through_and_leaves_no_runner(tmp_path: Path) -> None:
    class Elsewhere(HostDevice):
        def deploy(self, folder: Path, deadline: Deadline) -> str:
            super().deploy(folder, deadline)
            return fake_runner.REFUSED_FOLDER

    def make(config: DeviceConfig, store: BlobStore) -> Device:
        transport = LocalTransport(GRACE_S)
        return Elsewhere(config.name, store.root, transport, store=store, runner_argv=FAKE_RUNNER)

    agent = LabAgent(tmp_path, TWO, make=make, reap_every_s=None)
    lease = agent.acquire("left", "me", 60)
    with pytest.raises(ArtifactError):
        open_session(agent, "left", lease.token)
    assert children() == set()
    agent.shutdown()


def test_room_is_made_for_what_comes_but_not_at_the_cost_of_what_is_in_use(
    tmp_path: Path, clock: Clock
) -> None:
    agent = LabAgent(tmp_path, TWO, make=make_fake, clock=clock, store_limit_bytes=12, reap_every_s=None)
    unused = upload(agent, {"unused.bin": b"uuuu"})
    clock.now += AgentBudgets().deploy_s + 1  # whoever wanted it is gone
    lease = agent.acquire("left", "me", 60)
    used = upload(agent, {"used.bin": b"UUUU"})
    agent.deploy("left", lease.token, used.to_json())
    os.utime(tmp_path / "artifacts" / used.id, (1, 1))  # the longest unused, were it not in use
    upload(agent, {"new.bin": b"nnnnnn"})
    assert agent.missing_blobs(used.to_json()) == ()
    assert [b.name for b in agent.missing_blobs(unused.to_json())] == ["unused.bin"]
    agent.shutdown()


def test_what_is_on_its_way_to_one_device_is_not_evicted_for_another(tmp_path: Path) -> None:
    agent = LabAgent(tmp_path, TWO, make=make_fake, store_limit_bytes=6, reap_every_s=None)
    lease = agent.acquire("left", "me", 60)
    mine = upload(agent, {"mine.bin": b"mmmmmm"})
    upload(agent, {"theirs.bin": b"tttttt"})
    assert agent.deploy("left", lease.token, mine.to_json()) == mine.id
    agent.release("left", lease.token)
    upload(agent, {"more.bin": b"oooooo"})
    assert [b.name for b in agent.missing_blobs(mine.to_json())] == ["mine.bin"]  # its turn is over
    agent.shutdown()


# -- the end ---------------------------------------------------------------------------------


def test_one_agent_a_root(agent: LabAgent, tmp_path: Path) -> None:
    with pytest.raises(LeaseError, match="another lab agent"):
        LabAgent(tmp_path / "lab", TWO, make=make_fake, reap_every_s=None)


def test_shutdown_stops_everything_and_answers_nothing_more(agent: LabAgent) -> None:
    lease = agent.acquire("left", "me", 60)
    open_session(agent, "left", lease.token)
    agent.shutdown()
    assert children() == set()
    for call in (agent.status, lambda: agent.acquire("left", "me", 60), lambda: agent.vitals("left")):
        with pytest.raises(InfrastructureError, match="shut down"):
            call()
    agent.shutdown()


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


def test_a_diagnosis_says_what_is_wrong_and_who_has_the_device(tmp_path: Path, clock: Clock) -> None:
    configs = (DeviceConfig("left"), DeviceConfig("broken", options={"broken": "true"}))
    agent = LabAgent(tmp_path / "diagnosed", configs, make=make_fake, clock=clock, reap_every_s=None)
    try:
        agent.acquire("broken", "alice", 30)
        well = {finding.what: finding for finding in agent.diagnose("left")}
        ill = {finding.what: finding for finding in agent.diagnose("broken")}
        assert (well["runner"].state, well["lease"].state) == ("ok", "ok")
        assert (ill["runner"].state, "unplugged" in ill["runner"].found) == ("fix", True)
        assert (ill["lease"].state, "alice" in ill["lease"].found) == ("note", True)
        clock.now += 31
        assert agent.diagnose("broken")[-1].state == "ok"
    finally:
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


def test_an_artifact_whose_blobs_are_not_here_is_told_by_its_own_error(agent: LabAgent) -> None:
    token = agent.acquire("left", "me", 30.0).token
    text = make_manifest(CONTENTS).to_json()
    with pytest.raises(BlobsMissing):
        agent.open_artifact("left", token, text, RECIPE)
    upload(agent)
    session, info = agent.open_artifact("left", token, text, RECIPE)
    assert session.startswith("left/")
    assert info.artifact_id

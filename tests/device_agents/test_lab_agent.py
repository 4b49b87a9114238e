"""LabAgent: artifacts, sessions, and devices that do not disturb each other."""

from __future__ import annotations

import os
import pickle
import threading
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
    NoSuchDevice,
    RunnerDied,
)
from device_agents.host import HostDevice
from device_agents.lab_agent import LabAgent, make_device
from device_agents.lab_types import AgentBudgets
from device_agents.local import LocalTransport
from kvengine.errors import ArtifactError
from kvengine.program import Prefill, Program, Workload
from kvengine.recipe import SessionRecipe
from tests.device_agents import fake_runner
from tests.device_agents.conftest import FAKE_RUNNER, GRACE_S, children, make_manifest, wait_for
from tests.device_agents.lab_agents import (
    CONTENTS,
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


def test_an_artifact_whose_blobs_are_not_here_is_told_by_its_own_error(agent: LabAgent) -> None:
    token = agent.acquire("left", "me", 30.0).token
    text = make_manifest(CONTENTS).to_json()
    with pytest.raises(BlobsMissing):
        agent.open_artifact("left", token, text, RECIPE)
    upload(agent)
    session, info = agent.open_artifact("left", token, text, RECIPE)
    assert session.startswith("left/")
    assert info.artifact_id

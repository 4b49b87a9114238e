"""A simulated device is a device like any other to the lab agent, and says everywhere what it is."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from device_agents.config import DeviceConfig
from device_agents.deadline import Deadline
from device_agents.errors import LeaseError, NoSuchDevice, RunnerDied
from device_agents.lab_agent import LabAgent
from device_agents.simulated import make_simulated
from device_agents.simulated.recorded import Quantiles, recording
from device_agents.simulated.session import Behaviour, SimulatedSession
from harness.inventory import DEFAULT, load, select
from kvengine.program import Decode, Extend, Generate, Prefill, Program, Reset, Rewind, Workload
from kvengine.recipe import ExportRecipe, SessionRecipe
from kvengine.session import SessionInfo
from tests.conftest import ExportTiny

FAST = {"time_scale": "0", "seed": "3"}
WORKLOAD = Workload((1, 2, 3), new_tokens=4, repeats=2)


def config(name: str = "simulated-1", **options: str) -> DeviceConfig:
    return DeviceConfig(name, "simulated", options=FAST | options)


@pytest.fixture
def agent(tmp_path: Path) -> Iterator[LabAgent]:
    made = LabAgent(tmp_path / "lab", (config(), config("fails", failure_rate="1")), reap_every_s=None)
    yield made
    made.shutdown()


def opened(agent: LabAgent, export_tiny: ExportTiny, device: str = "simulated-1") -> tuple[str, int]:
    """The very calls of a farm."""
    artifact = export_tiny(ExportRecipe())
    token = agent.acquire(device, "me", 30.0).token
    agent.claim(device, token)
    names = {blob.sha256: blob.name for blob in artifact.manifest.blobs}
    for blob in agent.missing_blobs(artifact.manifest.to_json()):
        agent.put_chunk(blob.sha256, 0, (artifact.folder / names[blob.sha256]).read_bytes())
        agent.commit_blob(blob.sha256)
    agent.deploy(device, token, artifact.manifest.to_json())
    session, info = agent.open_session(device, token, artifact.id, SessionRecipe())
    assert any(note.startswith("simulated") for note in info.notes)
    return session, token


def test_it_says_that_it_is_simulated(agent: LabAgent) -> None:
    identity = agent.identity("simulated-1")
    assert identity.kind == "simulated"
    assert "no engine" in identity.simulated


def test_a_program_is_answered_in_the_right_shapes(agent: LabAgent, export_tiny: ExportTiny) -> None:
    session, token = opened(agent, export_tiny)
    vocab = export_tiny(ExportRecipe()).manifest.spec.vocab_size
    program = Program(
        32,
        (Prefill((1, 2, 3)), Decode((4,)), Generate(5, 3), Rewind(2), Extend(((7,), (8, 9))), Reset(0)),
        batch=2,
    )
    found = agent.run_program(session, token, program)
    assert [seen.positions for seen in found] == [(3, 0), (4, 0), (7, 0), (5, 0), (6, 2), (0, 2)]
    assert [seen.logits.shape for seen in found] == [(n, vocab) for n in (3, 1, 0, 0, 3, 0)]
    assert found[2].tokens == (0, 0, 0)


def test_a_workload_takes_what_was_recorded(agent: LabAgent, export_tiny: ExportTiny) -> None:
    session, token = opened(agent, export_tiny)
    found = agent.run_workload(session, token, WORKLOAD)
    gaps = recording().of("virtual phone").itl_ms.values
    assert [len(sample.itl_ms) for sample in found.samples] == [3, 3]
    assert all(gaps[0] <= gap <= gaps[-1] for sample in found.samples for gap in sample.itl_ms)
    shown_s = sum(sample.ttft_ms + sum(sample.itl_ms) for sample in found.samples) / 1e3
    assert found.ended_s - found.began_s >= shown_s, "the warm-up is in it too"


def test_the_same_seed_draws_the_same(tmp_path: Path, export_tiny: ExportTiny) -> None:
    folder = str(export_tiny(ExportRecipe()).folder)

    def measured(**options: str) -> object:
        device = make_simulated(config(**options))
        return device.open_session(folder, SessionRecipe(), Deadline(5)).run_workload(WORKLOAD)

    assert measured() == measured()
    assert measured() != measured(seed="4")


def test_a_drawn_failure_is_one_of_infrastructure(agent: LabAgent, export_tiny: ExportTiny) -> None:
    with pytest.raises(RunnerDied, match="simulated runner died"):
        opened(agent, export_tiny, "fails")


def test_a_call_fails_as_often_as_is_asked_for_and_ends_the_session() -> None:
    info = SessionInfo("id", SessionRecipe(), 1.0, "none", "none", "none", {})
    behaviour = Behaviour(recording().of("host"), time_scale=0.0, failure_rate=1.0)
    session = SimulatedSession(info, behaviour, random.Random(1), vocab=8, age_s=0.0)
    with pytest.raises(RunnerDied, match="as its failure rate has it"):
        session.run_workload(WORKLOAD)
    with pytest.raises(RunnerDied, match="closed"):
        session.run_program(Program(8, (Prefill((1,)),)))


def test_its_work_ends_with_its_lease(agent: LabAgent, export_tiny: ExportTiny) -> None:
    session, token = opened(agent, export_tiny)
    agent.release("simulated-1", token)
    with pytest.raises(LeaseError):
        agent.run_workload(session, token, WORKLOAD)


def test_a_closed_session_answers_nothing(export_tiny: ExportTiny) -> None:
    device = make_simulated(config())
    session = device.open_session(str(export_tiny(ExportRecipe()).folder), SessionRecipe(), Deadline(5))
    session.close()
    with pytest.raises(RunnerDied, match="closed"):
        session.run_workload(WORKLOAD)


@pytest.mark.parametrize(
    "options", [{"like": "toaster"}, {"time_scale": "-1"}, {"failure_rate": "2"}, {"virtual": "true"}]
)
def test_options_that_make_no_sense_are_refused(options: dict[str, str]) -> None:
    with pytest.raises(NoSuchDevice, match=r"sought|takes"):
        make_simulated(config(**options))


def test_draws_follow_the_quantiles() -> None:
    draws = random.Random(1)
    quantiles = Quantiles((0.0, 1.0, 10.0), 3)
    found = sorted(quantiles.draw(draws) for _ in range(4000))
    assert found[2000] == pytest.approx(1.0, abs=0.2)
    assert found[0] >= 0
    assert found[-1] <= 10
    assert sum(found) / 4000 == pytest.approx(quantiles.mean, rel=0.05)


def test_the_recording_says_where_it_comes_from() -> None:
    assert {"commit", "machine", "recorded", "command"} <= recording().provenance.keys()
    for each in recording().kinds.values():
        assert each.calls >= 20
        assert list(each.itl_ms.values) == sorted(each.itl_ms.values)


def test_they_are_chosen_by_number(tmp_path: Path) -> None:
    names = select("simulated:3", DEFAULT)
    assert names == ("simulated-1", "simulated-2", "simulated-3")
    entry = DEFAULT.device("simulated-2")
    assert (entry.kind, entry.shares_cpu) == ("simulated", False)
    (tmp_path / "farm.toml").write_text('[devices.s]\nkind = "simulated"\noptions = {time_scale = "0.1"}\n')
    assert load(tmp_path / "farm.toml").device("s").config("s").options == {"time_scale": "0.1"}

"""A device's health: the golden job, who else gets a sick device, and when it is started anew."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from device_agents.api import Vitals
from device_agents.blobs import BlobStore
from device_agents.config import DeviceConfig
from device_agents.deadline import Deadline
from device_agents.errors import DeviceUnreachable, InfrastructureError, LeaseError, NoSuchDevice
from device_agents.host import HostDevice
from device_agents.lab_agent import LabAgent
from device_agents.leases.model import Request
from harness import golden
from harness.errors import GoldenJobFailed, NotFit, Quarantined
from harness.fitness import WorkThresholds
from harness.health import QUARANTINE_S, Health, waits_until_fit
from harness.inventory import DeviceEntry, Inventory
from harness.recovery import Recovery, RecoveryPolicy
from harness.reference import TransformersReference
from harness.run_options import RunOptions
from harness.spans import Recorder
from harness.store.protocol import Span
from kvengine.artifact import Artifact
from kvengine.engine import LocalEngine
from kvengine.program import Observation, OperationError, Program


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return golden.artifact(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module")
def right(artifact: Artifact) -> tuple[Observation, ...]:
    return LocalEngine.open(artifact.folder, golden.SESSION).run_program(golden.PROGRAM)


# -- the job ------------------------------------------------------------------------------------------


def test_the_answer_is_that_of_transformers(artifact: Artifact) -> None:
    reference = TransformersReference(artifact.folder.parents[1] / golden.PRESET)
    assert reference.greedy(golden.PROMPT, len(golden.TOKENS)) == golden.TOKENS
    row = reference.logits(golden.PROMPT + golden.TOKENS)[-1]
    assert list(np.argsort(row)[::-1][:5]) == list(golden.LOGITS)
    found = [row[token] for token in golden.LOGITS]
    np.testing.assert_allclose(found, list(golden.LOGITS.values()), rtol=0, atol=2e-5)


def test_a_sound_device_gives_the_answer(right: tuple[Observation, ...]) -> None:
    golden.judge("pixel", right)


def test_any_other_answer_is_the_devices_fault(right: tuple[Observation, ...]) -> None:
    first, generated, last = right
    off, nan = last.logits.copy(), last.logits.copy()
    off[0, 327] += 0.01
    nan[0, 5] = np.nan
    refused = dataclasses.replace(first, error=OperationError("CapacityExceeded", "no room"))
    wrong: dict[str, tuple[Observation, ...]] = {
        "1 observations": (first,),
        "its memory or its runtime is broken": (
            first,
            dataclasses.replace(generated, tokens=(38, *generated.tokens[1:])),
            last,
        ),
        "0.01 off": (first, generated, dataclasses.replace(last, logits=off)),
        "logits that are": (first, generated, dataclasses.replace(last, logits=nan)),
        "shape": (first, generated, dataclasses.replace(last, logits=last.logits[:, :9])),
        "no room": (refused, *right[1:]),
    }
    for said, observations in wrong.items():
        with pytest.raises(GoldenJobFailed, match=f"pixel: golden job.*{said}"):
            golden.judge("pixel", observations)


def test_a_repairer_does_it_on_a_real_runner_of_a_device_in_quarantine(
    artifact: Artifact, tmp_path: Path
) -> None:
    agent = LabAgent(tmp_path / "lab", [DeviceConfig("host")], reap_every_s=None)
    try:
        agent.quarantine("host", "silent", "ann", None)
        request = Request("1", "ann", "ann", ("host",), repair=True)
        (lease,) = agent.ask(request, wait=False).granted
        manifest = artifact.manifest.to_json()
        names = {blob.sha256: blob.name for blob in artifact.manifest.blobs}
        for blob in agent.missing_blobs(manifest):
            agent.put_chunk(blob.sha256, 0, (artifact.folder / names[blob.sha256]).read_bytes())
            agent.commit_blob(blob.sha256)
        id_ = agent.deploy("host", lease.token, manifest)
        session, _ = agent.open_session("host", lease.token, id_, golden.SESSION)
        golden.judge("host", agent.run_program(session, lease.token, golden.PROGRAM))
        agent.lift("host", "ann, for it did the golden job")
        agent.release("host", lease.token)
        assert agent.status()[0].quarantined == ""
    finally:
        agent.shutdown()


# -- when it is done ----------------------------------------------------------------------------------

PHONE, VIRTUAL, HOST = "pixel", "virtual-1", "host"
ENTRIES = {
    PHONE: DeviceEntry(kind="android", options={"serial": "39121"}),
    VIRTUAL: DeviceEntry(kind="android", options={"virtual": "true"}),
    HOST: DeviceEntry(),
}


class Session:
    def __init__(self, answer: tuple[Observation, ...]) -> None:
        self.answer = answer

    def run_program(self, program: Program) -> tuple[Observation, ...]:
        assert program == golden.PROGRAM
        return self.answer

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *_: object) -> None:
        pass


class Run:
    """As much of a run and its farm as Health asks."""

    run_id = "r1"
    inventory = Inventory(ENTRIES)

    def __init__(self, answer: tuple[Observation, ...], cache: Path, **options: Any) -> None:
        self.answer = answer
        self.options = RunOptions("farm", Path("model"), "hybrid", "store", cache=cache, **options)
        self.kept: list[Span] = []
        self.recorder = Recorder(self.kept.append)
        self.said: list[tuple[Any, ...]] = []
        self.farm: Any = self
        self.refuses: InfrastructureError | None = None
        self.now = 0.0  # s
        self.is_at: Callable[[float], Vitals] = lambda now: Vitals(at=now)

    @contextmanager
    def working(self, device: str) -> Iterator[None]:
        self.said.append(("lease", device))
        yield

    def open(self, device: str, *_: object) -> Session:
        return Session(self.answer)

    def vitals(self, device: str) -> Vitals:
        self.said.append(("vitals", device))
        return self.is_at(self.now)

    def pause(self, seconds: float) -> None:
        self.now += seconds

    def tell_wait(self, reason: str) -> None:
        self.said.append(("waits", reason))

    def quarantine(self, *said: Any) -> None:
        self.said.append(("quarantine", *said))

    def reboot(self, *said: Any) -> None:
        if self.refuses is not None:
            raise self.refuses
        self.said.append(("reboot", *said))


def health(run: Run) -> Health:
    return Health(run, run.pause, lambda: run.now)  # type: ignore[arg-type]


def test_it_is_done_once_before_work_and_again_after_a_failure(
    right: tuple[Observation, ...], tmp_path: Path
) -> None:
    run = Run(right, tmp_path)
    ours = health(run)
    ours.before_work(PHONE)
    ours.before_work(PHONE)
    assert [(span.kind, span.outcome) for span in run.kept] == [("golden", "passed")]
    ours.answers(PHONE)
    ours.before_work(PHONE)
    assert [span.outcome for span in run.kept] == ["passed", "passed"]
    assert run.said == [("vitals", PHONE), ("lease", PHONE)]


def test_a_device_that_answers_and_computes_wrongly_has_not_recovered(
    right: tuple[Observation, ...], tmp_path: Path
) -> None:
    run = Run(right[:1], tmp_path)
    with pytest.raises(GoldenJobFailed):
        health(run).answers(PHONE)
    assert [span.outcome for span in run.kept] == ["failed"]


@pytest.mark.parametrize(
    ("wanted", "who"), [("phones", {PHONE, VIRTUAL}), ("all", set(ENTRIES)), ("none", set())]
)
def test_whose_health_is_asked(
    right: tuple[Observation, ...], tmp_path: Path, wanted: Any, who: set[str]
) -> None:
    run = Run(right, tmp_path, golden=wanted)
    for device in ENTRIES:
        health(run).before_work(device)
    assert {span.device for span in run.kept} == who


# -- cool and charged before work ---------------------------------------------------------------------


def cooling(now: float) -> Vitals:
    """42 °C, then a degree less every 10 s: fit at 37 °C, though 40 °C would do to start with."""
    return Vitals(at=now, thermal_status=0, temperatures_c={"battery": 42 - now / 10}, battery_percent=100)


def charging(now: float) -> Vitals:
    """12 %, then one more every 10 s: fit at 20 %, though 15 % would do to start with."""
    return Vitals(at=now, battery_percent=12 + now / 10)


@pytest.mark.parametrize(
    ("is_at", "seconds", "why"),
    [
        (cooling, 50.0, "the battery has 42.0 °C, over 40.0 °C"),
        (charging, 80.0, "the battery is at 12 %, outside 15 to 100 %"),
        (lambda now: Vitals(at=now, thermal_status=int(now < 20)), 20.0, "thermal status is 1, not 0"),
    ],
)
def test_a_phone_that_is_not_fit_waits_and_everybody_sees_it(
    tmp_path: Path, is_at: Any, seconds: float, why: str
) -> None:
    run = Run((), tmp_path)
    run.is_at, ours = is_at, health(run)
    ours.until_fit(PHONE)
    assert (run.now, ours.waited_s) == (seconds, seconds)
    assert ("waits", f"pixel waits until it is fit: {why}") in run.said
    run.recorder.flush()
    ((waited_s, first),) = waits_until_fit(run.kept).values()
    assert (round(waited_s, 3), first) == (seconds, why)
    assert [(part.kind, part.name) for span in run.kept for part in span.parts] == [
        ("wait", f"until it is fit: {why}")
    ]


def test_it_is_looked_at_before_its_first_work_before_each_leg_and_after_a_failure(tmp_path: Path) -> None:
    run = Run((), tmp_path, golden="none")
    ours = health(run)
    ours.until_fit(PHONE)
    ours.until_fit(PHONE)
    assert run.said == [("vitals", PHONE)]
    ours.until_fit(PHONE, again=True)
    assert len(run.said) == 2
    ours.answers(PHONE)
    assert len(run.said) == 3
    ours.until_fit(PHONE)
    assert len(run.said) == 4


def test_what_has_no_battery_does_not_wait_and_the_host_is_not_asked(tmp_path: Path) -> None:
    run = Run((), tmp_path)
    for device in ENTRIES:
        health(run).until_fit(device)
    assert run.now == 0
    assert run.said == [("vitals", PHONE), ("vitals", VIRTUAL)]


def test_a_phone_that_stays_hot_is_set_aside_with_the_reason_and_is_not_sick(tmp_path: Path) -> None:
    run = Run((), tmp_path)
    run.inventory = Inventory(ENTRIES, entry=WorkThresholds(wait_s=30.0))
    run.is_at = lambda now: Vitals(at=now, thermal_status=3)
    aside, sick, retries = list[str](), list[str](), list[str]()
    recovery = Recovery(
        lambda device: None,
        on_quarantine=lambda device, evidence: aside.append(evidence),
        on_sick=lambda device, evidence: sick.append(evidence),
    )
    ours = health(run)
    with pytest.raises(
        NotFit, match=r"not fit to start within 30 s: thermal status is 3, not 0; let it cool"
    ):
        recovery.attempt(PHONE, lambda: ours.until_fit(PHONE), retries)
    assert (len(aside), sick, retries, run.now) == (1, [], [], 30.0)
    with pytest.raises(Quarantined, match="thermal status is 3"):
        recovery.attempt(PHONE, lambda: None, [])


# -- who is kept from a sick device -------------------------------------------------------------------


def test_a_sick_phone_is_for_no_run_and_what_ends_with_the_run_for_this_one_alone(tmp_path: Path) -> None:
    run = Run((), tmp_path)
    for device in ENTRIES:
        health(run).sick(device, "it is silent")
    ((_, device, evidence, by, seconds),) = run.said
    assert (device, evidence, seconds) == (PHONE, "it is silent", QUARANTINE_S)
    assert by.endswith("run r1")


class Silent:
    """Never answers; says what a recovery did about it."""

    def __init__(self, answer_s: float, restart_after_s: float = 60.0) -> None:
        self.done: list[str] = []
        self.recovery = Recovery(
            self._probe,
            RecoveryPolicy(1, answer_s, pause_s=0.005, restart_after_s=restart_after_s),
            lambda device, evidence: self.done.append("aside"),
            on_sick=lambda device, evidence: self.done.append("sick"),
            restart=self._restart,
        )

    def _probe(self, device: str) -> None:
        raise DeviceUnreachable("gone")

    def _restart(self, device: str, why: str) -> str:
        self.done.append(f"restart: {why}")
        return "reboot"

    def work(self, error: InfrastructureError) -> None:
        def fail() -> None:
            raise error

        with pytest.raises(InfrastructureError):
            self.recovery.attempt(PHONE, fail, [])


def test_a_device_that_stays_silent_is_restarted_once_and_then_sick() -> None:
    silent = Silent(answer_s=0.1, restart_after_s=0.02)
    silent.work(DeviceUnreachable("gone"))
    assert silent.done == ["restart: DeviceUnreachable: gone", "aside", "sick"]


def test_what_no_device_is_to_blame_for_makes_none_sick() -> None:
    silent = Silent(answer_s=0.1)
    silent.work(NoSuchDevice("no device 'pixel' in this farm"))
    assert silent.done == ["aside"]


# -- starting anew ------------------------------------------------------------------------------------


def test_a_silent_device_is_rebooted_only_where_the_run_may(tmp_path: Path) -> None:
    may, may_not = Run((), tmp_path, reboots=4), Run((), tmp_path)
    assert health(may).reboot(PHONE, "silent") == "rebooted"
    assert health(may_not).reboot(PHONE, "silent") == ""
    ((_, device, _, why, most),) = may.said
    assert (device, why, most, may_not.said) == (PHONE, "silent", 4, [])
    may.refuses = LeaseError("4 times in the last 24 h")
    assert health(may).reboot(PHONE, "silent") == ""


class Rebooting(HostDevice):
    reboots = 0

    def reboot(self, deadline: Deadline) -> None:
        self.reboots += 1


def test_an_agent_restarts_what_it_can_and_as_often_as_a_day_allows(tmp_path: Path) -> None:
    made: dict[str, Rebooting] = {}

    def make(config: DeviceConfig, store: BlobStore) -> HostDevice:
        if config.name == "other":
            return HostDevice(config.name, tmp_path)
        return made.setdefault(config.name, Rebooting(config.name, tmp_path))

    both = [DeviceConfig("host"), DeviceConfig("other")]
    agent = LabAgent(tmp_path / "lab", both, make=make, reap_every_s=None)
    try:
        token, other = (agent.acquire(each.name, "ann", 60).token for each in both)
        agent.reboot("host", token, "ann", "silent", 1)
        with pytest.raises(LeaseError, match="1 times in the last 24 h"):
            agent.reboot("host", token, "ann", "silent", 1)
        with pytest.raises(LeaseError, match="not the current one"):
            agent.reboot("host", token - 1, "eve", "because", 9)
        with pytest.raises(InfrastructureError, match="no way"):
            agent.reboot("other", other, "ann", "silent", 9)
        assert made["host"].reboots == 1
    finally:
        agent.shutdown()

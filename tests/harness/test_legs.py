"""A leg: one process is timed, another one is weighed, and the row says which number is of which."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import pytest

from device_agents.api import DeviceIdentity, Vitals
from device_agents.errors import RunnerDied
from device_agents.recording.record import Plan, Record
from device_agents.results import Kept, Key
from harness.farm import Farm
from harness.legs import LegPlan, Subject, measure_leg, weigh_leg
from harness.measuring import Shape
from harness.recipes import parse_recipe
from kvengine.bandwidth import Bandwidth
from kvengine.export import export
from kvengine.export.reads import weight_bytes
from kvengine.plan import CachePlan
from kvengine.program import Measurement, Sample, Workload
from kvengine.recipe import ExportRecipe
from kvengine.session import SessionInfo
from reports.results import LegResult

MIB = 1 << 20


@dataclass
class Process:
    """A session that weighs 100 MiB more the later it was opened."""

    farm: FakeFarm
    number: int
    asked: list[Workload] = field(default_factory=list)
    closed: bool = False

    def __enter__(self) -> Process:
        return self

    def __exit__(self, *_: object) -> None:
        self.closed = True

    @property
    def info(self) -> SessionInfo:
        return SessionInfo("id", parse_recipe("hybrid").session, 1.0, "1.32", "2", "3.11", {})

    def measure(self, workload: Workload, plan: Plan, key: Key | None = None, note: str = "") -> Kept:
        record = Record(note="" if self.farm.records else "not recorded: no logger here")
        kept = Kept(self.run_workload(workload), record, self.farm.vitals("host"), note)
        if key is not None:
            self.farm.results[key] = kept
        return kept

    def run_workload(self, workload: Workload) -> Measurement:
        self.asked.append(workload)
        if self.farm.dies:
            raise RunnerDied("killed")
        speed = Bandwidth(31e9, 256 * MIB, 2, 32 * MIB) if workload.bandwidth else None
        sample = Sample(5.0, (1.0,) * (workload.new_tokens - 1), tuple(range(workload.new_tokens)))
        weight = self.number * 100 * MIB
        return Measurement((sample,) * workload.repeats, 7.0, weight, 64, {}, 2, 1.0, 2.0, speed)


@dataclass
class FakeFarm:
    records: bool = True
    dies: bool = False
    others: float = 0.0  # cores at work
    asked: int = 0
    opened: list[Process] = field(default_factory=list)
    results: dict[Key, Kept] = field(default_factory=dict)

    def kept(self, name: str, key: Key) -> Kept | None:
        return self.results.get(key)

    def vitals(self, name: str) -> Vitals:
        self.asked += 1
        return Vitals(at=float(self.asked), busy_s=self.others * self.asked if self.others else None)

    def settings(self, name: str) -> dict[str, str]:
        return {}

    def open(self, *_: Any) -> Process:
        assert all(process.closed for process in self.opened), "two processes at once"
        self.opened.append(Process(self, len(self.opened) + 1))
        return self.opened[-1]


@pytest.fixture(scope="module")
def subject(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Subject:
    recipe = ExportRecipe(cache=CachePlan("hybrid", slack=4))
    artifact = export(tiny_checkpoint, tmp_path_factory.mktemp("legs") / "artifact", recipe)
    return Subject("tiny", parse_recipe("hybrid"), artifact)


def measured(
    farm: FakeFarm, subject: Subject, take: Any = measure_leg, kind: str = "host", **changes: Any
) -> LegResult:
    identity = cast(
        DeviceIdentity, type("Identity", (), {"name": "host", "kind": kind, "build": "b", "runtime": {}})
    )
    plan = LegPlan(**{"shape": Shape(8, 4, depth=16), "repeats": 3, "seed": 1, **changes})
    leg: LegResult = take(cast(Farm, farm), identity, subject, plan, "commit", lambda *_: None)
    return leg


def test_time_is_of_one_process_and_memory_of_another(subject: Subject) -> None:
    farm = FakeFarm()
    leg = measured(farm, subject)
    timed, weighed = farm.opened
    assert [(w.repeats, w.warmup) for w in timed.asked] == [(3, 1)]
    assert [(w.repeats, w.warmup) for w in weighed.asked] == [(1, 0)]
    assert timed.asked[0].prompt == weighed.asked[0].prompt
    assert len(leg.samples) == 3
    assert (leg.peak_rss_bytes, leg.memory_pass) == (200 * MIB, True)
    assert timed.closed
    assert weighed.closed


def test_what_was_measured_and_not_stored_is_not_measured_again(subject: Subject) -> None:
    farm = FakeFarm()
    first = measured(farm, subject, key="run/leg")
    assert measured(farm, subject, key="run/leg") == first, "vitals, validity and all"
    assert len(farm.opened) == 2, "a process that was timed and one that was weighed"
    measured(farm, subject, key="run/another leg")
    assert len(farm.opened) == 4
    measured(farm, subject, key="run/leg", seed=2)
    assert len(farm.opened) == 6, "another prompt is other work"


def test_without_weighing_there_is_one_process_and_the_row_says_so(subject: Subject) -> None:
    farm = FakeFarm()
    leg = measured(farm, subject, weigh=False)
    assert len(farm.opened) == 1
    assert (leg.peak_rss_bytes, leg.memory_pass) == (100 * MIB, False)


def test_the_row_tells_the_workload(subject: Subject) -> None:
    leg = measured(FakeFarm(), subject)
    assert leg.workload == "prompt 8 + 4 new at depth 16"
    assert (leg.prompt_tokens, leg.new_tokens, leg.depth) == (8, 4, 16)
    other = measured(FakeFarm(), subject, shape=Shape(8, 5))
    assert leg.provenance["tokens"] != other.provenance["tokens"]


def test_a_device_that_cannot_record_still_measures(subject: Subject) -> None:
    leg = measured(FakeFarm(records=False), subject)
    assert len(leg.samples) == 3
    assert leg.during is not None
    assert leg.during.note == "not recorded: no logger here"


def test_a_process_that_dies_is_closed_and_no_leg(subject: Subject) -> None:
    farm = FakeFarm(dies=True)
    with pytest.raises(RunnerDied):
        measured(farm, subject)
    assert [process.closed for process in farm.opened] == [True]


def test_energy_is_asked_for_only_with_a_folder(subject: Subject, tmp_path: Path) -> None:
    assert measured(FakeFarm(), subject).energy.reason == "not asked for (--energy)"
    asked = measured(FakeFarm(), subject, calibrations=tmp_path)
    assert "no battery" in asked.energy.reason


def test_a_weighing_is_one_process_without_a_speed(subject: Subject) -> None:
    farm = FakeFarm()
    leg = measured(farm, subject, take=weigh_leg, ballast_bytes=5)
    (process,) = farm.opened
    assert [(w.repeats, w.warmup, w.ballast_bytes) for w in process.asked] == [(1, 0, 5)]
    assert (leg.peak_rss_bytes, leg.memory_pass, leg.samples) == (100 * MIB, True, ())
    assert leg.validity == "VALID"


def test_the_devices_bandwidth_is_measured_where_it_is_asked_for_and_by_the_timed_process(
    subject: Subject, tmp_path: Path
) -> None:
    assert measured(FakeFarm(), subject).bandwidth is None
    farm = FakeFarm()
    leg = measured(farm, subject, bandwidth=True)
    assert leg.bandwidth is not None
    assert (leg.bandwidth.bytes_per_s, leg.bandwidth.threads) == (31e9, 2)
    timed, weighed = farm.opened
    assert [w.bandwidth for w in timed.asked + weighed.asked] == [True, False]


def test_the_row_tells_what_a_step_has_to_read(subject: Subject) -> None:
    """Prompt 8 at depth 16 and 4 new tokens: three steps, with 25, 26 and 27 tokens in the cache."""
    leg = measured(FakeFarm(), subject)
    assert leg.reads is not None
    spec, cache = subject.artifact.manifest.spec, subject.artifact.manifest.recipe.cache
    assert leg.reads.weights == weight_bytes(subject.artifact.model_path)
    assert leg.reads.kv == sum(cache.step_bytes(spec, total) for total in (25, 26, 27)) // 3


def test_what_a_simulated_device_says_is_never_valid(subject: Subject) -> None:
    leg = measured(FakeFarm(), subject, kind="simulated")
    assert leg.validity == "INVALID"
    assert "simulated: nothing was measured" in leg.reasons[0]


@pytest.mark.parametrize(("looked", "validity"), [(False, "NOISY"), (True, "VALID")])
def test_a_host_that_others_use_is_looked_at_unless_somebody_has(
    subject: Subject, looked: bool, validity: str
) -> None:
    leg = measured(FakeFarm(others=1.0), subject, looked=looked)
    assert leg.validity == validity

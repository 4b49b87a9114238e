"""One leg on a device: a fresh process that is timed, and another one that is weighed."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from device_agents.api import DeviceIdentity, Vitals
from device_agents.errors import InfrastructureError
from device_agents.recording.record import Plan, Record
from harness import measuring
from harness.during import during_info
from harness.energy import energy_of
from harness.farm import DeviceSession, Farm
from harness.inventory import SIMULATED
from harness.measuring import Shape
from harness.recipes import Recipe
from harness.sustained import sustain
from kvengine.artifact import Artifact
from kvengine.program import Measurement, Sample, Workload
from reports.results import DuringInfo, EnergyInfo, LegResult, SustainedInfo

Step = Callable[[str, int, int], None]
T = TypeVar("T")


@dataclass(frozen=True)
class Subject:
    """What is measured. model: the checkpoint's name."""

    model: str
    recipe: Recipe
    artifact: Artifact


@dataclass(frozen=True)
class LegPlan:
    """How. seed: of the prompt. weigh: peak memory in a process of its own, which does one generation.

    calibrations: folder of the energy calibrations; None: energy is not measured. slowdown,
    ballast_bytes: injected, see kvengine.program.Workload. looked: whoever takes the leg has seen to it
    that no other process is busy.
    """

    shape: Shape
    repeats: int
    seed: int
    weigh: bool = True
    calibrations: Path | None = None
    slowdown: float = 0.0
    ballast_bytes: int = 0
    looked: bool = False


@dataclass(frozen=True)
class _Ran:
    """What one process measured, or two: the other one was weighed."""

    measurement: Measurement
    during: DuringInfo
    peak_rss_bytes: int
    weighed: bool
    before: Vitals
    after: Vitals
    notes: tuple[str, ...]
    busy: float | None = None
    energy: EnergyInfo = field(default_factory=EnergyInfo)
    sustained: SustainedInfo | None = None


def measure_leg(
    farm: Farm, identity: DeviceIdentity, subject: Subject, plan: LegPlan, commit: str, on_step: Step
) -> LegResult:
    """Measure ``subject`` on the device that ``identity`` names.

    Raises:
        KvEngineError: the engine refuses the artifact or the workload.
        InfrastructureError: see Farm.
    """
    device, shape = identity.name, plan.shape
    workload = _workload(subject, plan)
    before = farm.vitals(device)
    look = identity.kind == "host" and not plan.looked
    busy = measuring.busy_cores(before, lambda: farm.vitals(device)) if look else None
    sustained, energy = None, EnergyInfo()
    with farm.open(device, subject.artifact, subject.recipe.session, on_step) as session:
        if shape.sustained_s:
            measurement, during, sustained = _sustained(session, workload, shape.sustained_s, on_step)
        else:
            measurement, during = _recorded(session, workload)
        notes = session.info.notes
        if plan.calibrations is not None:
            energy = energy_of(session, identity, workload, plan.calibrations, on_step)
    after = farm.vitals(device)
    peak = measurement.peak_rss_bytes
    if plan.weigh:
        weighed, weighing, _ = _weighed(farm, device, subject, workload, on_step)
        peak = weighed.peak_rss_bytes
        during = dataclasses.replace(during, pss_bytes=weighing.pss_bytes)
    ran = _Ran(measurement, during, peak, plan.weigh, before, after, notes, busy, energy, sustained)
    return _row(farm, identity, subject, plan, workload, commit, ran)


def weigh_leg(
    farm: Farm, identity: DeviceIdentity, subject: Subject, plan: LegPlan, commit: str, on_step: Step
) -> LegResult:
    """Peak memory alone: of a fresh process that does one generation and ends. The row has no samples, for
    a first generation tells no speed. Raises as measure_leg."""
    device, workload = identity.name, _workload(subject, plan)
    before = farm.vitals(device)
    measurement, during, notes = _weighed(farm, device, subject, workload, on_step)
    peak, after = measurement.peak_rss_bytes, farm.vitals(device)
    ran = _Ran(measurement, during, peak, True, before, after, notes)
    row = _row(farm, identity, subject, plan, workload, commit, ran)
    return dataclasses.replace(row, samples=())


def _workload(subject: Subject, plan: LegPlan) -> Workload:
    spec, shape = subject.artifact.manifest.spec, plan.shape
    workload = measuring.workload_for(
        spec, shape.prompt, shape.new_tokens, plan.repeats, plan.seed, shape.depth
    )
    return dataclasses.replace(workload, slowdown=plan.slowdown, ballast_bytes=plan.ballast_bytes)


def _weighed(
    farm: Farm, device: str, subject: Subject, workload: Workload, on_step: Step
) -> tuple[Measurement, DuringInfo, tuple[str, ...]]:
    with farm.open(device, subject.artifact, subject.recipe.session, on_step) as session:
        found = _recorded(session, dataclasses.replace(workload, repeats=1, warmup=0))
        return *found, session.info.notes


def _row(
    farm: Farm,
    identity: DeviceIdentity,
    subject: Subject,
    plan: LegPlan,
    workload: Workload,
    commit: str,
    ran: _Ran,
) -> LegResult:
    measurement = ran.measurement
    validity, reasons = measuring.judge(
        measurement, ran.before, ran.after, ran.during, ran.sustained, ran.busy
    )
    if identity.kind == SIMULATED:
        validity, reasons = "INVALID", (f"{identity.name} is simulated: nothing was measured", *reasons)
    return LegResult(
        device=identity.name,
        recipe=subject.recipe.name,
        model=subject.model,
        workload=dataclasses.replace(plan.shape, prompt=len(workload.prompt)).label,
        prompt_tokens=len(workload.prompt),
        new_tokens=workload.new_tokens,
        load_ms=measurement.load_ms,
        samples=tuple(measuring.sample_info(s) for s in measurement.samples),
        peak_rss_bytes=ran.peak_rss_bytes,
        kv_bytes=measurement.kv_bytes,
        nodes_by_provider=measurement.nodes_by_provider,
        threads=measurement.threads,
        validity=validity,
        reasons=reasons,
        vitals_before=measuring.vitals_info(ran.before),
        vitals_after=measuring.vitals_info(ran.after),
        provenance={
            "commit": commit,
            "artifact": subject.artifact.id,
            "tokens": tokens_digest(measurement.samples),
            "build": identity.build,
            "settings": ", ".join(f"{k}: {v}" for k, v in farm.settings(identity.name).items()) or "as found",
            **identity.runtime,
        },
        notes=ran.notes,
        during=ran.during,
        energy=ran.energy,
        depth=len(workload.context),
        memory_pass=ran.weighed,
        sustained=ran.sustained,
    )


def tokens_digest(samples: Sequence[Sample]) -> str:
    """sha256 of what the repeats generated: equal digests mean equal greedy tokens."""
    return hashlib.sha256(repr([sample.tokens for sample in samples[:1]]).encode()).hexdigest()


def _recorded(session: DeviceSession, workload: Workload) -> tuple[Measurement, DuringInfo]:
    """A device that cannot record still measures, and the row says so."""
    measurement, record = _with_record(session, Plan(), lambda: session.run_workload(workload))
    if not record.samples:
        return measurement, DuringInfo(note=record.note)
    return measurement, during_info(record, measurement.began_s, measurement.ended_s)


def _sustained(
    session: DeviceSession, workload: Workload, most_s: float, on_step: Step
) -> tuple[Measurement, DuringInfo, SustainedInfo]:
    plan = Plan(max_s=most_s + 900)
    run, record = _with_record(session, plan, lambda: sustain(session, workload, most_s, on_step))
    measurement = run.measurement
    info = run.info(record)
    if not record.samples:
        return measurement, DuringInfo(note=record.note), info
    return measurement, during_info(record, measurement.began_s, measurement.ended_s), info


def _with_record(session: DeviceSession, plan: Plan, work: Callable[[], T]) -> tuple[T, Record]:
    """What ``work`` returns, and what the device recorded of itself meanwhile."""
    try:
        session.start_recording(plan)
    except InfrastructureError as error:
        return work(), Record(note=f"not recorded: {error}")
    try:
        found = work()
    except BaseException:
        with contextlib.suppress(InfrastructureError):
            session.stop_recording()
        raise
    try:
        return found, session.stop_recording()
    except InfrastructureError as error:
        return found, Record(note=f"the recording is lost: {error}")

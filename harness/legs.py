"""One leg on a device: a fresh process that is timed, and another one that is weighed."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from device_agents.api import DeviceIdentity, Vitals
from device_agents.errors import InfrastructureError
from device_agents.recording.record import Plan, Record
from device_agents.results import Kept, Key
from harness import measuring
from harness.device_session import DeviceSession
from harness.during import during_info
from harness.energy import energy_of
from harness.farm import Farm
from harness.inventory import SIMULATED
from harness.measuring import Shape
from harness.recipes import Recipe
from harness.recovery import Recovery
from harness.spans import Recorder
from harness.store.protocol import Span
from harness.sustained import sustain
from kvengine.artifact import Artifact
from kvengine.codec import decode, encode
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
    that no other process is busy. key: of the leg among all that any run takes; its processes are then run
    once each, however often the leg is taken again, until Farm.acknowledge. "": nothing is kept.
    bandwidth: measure the device's afterwards, in the same process (not after a sustained run, which leaves
    the device hot).
    """

    shape: Shape
    repeats: int
    seed: int
    weigh: bool = True
    calibrations: Path | None = None
    slowdown: float = 0.0
    ballast_bytes: int = 0
    looked: bool = False
    key: str = ""
    bandwidth: bool = False


@dataclass(frozen=True)
class _Around:
    """What the harness saw around a process, kept beside its measurement. busy: cores that others used."""

    before: Vitals
    busy: float | None
    notes: tuple[str, ...]  # of its session
    settings: dict[str, str]


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
    settings: dict[str, str]
    busy: float | None = None
    energy: EnergyInfo = field(default_factory=EnergyInfo)
    sustained: SustainedInfo | None = None


def attempt_leg(
    recovery: Recovery, recorder: Recorder, device: str, what: str, take: Callable[[], LegResult]
) -> tuple[LegResult, Span]:
    """The leg, which says what it took to get it, and when that was; both are to be kept together.

    what: its name in the timeline, which also tells a leg that infrastructure stopped. Raises as
    Recovery.attempt.
    """
    retries: list[str] = []
    began = time.time()
    try:
        leg = recovery.attempt(device, take, retries)
    except InfrastructureError:
        recorder.span(Span(device, "leg", what, began, time.time(), "infrastructure", len(retries)))
        raise
    leg = dataclasses.replace(leg, retries=tuple(retries))
    return leg, recorder.whole(Span(device, "leg", what, began, time.time(), leg.validity, len(retries)))


def measure_leg(
    farm: Farm, identity: DeviceIdentity, subject: Subject, plan: LegPlan, commit: str, on_step: Step
) -> LegResult:
    """Measure ``subject`` on the device that ``identity`` names.

    Raises:
        KvEngineError: the engine refuses the artifact or the workload.
        InfrastructureError: see Farm.
    """
    device, workload = identity.name, _workload(subject, plan)
    look = identity.kind == "host" and not plan.looked
    if plan.shape.sustained_s or plan.calibrations is not None:
        ran = _long(farm, identity, subject, plan, workload, look, on_step)
    else:
        ran = _timed(farm, device, subject, plan, _telling(workload, plan), look, on_step)
    if plan.weigh:
        weighed = _weighed(farm, device, subject, plan, workload, on_step)
        ran = dataclasses.replace(
            ran,
            peak_rss_bytes=weighed.peak_rss_bytes,
            weighed=True,
            during=dataclasses.replace(ran.during, pss_bytes=weighed.during.pss_bytes),
        )
    return _row(identity, subject, plan, workload, commit, ran)


def weigh_leg(
    farm: Farm, identity: DeviceIdentity, subject: Subject, plan: LegPlan, commit: str, on_step: Step
) -> LegResult:
    """Peak memory alone: of a fresh process that does one generation and ends. The row has no samples, for
    a first generation tells no speed. Raises as measure_leg."""
    workload = _workload(subject, plan)
    ran = _weighed(farm, identity.name, subject, plan, workload, on_step)
    return dataclasses.replace(_row(identity, subject, plan, workload, commit, ran), samples=())


def _workload(subject: Subject, plan: LegPlan) -> Workload:
    spec, shape = subject.artifact.manifest.spec, plan.shape
    workload = measuring.workload_for(
        spec, shape.prompt, shape.new_tokens, plan.repeats, plan.seed, shape.depth
    )
    return dataclasses.replace(workload, slowdown=plan.slowdown, ballast_bytes=plan.ballast_bytes)


def _telling(workload: Workload, plan: LegPlan) -> Workload:
    return dataclasses.replace(workload, bandwidth=plan.bandwidth)


def _timed(
    farm: Farm, device: str, subject: Subject, plan: LegPlan, workload: Workload, look: bool, on_step: Step
) -> _Ran:
    """One process, or what one did that nobody has stored."""
    key = _key(plan, subject, workload)
    kept = farm.kept(device, key) if key else None
    if kept is None:
        before = farm.vitals(device)
        busy = measuring.busy_cores(before, lambda: farm.vitals(device)) if look else None
        with farm.open(device, subject.artifact, subject.recipe.session, on_step) as session:
            around = _Around(before, busy, session.info.notes, farm.settings(device))
            kept = session.measure(workload, Plan(), key, json.dumps(encode(around)))
    around = decode(_Around, json.loads(kept.note))
    return _Ran(
        kept.measurement,
        _during(kept),
        kept.measurement.peak_rss_bytes,
        False,
        around.before,
        kept.after or farm.vitals(device),
        around.notes,
        around.settings,
        around.busy,
    )


def _weighed(
    farm: Farm, device: str, subject: Subject, plan: LegPlan, workload: Workload, on_step: Step
) -> _Ran:
    once = dataclasses.replace(workload, repeats=1, warmup=0)
    ran = _timed(farm, device, subject, plan, once, False, on_step)
    return dataclasses.replace(ran, weighed=True)


def _long(
    farm: Farm,
    identity: DeviceIdentity,
    subject: Subject,
    plan: LegPlan,
    workload: Workload,
    look: bool,
    on_step: Step,
) -> _Ran:
    """A window of time is of one process from its beginning to its end: no part of it is kept."""
    device, energy, sustained = identity.name, EnergyInfo(), None
    before = farm.vitals(device)
    busy = measuring.busy_cores(before, lambda: farm.vitals(device)) if look else None
    with farm.open(device, subject.artifact, subject.recipe.session, on_step) as session:
        if plan.shape.sustained_s:
            measurement, during, sustained = _sustained(session, workload, plan.shape.sustained_s, on_step)
        else:
            kept = session.measure(_telling(workload, plan), Plan())
            measurement, during = kept.measurement, _during(kept)
        notes = session.info.notes
        if plan.calibrations is not None:
            energy = energy_of(session, identity, workload, plan.calibrations, on_step)
    peak, settings, after = measurement.peak_rss_bytes, farm.settings(device), farm.vitals(device)
    return _Ran(measurement, during, peak, False, before, after, notes, settings, busy, energy, sustained)


def _key(plan: LegPlan, subject: Subject, workload: Workload) -> Key | None:
    """The same for the same work alone: another artifact is never answered with this one's numbers. Whether
    the bandwidth is told besides makes it no other work."""
    if not plan.key:
        return None
    doing = json.dumps(
        encode([dataclasses.replace(workload, bandwidth=False), subject.recipe.session]), sort_keys=True
    )
    return Key(plan.key, f"{subject.artifact.id} {hashlib.sha256(doing.encode()).hexdigest()}")


def _row(
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
            "settings": ", ".join(f"{k}: {v}" for k, v in ran.settings.items()) or "as found",
            **identity.runtime,
        },
        notes=ran.notes,
        during=ran.during,
        energy=ran.energy,
        depth=len(workload.context),
        memory_pass=ran.weighed,
        sustained=ran.sustained,
        reads=measuring.step_reads(subject.artifact, workload),
        bandwidth=measuring.bandwidth_info(measurement.bandwidth),
    )


def tokens_digest(samples: Sequence[Sample]) -> str:
    """sha256 of what the repeats generated: equal digests mean equal greedy tokens."""
    return hashlib.sha256(repr([sample.tokens for sample in samples[:1]]).encode()).hexdigest()


def _during(kept: Kept) -> DuringInfo:
    """A device that cannot record still measures, and the row says so."""
    if not kept.record.samples:
        return DuringInfo(note=kept.record.note)
    return during_info(kept.record, kept.measurement.began_s, kept.measurement.ended_s)


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

"""One leg of a block: the device fit, a fresh process, the workload, and what to believe of it."""

from __future__ import annotations

import contextlib
import hashlib
import json
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from device_agents.api import DeviceIdentity, Vitals
from device_agents.errors import InfrastructureError
from device_agents.recording.record import Plan
from harness import measuring
from harness.during import during_info
from harness.energy import Step, energy_of
from harness.farm import DeviceSession, Farm
from harness.gate.canary import Canary
from harness.gate.entry import Waited
from harness.gate.references import Resolved
from kvengine.artifact import Artifact
from kvengine.program import Measurement, Workload
from reports.gate_results import Place
from reports.results import DuringInfo, EnergyInfo, LegResult, SampleInfo


@dataclass(frozen=True)
class Legs:
    """Takes legs on one device.

    commit: of the harness. cache: for the energy's calibrations. energy: measure it too, minutes a leg.
    """

    farm: Farm
    device: str
    identity: DeviceIdentity
    commit: str
    cache: Path
    energy: bool
    on_step: Step

    def take(self, side: Resolved, workload: Workload, place: Place, waited: Waited) -> LegResult:
        """One fresh-process leg of ``side``.

        Raises:
            KvEngineError: the engine refuses the artifact or the workload. InfrastructureError.
        """
        before = self.farm.vitals(self.device)
        session = self.farm.open(self.device, side.artifact, side.session, self.on_step)
        try:
            measurement, during = self._measured(session, workload)
            energy = EnergyInfo()
            if self.energy:
                folder = self.cache / "calibrations"
                energy = energy_of(session, self.identity, workload, folder, self.on_step)
            notes = session.info.notes
        finally:
            session.close()
        after = self.farm.vitals(self.device)
        leg = self._result(side.side.recipe, side.model, side.artifact, workload, measurement, before, after)
        leg = replace(
            leg, notes=notes, energy=energy, during=during, place=_placed(place, measurement, waited)
        )
        return _judged(leg, measurement, before, after, during, waited)

    def take_canary(self, canary: Canary, place: Place) -> LegResult:
        """The canary's leg, of each repeat the median; its session stays open. Raises InfrastructureError."""
        before = self.farm.vitals(self.device)
        measurement = canary.run()
        artifact = canary.artifact
        model = artifact.manifest.checkpoint
        leg = self._result("canary", model, artifact, canary.workload, measurement, before, before)
        medians = tuple(SampleInfo(s.ttft_ms, (float(np.median(s.itl_ms)),)) for s in measurement.samples)
        return replace(leg, samples=medians, place=_placed(place, measurement, Waited()))

    def _measured(self, session: DeviceSession, workload: Workload) -> tuple[Measurement, DuringInfo | None]:
        """A phone records itself meanwhile; a host tells no more than its vitals do."""
        if self.identity.kind != "android":
            return session.run_workload(workload), None
        try:
            session.start_recording(Plan())
        except InfrastructureError as error:
            return session.run_workload(workload), DuringInfo(note=f"not recorded: {error}")
        try:
            measurement = session.run_workload(workload)
        except BaseException:
            with contextlib.suppress(InfrastructureError):
                session.stop_recording()
            raise
        try:
            record = session.stop_recording()
        except InfrastructureError as error:
            return measurement, DuringInfo(note=f"the recording is lost: {error}")
        return measurement, during_info(record, measurement.began_s, measurement.ended_s)

    def _result(
        self,
        recipe: str,
        model: str,
        artifact: Artifact,
        workload: Workload,
        measurement: Measurement,
        before: Vitals,
        after: Vitals,
    ) -> LegResult:
        settings = ", ".join(f"{k}: {v}" for k, v in self.farm.settings(self.device).items())
        return LegResult(
            device=self.device,
            recipe=recipe,
            model=model,
            workload=f"prompt {len(workload.prompt)} + {workload.new_tokens} new",
            prompt_tokens=len(workload.prompt),
            new_tokens=workload.new_tokens,
            load_ms=measurement.load_ms,
            samples=tuple(measuring.sample_info(s) for s in measurement.samples),
            peak_rss_bytes=measurement.peak_rss_bytes,
            kv_bytes=measurement.kv_bytes,
            nodes_by_provider=measurement.nodes_by_provider,
            threads=measurement.threads,
            validity="VALID",
            reasons=(),
            vitals_before=measuring.vitals_info(before),
            vitals_after=measuring.vitals_info(after),
            provenance={
                "commit": self.commit,
                "artifact": artifact.id,
                "build": self.identity.build,
                "settings": settings or "as found",
                **self.identity.runtime,
            },
        )


def _placed(place: Place, measurement: Measurement, waited: Waited) -> Place:
    tokens = json.dumps([sample.tokens for sample in measurement.samples])
    digest = hashlib.sha256(tokens.encode()).hexdigest() if measurement.samples else ""
    return replace(place, tokens=digest, waited_s=waited.seconds, given_up=waited.given_up)


def _judged(
    leg: LegResult,
    measurement: Measurement,
    before: Vitals,
    after: Vitals,
    during: DuringInfo | None,
    waited: Waited,
) -> LegResult:
    """With its validity: what harness.measuring says, and NOISY for a device that was not fit to start.

    The load average is left out of it: one leg after the other, it is our own. What others do to a host
    was looked at before the leg (harness.gate.entry).
    """
    validity, reasons = measuring.judge(measurement, replace(before, load_1m=None), after, during)
    if waited.given_up:
        validity = "NOISY" if validity == "VALID" else validity
        reasons = (*reasons, f"started all the same after {waited.seconds:.0f} s: {waited.given_up}")
    return replace(leg, validity=validity, reasons=reasons)

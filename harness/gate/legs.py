"""One leg of a block: a fresh process as harness.legs measures it, and where it stands in its block."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from device_agents.api import DeviceIdentity
from harness import measuring
from harness.entry import Waited
from harness.farm import Farm
from harness.gate.canary import Canary
from harness.gate.references import Resolved
from harness.legs import LegPlan, Step, Subject, measure_leg, weigh_leg
from reports.gate_results import Place
from reports.results import LegResult, SampleInfo


@dataclass(frozen=True)
class Legs:
    """Takes legs on one device. commit: of the harness. cache: folder with the energy's calibrations."""

    farm: Farm
    identity: DeviceIdentity
    commit: str
    cache: Path
    on_step: Step

    @property
    def device(self) -> str:
        return self.identity.name

    def take(self, side: Resolved, plan: LegPlan, place: Place, waited: Waited) -> LegResult:
        """One fresh-process leg of ``side``; NOISY where the device was not fit to start.

        Raises as harness.legs.measure_leg.
        """
        leg = measure_leg(self.farm, self.identity, _subject(side), plan, self.commit, self.on_step)
        tokens = leg.provenance["tokens"] if leg.samples else ""
        leg = replace(
            leg,
            place=replace(place, tokens=tokens, waited_s=waited.seconds, given_up=waited.given_up),
        )
        if not waited.given_up:
            return leg
        reason = f"started all the same after {waited.seconds:.0f} s: {waited.given_up}"
        validity = "NOISY" if leg.validity == "VALID" else leg.validity
        return replace(leg, validity=validity, reasons=(*leg.reasons, reason))

    def weigh(self, side: Resolved, plan: LegPlan, place: Place) -> LegResult:
        """Peak memory of ``side`` in a process of its own. Raises as harness.legs.weigh_leg."""
        leg = weigh_leg(self.farm, self.identity, _subject(side), plan, self.commit, self.on_step)
        return replace(leg, place=place)

    def take_canary(self, canary: Canary, place: Place) -> LegResult:
        """The canary's leg, of each repeat the median; its session stays open. Raises InfrastructureError."""
        vitals = measuring.vitals_info(self.farm.vitals(self.device))
        measurement, workload = canary.run(), canary.workload
        return LegResult(
            device=self.device,
            recipe="canary",
            model=canary.artifact.manifest.checkpoint,
            workload=f"prompt {len(workload.prompt)} + {workload.new_tokens} new",
            prompt_tokens=len(workload.prompt),
            new_tokens=workload.new_tokens,
            load_ms=measurement.load_ms,
            samples=tuple(SampleInfo(s.ttft_ms, (float(np.median(s.itl_ms)),)) for s in measurement.samples),
            peak_rss_bytes=measurement.peak_rss_bytes,
            kv_bytes=measurement.kv_bytes,
            nodes_by_provider=measurement.nodes_by_provider,
            threads=measurement.threads,
            validity="VALID",
            reasons=(),
            vitals_before=vitals,
            vitals_after=vitals,
            provenance={"commit": self.commit, "artifact": canary.artifact.id, **self.identity.runtime},
            place=place,
        )


def _subject(side: Resolved) -> Subject:
    return Subject(side.model, side.recipe, side.artifact)

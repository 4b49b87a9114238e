"""What a gate or a calibration is about to measure."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from harness.gate.blocks import Track
from harness.gate.metrics import METRICS, Metric
from harness.gate.references import Resolved
from harness.gate.settings import GateSettings, WorkloadSettings
from harness.gate.statistics import look_alpha
from harness.gate.waivers import Waiver
from kvengine.codec import encode
from reports.gate_results import AA, Comparison, Injection


@dataclass(frozen=True)
class Plan:
    """baseline, candidate: in a calibration the same. looks: those of ``settings`` that are taken.

    cache: folder for artifacts and calibrations. command: as given, for the report.
    """

    kind: Literal["gate", "calibration"]
    baseline: Resolved
    candidate: Resolved
    comparisons: tuple[Comparison, ...]
    devices: tuple[str, ...]
    settings: GateSettings
    settings_from: str
    looks: tuple[int, ...]
    seed: int
    cache: Path
    command: str
    waivers: tuple[Waiver, ...] = ()
    energy: bool = False
    tags: tuple[str, ...] = ()

    @property
    def model(self) -> str:
        return self.baseline.model

    @property
    def level(self) -> float:
        """alpha of one look: of all that the settings have, also where fewer are taken."""
        return look_alpha(self.settings.alpha, len(self.settings.looks))

    @property
    def metrics(self) -> tuple[Metric, ...]:
        """Those that are judged; a calibration has no use for what is equal or not."""
        return tuple(
            metric
            for metric in METRICS.values()
            if (metric.name != "energy" or self.energy) and not (metric.exact and self.kind == "calibration")
        )

    @property
    def tracks(self) -> tuple[Track, ...]:
        return tuple(
            Track(device, comparison.name, workload.name)
            for device in self.devices
            for comparison in self.comparisons
            for workload in self.settings.workloads
        )

    @property
    def key(self) -> str:
        """Equal plans have equal keys: a killed run goes on with the same command and code."""
        said = {
            "kind": self.kind,
            "sides": [[s.artifact.id, encode(s.session)] for s in (self.baseline, self.candidate)],
            "comparisons": encode(self.comparisons),
            "devices": self.devices,
            "settings": encode(self.settings),
            "looks": self.looks,
            "energy": self.energy,
            "tag": ",".join(self.tags),
        }
        return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()[:16]

    def workload(self, name: str) -> WorkloadSettings:
        return next(w for w in self.settings.workloads if w.name == name)

    def comparison(self, name: str) -> Comparison:
        return next(c for c in self.comparisons if c.name == name)


def calibration_comparisons(injected: tuple[float, ...]) -> tuple[Comparison, ...]:
    """A/A, then one for each injected share of time and of memory."""
    return (
        Comparison(AA),
        *(Comparison(f"+{100 * share:g} %", Injection(share, share)) for share in injected),
    )

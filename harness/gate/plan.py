"""What a gate or a calibration is about to measure."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from harness.errors import HarnessError
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

    cache: folder for artifacts and calibrations. command: as given, for the report. drill: what was made
    wrong on purpose, "" for nothing. slots: of a night's A/A, the tracks that get blocks tonight; earlier:
    blocks of earlier nights' slots, by id of the gate's cell, which tonight's are judged with.
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
    drill: str = ""
    slots: tuple[Track, ...] = ()
    earlier: Mapping[str, tuple[float, ...]] = field(default_factory=dict)

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
        return self.slots or tuple(
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
            "drill": self.drill,
            "slots": encode(self.slots),
        }
        return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()[:16]

    def with_slots(self, slots: tuple[Track, ...], each: int) -> Plan:
        """Only these tracks, with so many blocks each."""
        return replace(self, slots=slots, looks=(each,))

    def workload(self, name: str) -> WorkloadSettings:
        return next(w for w in self.settings.workloads if w.name == name)

    def comparison(self, name: str) -> Comparison:
        return next(c for c in self.comparisons if c.name == name)


def looks_up_to(rules: GateSettings, most: int | None) -> tuple[int, ...]:
    """Looks of at most ``most`` blocks; each still has only its own share of alpha. Raises HarnessError."""
    looks = tuple(look for look in rules.looks if most is None or look <= most)
    if not looks:
        raise HarnessError(f"blocks {most}: the first look is at {rules.looks[0]} blocks; give at least that")
    return looks


def must_fit(baseline: Resolved, candidate: Resolved, rules: GateSettings) -> None:
    """Both sides must get the very same prompts. Raises HarnessError."""
    specs = [side.artifact.manifest.spec for side in (baseline, candidate)]
    if specs[0].vocab_size != specs[1].vocab_size:
        raise HarnessError(
            f"sought two sides that read the same tokens, found vocabularies of {specs[0].vocab_size:,} "
            f"({baseline.side.ref}) and {specs[1].vocab_size:,} ({candidate.side.ref})"
        )
    room = min(spec.max_position for spec in specs)
    for workload in rules.workloads:
        if workload.prompt + workload.new_tokens + workload.depth > room:
            raise HarnessError(f"workload {workload.name} does not fit: both sides hold {room:,} tokens")


def calibration_comparisons(injected: tuple[float, ...]) -> tuple[Comparison, ...]:
    """A/A, then one for each injected share of time and of memory."""
    return (
        Comparison(AA),
        *(Comparison(f"+{100 * share:g} %", Injection(share, share)) for share in injected),
    )

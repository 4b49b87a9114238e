"""Whole gates and calibrations over made-up devices, all in one store."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, cast

from harness.farm import Farm
from harness.gate.blocks import Track
from harness.gate.calibration import aa_runs, waiting
from harness.gate.plan import Plan, calibration_comparisons
from harness.gate.references import Resolved
from harness.gate.session import GateSession, Watcher
from harness.gate.settings import EntrySettings, GateSettings, WorkloadSettings
from harness.store import open_store
from reports.gate_results import AA, GATE, Comparison, GateCell, GateInfo
from reports.results import RunResults
from tests.harness.gate.fake_farm import FakeDevice, FakeFarm

SETTINGS = GateSettings(
    looks=(4, 8, 16),
    workloads=(WorkloadSettings(8, 4, 1),),
    entry=EntrySettings(wait_s=0.0, wait_total_s=0.0),
)
WEIGHED = 4 * 2  # legs: pairs of fresh processes that are weighed
FIRST_LOOK = 4 * 6 + WEIGHED  # legs: A B B A and two canaries in each block


class Gate:
    """Runs gates and calibrations on fake devices, all in one store."""

    def __init__(self, baseline: Resolved, candidate: Resolved, cache: Path, store: Path) -> None:
        self.baseline, self.candidate, self.cache, self.path = baseline, candidate, cache, store
        self.notes: list[str] = []
        self.looks: list[int] = []
        self.farm = FakeFarm({})
        self.tokens: dict[str, int] = {}
        self.seed = 7

    def run(self, *devices: FakeDevice, **changes: Any) -> RunResults:
        self.farm = FakeFarm({d.name: d for d in devices}, self.candidate.artifact.id, self.tokens, self.seed)
        plan = Plan(
            kind="gate",
            baseline=self.baseline,
            candidate=self.candidate,
            comparisons=(Comparison(GATE),),
            devices=tuple(d.name for d in devices),
            settings=SETTINGS,
            settings_from="defaults",
            looks=SETTINGS.looks,
            seed=1,
            cache=self.cache,
            command="kvfarm gate",
        )
        plan = replace(plan, **changes)
        watcher = Watcher(
            on_step=lambda stage, done, total: None,
            on_block=lambda block, done, total, left: None,
            on_look=lambda info, number: self.looks.append(number),
            on_note=self.notes.append,
        )
        with open_store(self.path) as store:
            return GateSession(plan, cast(Farm, self.farm), store, watcher).run()

    def calibrate(self, *devices: FakeDevice, injected: tuple[float, ...] = (0.05,)) -> RunResults:
        return self.run(
            *devices,
            kind="calibration",
            candidate=self.baseline,
            comparisons=calibration_comparisons(injected),
            looks=(4,),
        )

    def night(self, device: FakeDevice) -> RunResults:
        """One A/A block, judged with those of the nights before."""
        with open_store(self.path) as store:
            earlier = waiting(aa_runs(store))
        return self.run(
            device,
            kind="calibration",
            candidate=self.baseline,
            comparisons=(Comparison(AA),),
            slots=(Track(device.name, AA, SETTINGS.workloads[0].name),),
            looks=(1,),
            earlier=earlier,
        )


def info(results: RunResults) -> GateInfo:
    assert results.gate is not None
    return results.gate


def cell(results: RunResults, metric: str, device: str = "phone", comparison: str = GATE) -> GateCell:
    (found,) = [
        c for c in info(results).cells if (c.metric, c.device, c.comparison) == (metric, device, comparison)
    ]
    return found

"""The share of the night that is A/A, through the gate's own code; it adds to that of earlier nights."""

from __future__ import annotations

import secrets
from pathlib import Path

from harness.gate import calibration
from harness.gate.outputs import write_gate_report
from harness.gate.plan import Plan
from harness.gate.running import run_plan
from harness.gate.slots import slots
from harness.nightly.parts import Found, Night
from reports import gate_view
from reports.gate_night import NightWord
from reports.gate_results import AA, Comparison, GateInfo


class Calibrate:
    """Informs, and takes gating rights; see harness.gate.calibration."""

    name, title, decides = "calibrate", "Calibration (A/A)", False

    def run(self, night: Night, folder: Path) -> Found:
        plan = aa_plan(night)
        if not plan.slots:
            return Found("PASS", "No A/A tonight", "calibrate.share is 0.", page=False)
        results = run_plan(plan, night.inventory, night.settings.farm_address, night.store, night.watcher)
        write_gate_report(results, folder)
        assert results.gate is not None
        told = gate_view.summary(results.gate)
        word: NightWord = results.gate.verdict
        sentence = f"{told.sentence} {gate_view.calibration_sentence(results.gate.calibration)}"
        return Found(word, told.headline, sentence, _revoked(results.gate), results.run_id)


def aa_plan(night: Night) -> Plan:
    """The baseline against itself on the tracks whose turn it is; no slots for a share of 0."""
    runs = calibration.aa_runs(night.store)
    whole = Plan(
        kind="calibration",
        baseline=night.baseline,
        candidate=night.baseline,
        comparisons=(Comparison(AA),),
        devices=night.devices,
        settings=night.rules,
        settings_from=night.rules_from,
        looks=night.rules.looks[:1],
        seed=secrets.randbits(32),
        cache=night.cache,
        command=night.command,
        earlier=calibration.waiting(runs),
    )
    share, taken = night.settings.calibrate.share, calibration.blocks_taken(runs)
    chosen, each = slots(whole.tracks, night.rules.looks[0], share, taken)
    return whole.with_slots(chosen, each)


def _revoked(gate: GateInfo) -> tuple[str, ...]:
    cells = gate.calibration.cells if gate.calibration else ()
    return tuple(
        f"{cell.device} {cell.workload} {cell.title.lower()} does not gate: {cell.revoked}."
        for cell in cells
        if cell.revoked
    )

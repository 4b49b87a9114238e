"""How often this gate is wrong here: what the calibrations in the store say, and who loses its rights.

A calibration is a gate whose candidate is the baseline (A/A), and the same with a loss injected. A
cell whose newest A/A interval excludes 0, or whose A/A blocks scatter more than its margin, may not
gate: its verdicts would be this device's noise.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from harness.gate.statistics import detectable, proportion
from harness.store.protocol import Store
from reports.gate_results import AA, CalibratedCell, CalibrationInfo, GateCell, GateInfo, InjectionFound
from reports.gate_view import percent
from reports.results import RunResults

MOST_RUNS = 30  # the newest that count: a farm changes


def known_calibration(store: Store) -> CalibrationInfo | None:
    """Of the finished calibrations in ``store``; None if there is none."""
    return calibration_info(store.headers(kind="calibration", finished=True, limit=MOST_RUNS))


def calibration_info(runs: Sequence[RunResults]) -> CalibrationInfo | None:
    """Of ``runs``, calibrations, newest first; None for none."""
    gates = [run.gate for run in runs if run.gate is not None]
    tried = [cell for gate in gates for cell in gate.cells if _is_trial(cell)]
    if not gates:
        return None
    wrong = sum(cell.verdict == "REGRESSED" for cell in tried)
    low, high = proportion(wrong, len(tried))
    newest: dict[str, tuple[GateCell, GateInfo]] = {}
    for gate in gates:
        for cell in gate.cells:
            if cell.comparison == AA and not cell.exact and not cell.units:
                newest.setdefault(cell.id, (cell, gate))
    return CalibrationInfo(
        runs=tuple(run.run_id for run in runs),
        at=runs[0].started_at,
        trials=len(tried),
        false_regressed=wrong,
        false_low=low,
        false_high=high,
        cells=tuple(_cell(cell, gate, tried) for cell, gate in newest.values()),
    )


def revoked(cell: GateCell) -> str:
    """Why an A/A cell takes its gating rights away, "" if it does not."""
    if cell.verdict == "REGRESSED":
        return f"it calls the same code REGRESSED ({cell.reason})"
    if cell.low is not None and cell.high is not None and (cell.low > 0 or cell.high < 0):
        return f"the same code differs by {percent(cell.low)} to {percent(cell.high)}"
    if cell.sd is not None and cell.sd > math.log1p(cell.margin):
        return (
            f"blocks of the same code scatter by {percent(cell.sd, False)}, over the margin of "
            f"{percent(cell.margin, False)}"
        )
    return ""


def _is_trial(cell: GateCell) -> bool:
    """An A/A verdict that was reached. Exact metrics have no error rate."""
    return cell.comparison == AA and not cell.exact and cell.verdict != "INVALID"


def _cell(cell: GateCell, gate: GateInfo, tried: Sequence[GateCell]) -> CalibratedCell:
    mine = [other for other in tried if other.id == cell.id]
    limit = math.log1p(cell.margin)
    return CalibratedCell(
        device=cell.device,
        model=cell.model,
        workload=cell.workload,
        metric=cell.metric,
        title=cell.title,
        margin=cell.margin,
        trials=len(mine),
        false_regressed=sum(other.verdict == "REGRESSED" for other in mine),
        estimate=cell.estimate,
        low=cell.low,
        high=cell.high,
        sd=cell.sd,
        detectable_8=None if cell.sd is None else detectable(cell.sd, 8, gate.level, limit),
        detectable_32=None if cell.sd is None else detectable(cell.sd, 32, gate.level, limit),
        found=_found(cell, gate),
        revoked=revoked(cell),
    )


def _found(cell: GateCell, gate: GateInfo) -> tuple[InjectionFound, ...]:
    """What became of each loss that was injected into this cell in the same run."""
    found = []
    for comparison in gate.comparisons:
        if comparison.name == AA:
            continue
        share = comparison.injection.memory if cell.metric == "memory" else comparison.injection.slowdown
        for other in gate.cells:
            same = (other.device, other.workload, other.metric) == (cell.device, cell.workload, cell.metric)
            if same and other.comparison == comparison.name:
                found.append(InjectionFound(comparison.name, share, other.estimate, other.verdict))
    return tuple(found)

"""How often this gate is wrong here: what all A/A in the store says, and who loses its rights.

A/A is a comparison of the same artifact with itself: of a calibration, of the slots that a night gives
to it, of a gate whose sides are the same. Blocks of a night's slots are few, so they add up over nights:
so many in a row as the gate's first look takes are one verdict. A cell whose newest A/A interval excludes
0, or whose newest A/A blocks scatter more than its margin, may not gate: its verdicts would be this
device's noise. It gates again as soon as newer blocks say otherwise.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from harness.gate.judging import Judged, judge_cells
from harness.gate.statistics import detectable, proportion
from harness.store.protocol import GateKind, Store
from reports.gate_results import (
    CalibratedCell,
    CalibrationInfo,
    Comparison,
    GateCell,
    GateInfo,
    GateVerdict,
    Injection,
    InjectionFound,
)
from reports.gate_view import percent
from reports.results import RunResults

MOST_RUNS = 100  # the newest that count: a farm changes


def known_calibration(store: Store) -> CalibrationInfo | None:
    """Of all finished A/A in ``store``; None if there is none."""
    return calibration_info(aa_runs(store))


def aa_runs(store: Store) -> tuple[RunResults, ...]:
    """Headers of finished runs that compared something with itself, newest first."""
    kinds: tuple[GateKind, ...] = ("calibration", "gate")
    found = [
        run for kind in kinds for run in store.headers(kind=kind, aa=True, finished=True, limit=MOST_RUNS)
    ]
    return tuple(sorted(found, key=lambda run: run.started_at, reverse=True)[:MOST_RUNS])


def calibration_info(runs: Sequence[RunResults]) -> CalibrationInfo | None:
    """Of ``runs``, newest first; None for none."""
    cells: dict[str, _Cell] = {}
    for run in reversed(runs):
        if run.gate is not None:
            _add(cells, run.gate)
    if not runs:
        return None
    verdicts = [verdict for cell in cells.values() for verdict in cell.verdicts]
    wrong = verdicts.count("REGRESSED")
    low, high = proportion(wrong, len(verdicts))
    return CalibrationInfo(
        runs=tuple(run.run_id for run in runs),
        at=runs[0].started_at,
        trials=len(verdicts),
        false_regressed=wrong,
        false_low=low,
        false_high=high,
        cells=tuple(cell.told() for cell in cells.values() if cell.newest is not None),
    )


def revoked(judged: Judged, margin: float) -> str:
    """Why an A/A verdict takes the cell's gating rights away, "" if it does not."""
    if judged.verdict == "REGRESSED":
        return f"it calls the same code REGRESSED ({judged.reason})"
    if judged.low is not None and judged.high is not None and (judged.low > 0 or judged.high < 0):
        return f"the same code differs by {percent(judged.low)} to {percent(judged.high)}"
    if judged.sd is not None and judged.sd > math.log1p(margin):
        return (
            f"blocks of the same code scatter by {percent(judged.sd, False)}, over the margin of "
            f"{percent(margin, False)}"
        )
    return ""


def waiting(runs: Sequence[RunResults]) -> dict[str, tuple[float, ...]]:
    """Blocks of earlier nights' slots that no verdict was made of yet, by id of the gate's cell."""
    cells: dict[str, _Cell] = {}
    for run in reversed(runs):
        if run.gate is not None:
            _add(cells, run.gate)
    return {id: tuple(cell.waiting) for id, cell in cells.items()}


def blocks_taken(runs: Sequence[RunResults]) -> dict[tuple[str, str], int]:
    """A/A blocks by (device, workload)."""
    found: dict[tuple[str, str], int] = {}
    for run in runs:
        for block in run.gate.blocks if run.gate else ():
            if not block.reasons:
                key = block.device, block.workload
                found[key] = found.get(key, 0) + 1
    return found


@dataclass
class _Cell:
    """What all A/A says of one cell, added up from the oldest to the newest.

    blocks: all A/A data. waiting: those of slots that are in no verdict yet. window: how many of the newest
    ``blocks`` are judged today.
    """

    newest: tuple[GateCell, GateInfo] | None = None
    size: int = 0
    window: int = 0
    blocks: list[float] = field(default_factory=list)
    waiting: list[float] = field(default_factory=list)
    verdicts: list[GateVerdict] = field(default_factory=list)
    found: tuple[InjectionFound, ...] = ()

    def add(self, cell: GateCell, gate: GateInfo) -> None:
        self.newest = cell, gate
        self.size = gate.slots or gate.looks[0]
        self.window = max(self.size, len(cell.blocks))
        self.blocks += cell.blocks
        if not gate.slots:
            self.verdicts += [cell.verdict] if cell.verdict != "INVALID" else []
            return
        self.waiting += cell.blocks
        while len(self.waiting) >= self.size:
            self.verdicts.append(self.judge(self.waiting[: self.size]).verdict)
            del self.waiting[: self.size]

    @property
    def known(self) -> tuple[GateCell, GateInfo]:
        """Of the newest A/A."""
        assert self.newest is not None
        return self.newest

    def judge(self, blocks: Sequence[float]) -> Judged:
        """As the gate does, the cell alone."""
        cell, gate = self.known
        margins, needed = {cell.id: cell.margin}, {cell.id: self.size}
        return judge_cells({cell.id: blocks}, margins, [[cell.id]], needed, gate.level)[cell.id]

    def told(self) -> CalibratedCell:
        cell, gate = self.known
        level, limit = gate.level, math.log1p(cell.margin)
        judged = self.judge(self.blocks[-self.window :])
        sd = judged.sd
        return CalibratedCell(
            device=cell.device,
            model=cell.model,
            workload=cell.workload,
            metric=cell.metric,
            title=cell.title,
            margin=cell.margin,
            trials=len(self.verdicts),
            false_regressed=self.verdicts.count("REGRESSED"),
            estimate=judged.estimate,
            low=judged.low,
            high=judged.high,
            sd=sd,
            detectable_8=None if sd is None else detectable(sd, 8, level, limit),
            detectable_32=None if sd is None else detectable(sd, 32, level, limit),
            found=self.found,
            revoked=revoked(judged, cell.margin),
            blocks=len(self.blocks),
            waiting=len(self.waiting),
            size=self.size,
        )


def _add(cells: dict[str, _Cell], gate: GateInfo) -> None:
    for comparison in gate.comparisons:
        mine = [cell for cell in gate.cells if cell.comparison == comparison.name and not cell.exact]
        for cell in mine:
            if cell.units:
                continue
            record = cells.setdefault(_key(cell), _Cell())
            if comparison.injection == Injection():
                record.add(cell, gate)
    for key, found in _found(gate):
        cells[key].found = found


def _key(cell: GateCell) -> str:
    """As gate.toml's globs see it: without the comparison."""
    return f"{cell.device}/{cell.model}/{cell.workload}/{cell.metric}"


def _found(gate: GateInfo) -> Iterator[tuple[str, tuple[InjectionFound, ...]]]:
    """What became of each loss that was injected in this run, by cell; nothing where none was."""
    found: dict[str, list[InjectionFound]] = {}
    for comparison in gate.comparisons:
        for cell in gate.cells:
            if cell.comparison != comparison.name or cell.exact or cell.units:
                continue
            share = comparison.injection.memory if cell.metric == "memory" else comparison.injection.slowdown
            if share:
                told = InjectionFound(_name(comparison), share, cell.estimate, cell.verdict)
                found.setdefault(_key(cell), []).append(told)
    return ((key, tuple(losses)) for key, losses in found.items())


def _name(comparison: Comparison) -> str:
    injected = comparison.injection
    return f"+{100 * (injected.slowdown or injected.memory):g} %"

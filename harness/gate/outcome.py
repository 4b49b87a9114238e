"""From stored legs and blocks to cells, and from cells to the one verdict of the gate."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import date

import numpy as np

from harness.gate import judging, waivers, weighing
from harness.gate.blocks import Track
from harness.gate.judging import Judged
from harness.gate.metrics import Metric, tails
from harness.gate.plan import Plan
from harness.gate.statistics import MIN_UNITS
from reports.gate_results import AA, Arm, BlockInfo, CalibrationInfo, GateCell, GateInfo, GateVerdict
from reports.gate_view import percent
from reports.results import DeviceInfo, LegResult

ARMS: tuple[Arm, ...] = ("baseline", "candidate")
EXIT_CODES: dict[GateVerdict, int] = {"PASS": 0, "REGRESSED": 1, "INCONCLUSIVE": 3, "INVALID": 4}


@dataclass(frozen=True)
class Measured:
    """All there is so far. gave_up: why no further block of a track is tried. looks: taken so far."""

    legs: Mapping[Track, Sequence[LegResult]]
    weighings: Mapping[Track, Sequence[LegResult]]
    blocks: Mapping[Track, Sequence[BlockInfo]]
    devices: Mapping[str, DeviceInfo]
    gave_up: Mapping[Track, str]
    needed: int  # valid blocks of the look that is judged
    looks: int
    decided: Mapping[str, GateCell] = field(default_factory=dict)  # by id; a decision stands


def gate_info(plan: Plan, found: Measured, calibration: CalibrationInfo | None, today: date) -> GateInfo:
    """Everything that is known, judged. Pure but for ``today``."""
    cells = [cell for c in plan.comparisons for cell in _comparison_cells(plan, found, calibration, c.name)]
    used, shown = [], []
    for cell in cells:
        waiver = waivers.covering(cell, plan.waivers, today) if cell.gating else None
        used += [waiver] if waiver else []
        shown.append(replace(cell, waived=waiver.reason) if waiver else cell)
    told = waivers.told(plan.waivers, used, today)
    verdict = overall(shown)
    expired = any(waiver.state == "expired" for waiver in told)
    return GateInfo(
        kind=plan.kind,
        plan_key=plan.key,
        baseline=plan.baseline.side,
        candidate=plan.candidate.side,
        comparisons=plan.comparisons,
        looks=plan.looks,
        alpha=plan.settings.alpha,
        planned_cells=len(cells),
        settings=plan.settings_from,
        verdict=verdict,
        level=plan.level,
        exit_code=1 if expired else EXIT_CODES[verdict],
        cells=tuple(shown),
        blocks=tuple(block for track in plan.tracks for block in found.blocks.get(track, ())),
        waivers=told,
        calibration=calibration,
        notes=tuple(f"{_told(plan, track)}: {reason}" for track, reason in found.gave_up.items()),
        drill=plan.drill,
        slots=plan.settings.looks[0] if plan.slots else 0,
    )


def _told(plan: Plan, track: Track) -> str:
    several = [track.comparison] if len(plan.comparisons) > 1 else []
    return ", ".join([track.device, *several, track.workload])


def overall(cells: Sequence[GateCell]) -> GateVerdict:
    """PASS only if there are gating cells and each passed or was waived."""
    return judging.worst(["PASS" if cell.waived else cell.verdict for cell in cells if cell.gating])


def _comparison_cells(
    plan: Plan, found: Measured, calibration: CalibrationInfo | None, comparison: str
) -> list[GateCell]:
    """All cells of one comparison: of each device, and of all units of a model where they are many."""
    tracks = [track for track in plan.tracks if track.comparison == comparison]
    cells = [_cell(plan, found, calibration, t, metric) for t in tracks for metric in plan.metrics]
    exact = [cell for cell in cells if cell.exact]
    groups = _groups([cell for cell in cells if not cell.exact], found.devices)
    grouped = {unit.id: group.id for group, units in groups.values() for unit in units}
    singles = [_alone(cell, grouped) for cell in cells if not cell.exact]
    pooled = [group for group, _ in groups.values()]
    everything = [*singles, *pooled]
    judged = judging.judge_cells(
        data={cell.id: (*_earlier(plan, cell), *cell.blocks) for cell in everything},
        margins={cell.id: cell.margin for cell in everything},
        families=[
            [cell.id for cell in everything if cell.gating],
            *([unit.id for unit in units] for _, units in groups.values()),
        ],
        needed={cell.id: MIN_UNITS if cell.units else _size(plan) for cell in everything},
        level=plan.level,
    )
    if plan.slots:
        judged = {cell.id: _so_far(plan, cell, judged[cell.id]) for cell in everything}
    for group, units in groups.values():
        means = {unit.device: float(np.mean(unit.blocks)) for unit in units if unit.blocks}
        verdicts = {unit.device: judged[unit.id] for unit in units}
        judged[group.id] = judging.judge_units(judged[group.id], means, verdicts)
    why = {(t.device, t.workload): reason for t, reason in found.gave_up.items() if t in tracks}
    return [
        *(_standing(_with(cell, judged[cell.id], why), found.decided.get(cell.id)) for cell in everything),
        *exact,
    ]


def _size(plan: Plan) -> int:
    """Blocks without which there is no verdict."""
    return plan.settings.looks[0] if plan.slots else plan.looks[0]


def _earlier(plan: Plan, cell: GateCell) -> tuple[float, ...]:
    """Of a night's A/A: what earlier nights measured of the cell."""
    return plan.earlier.get(cell_id(cell.device, cell.model, cell.workload, cell.metric), ())


def _so_far(plan: Plan, cell: GateCell, judged: Judged) -> Judged:
    """A night's A/A blocks that are too few for a verdict are no failure: more come."""
    size = _size(plan)
    if judged.verdict != "INVALID" or not cell.blocks:
        return judged
    reason = f"{judged.blocks} of {size} A/A blocks so far, {len(cell.blocks)} of them in this run"
    return replace(judged, verdict="INCONCLUSIVE", reason=reason)


def _standing(cell: GateCell, earlier: GateCell | None) -> GateCell:
    """What an earlier look decided stands, also where later looks change Holm's family."""
    if earlier is None:
        return cell
    return replace(cell, verdict=earlier.verdict, reason=earlier.reason, p=earlier.p, looks=earlier.looks)


def _with(cell: GateCell, judged: Judged, gave_up: Mapping[tuple[str, str], str]) -> GateCell:
    """``cell`` as it was judged; a device that was given up is named as the reason."""
    reason = judged.reason
    if judged.verdict == "INVALID" and (why := gave_up.get((cell.device, cell.workload))):
        reason = f"{reason}: {why}"
    return replace(
        cell,
        verdict=judged.verdict,
        reason=reason,
        estimate=judged.estimate,
        low=judged.low,
        high=judged.high,
        sd=judged.sd,
        p=judged.p,
        sign_flip=judged.sign_flip,
    )


def _cell(
    plan: Plan, found: Measured, calibration: CalibrationInfo | None, track: Track, metric: Metric
) -> GateCell:
    """What is known of one cell, judged only if it is exact."""
    id = cell_id(track.device, plan.model, track.workload, metric.name)
    name = id if plan.kind == "gate" else f"{track.comparison}: {id}"
    margin, gates = plan.settings.of_cell(id, metric)
    advisory = "" if gates else "advisory by the gate's settings"
    if plan.kind == "calibration" and track.comparison != AA:
        advisory = "a loss was injected here"
    if not advisory and calibration is not None:
        advisory = _revoked(calibration, plan.model, track, metric)
    if metric.weighed:
        return _weighed(_blank(plan, track, metric, name, margin, advisory, found), metric, found, track)
    blocks = found.blocks.get(track, ())
    valid = [b for b in blocks if not b.reasons][: found.needed]
    if earlier := found.decided.get(name):
        valid = valid[: len(earlier.blocks)]
    legs = found.legs.get(track, ())
    arms = {arm: [leg for leg in legs if leg.place and leg.place.arm == arm] for arm in ARMS}
    used = {b.index for b in valid}
    counted = {arm: [x for x in arms[arm] if x.place and x.place.block in used] for arm in ARMS}
    shown = arms if metric.exact else counted
    cell = replace(
        _blank(plan, track, metric, name, margin, advisory, found),
        baseline=_median(metric, shown["baseline"]),
        candidate=_median(metric, shown["candidate"]),
        blocks=tuple(b.data[metric.name] for b in valid if metric.name in b.data),
        void=sum(bool(b.reasons) for b in blocks),
        tails=tuple(tail for arm in ARMS for tail in tails(metric, arm, counted[arm])),
    )
    return _exact(cell, metric, arms) if metric.exact else cell


def _blank(
    plan: Plan, track: Track, metric: Metric, name: str, margin: float, advisory: str, found: Measured
) -> GateCell:
    """The cell before anything of it is known."""
    return GateCell(
        id=name,
        comparison=track.comparison,
        device=track.device,
        model=plan.model,
        workload=track.workload,
        metric=metric.name,
        title=metric.title,
        unit=metric.unit,
        exact=metric.exact,
        gating=not advisory,
        advisory=advisory,
        margin=margin,
        verdict="INVALID",
        reason="",
        looks=found.looks,
    )


def _weighed(cell: GateCell, metric: Metric, found: Measured, track: Track) -> GateCell:
    """``cell`` with its pairs of weighings in the place of blocks."""
    legs = found.weighings.get(track, ())
    pairs = tuple(weighing.pairs(legs))
    return replace(
        cell,
        baseline=_median(metric, [old for old, _ in pairs]),
        candidate=_median(metric, [new for _, new in pairs]),
        blocks=weighing.data(legs),
        void=max((leg.place.block + 1 for leg in legs if leg.place), default=0) - len(pairs),
    )


def cell_id(device: str, model: str, workload: str, metric: str) -> str:
    """What globs in gate.toml and waivers.toml are matched with."""
    return f"{device}/{model}/{workload}/{metric}"


def _exact(cell: GateCell, metric: Metric, arms: Mapping[Arm, Sequence[LegResult]]) -> GateCell:
    """Equal or not: noise has no part in it, so every leg counts, also of void blocks."""
    keys = {arm: {metric.key(leg) for leg in legs} for arm, legs in arms.items()}
    if not all(keys.values()) or any(None in found for found in keys.values()):
        return replace(cell, verdict="INVALID", reason="not measured on both sides")
    if len(keys["baseline"]) > 1:
        return replace(cell, verdict="INVALID", reason="the baseline differs from itself between legs")
    legs = sum(map(len, arms.values()))
    if keys["baseline"] == keys["candidate"]:
        return replace(cell, verdict="PASS", reason=f"equal in all {legs} legs", estimate=0.0)
    if len(keys["candidate"]) > 1:
        return replace(cell, verdict="REGRESSED", reason="the candidate differs from itself between legs")
    if metric.name == "tokens":
        return replace(cell, verdict="REGRESSED", reason="other tokens for the same prompt")
    (old,), (new,) = keys["baseline"], keys["candidate"]
    if metric.name == "nodes":
        return replace(cell, verdict="REGRESSED", reason=f"{old} became {new}")
    ratio = int(str(new)) / int(str(old)) - 1
    verdict: GateVerdict = "REGRESSED" if ratio > 0 else "PASS"
    return replace(cell, verdict=verdict, reason=f"{percent(ratio)}, exactly", estimate=ratio)


def _alone(cell: GateCell, grouped: Mapping[str, str]) -> GateCell:
    """A unit of a group gates through its group."""
    if cell.id not in grouped:
        return cell
    return replace(cell, gating=False, advisory=cell.advisory or f"gates through {grouped[cell.id]}")


def _groups(
    cells: Sequence[GateCell], devices: Mapping[str, DeviceInfo]
) -> dict[str, tuple[GateCell, list[GateCell]]]:
    """By id: the cell over all units of a model, and the units' own; for MIN_UNITS units and more."""
    found: dict[tuple[str, str, str], list[GateCell]] = {}
    for cell in cells:
        if info := devices.get(cell.device):
            kind = f"{info.model} {info.soc} {info.simulated}".strip()
            found.setdefault((kind, cell.workload, cell.metric), []).append(cell)
    groups = {}
    for (kind, _, _), units in found.items():
        if len(units) < MIN_UNITS or not kind:
            continue
        may = [unit for unit in units if unit.gating]
        first = (may or units)[0]
        name = f"{len(units)} × {kind}"
        group = replace(
            first,
            id=cell_id(name, first.model, first.workload, first.metric),
            device=name,
            gating=bool(may),
            advisory="" if may else first.advisory,
            baseline=_middle([unit.baseline for unit in units]),
            candidate=_middle([unit.candidate for unit in units]),
            blocks=tuple(float(np.mean(unit.blocks)) for unit in (may or units) if unit.blocks),
            void=sum(unit.void for unit in units),
            tails=(),
            units=len(units),
        )
        groups[group.id] = (group, may or units)
    return groups


def _revoked(calibration: CalibrationInfo, model: str, track: Track, metric: Metric) -> str:
    """Why calibration took the cell's gating rights, "" if it did not."""
    for cell in calibration.cells:
        if (cell.device, cell.model, cell.workload, cell.metric) == (
            track.device,
            model,
            track.workload,
            metric.name,
        ):
            return cell.revoked and f"failed A/A: {cell.revoked}"
    return ""


def _median(metric: Metric, legs: Sequence[LegResult]) -> float | None:
    return _middle([metric.value(leg) for leg in legs])


def _middle(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return float(np.median(known)) if known else None

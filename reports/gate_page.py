"""The page of a gate or a calibration: one HTML file whose charts are SVG, so that it needs no script."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from markupsafe import Markup

from reports import gate_view, svg, text
from reports.devices import DeviceView, device_view
from reports.failures import retried
from reports.gate_correctness import checked_rows
from reports.gate_costs import cost_rows, speed_charts
from reports.gate_results import Arm, BlockInfo, CalibratedCell, GateCell, GateInfo, Tail
from reports.gate_view import GateRow, percent
from reports.mutation import mutation_view
from reports.page import asset, environment, policy, script, write_page
from reports.results import LegResult, RunResults
from reports.trend import Series, trend_view

# The page of 20 devices with 40 cells each stays below 1.5 MB; the worst cells come first.
MOST_DETAILED = 150  # cells with a place of their own below the table
MOST_CHARTED = 48  # of those, cells whose legs are drawn
WIDEST = 0.25  # of the forest's axis, to either side: one wild cell must not flatten the others
ARMS: tuple[Arm, ...] = ("baseline", "candidate")


@dataclass(frozen=True)
class ForestRow:
    """One row of the forest plot; strip is None for exact metrics."""

    row: GateRow
    strip: Markup | None


@dataclass(frozen=True)
class CellDetail:
    """What is behind one cell."""

    row: GateRow
    facts: tuple[tuple[str, str], ...]
    charts: tuple[tuple[str, str, Markup], ...]  # title, caption, picture
    tails: tuple[Tail, ...]


@dataclass(frozen=True)
class BlockRow:
    index: int
    order: str
    drift: str
    waited: str
    data: tuple[str, ...]  # by GateBlocks.metrics
    reasons: tuple[str, ...]


@dataclass(frozen=True)
class GateBlocks:
    """All blocks of one device, comparison and workload."""

    title: str
    metrics: tuple[str, ...]
    rows: tuple[BlockRow, ...]
    valid: int


@dataclass(frozen=True)
class CalibrationRow:
    """One cell: what calibration knows of it."""

    name: str
    wrong: str
    blocks: str
    change: str
    interval: str
    sd: str
    detectable: tuple[str, str]
    found: tuple[tuple[str, str, str, str], ...]  # comparison, tone, symbol, estimate
    revoked: str


@dataclass(frozen=True)
class Grid:
    """Device by metric; cells are None where nothing was planned.

    rows: device, then comparison and workload where there are several, then a cell a column.
    """

    columns: tuple[str, ...]
    rows: tuple[tuple[str, str, tuple[GateRow | None, ...]], ...]


def render(results: RunResults, folder: Path, trend: Sequence[Series] = ()) -> Path:
    """Writes ``folder``/index.html, replacing an older one, and returns its path.

    trend: lines of the candidate's cells over stored runs; it informs and decides nothing.

    Raises:
        OSError: ``folder`` cannot be made or written. ValueError: ``results`` are of no gate.
    """
    return write_page(html(results, trend), folder)


def html(results: RunResults, trend: Sequence[Series] = ()) -> str:
    """The page as text."""
    gate = results.gate
    if gate is None:
        raise ValueError(f"run {results.run_id} is no gate")
    rows = gate_view.rows(gate)
    scripts = [script("page.js")]
    forest = _forest(rows)
    views = {info.name: device_view(info) for info in results.devices}
    for leg in results.legs:
        views.setdefault(leg.device, DeviceView(leg.device, "", "not described in these results", ()))
    return (
        environment()
        .get_template("gate.html.j2")
        .render(
            results=results,
            gate=gate,
            v=gate_view.summary(gate, results.finished_at is not None),
            started=text.moment(results.started_at),
            elapsed=text.elapsed(results.started_at, results.finished_at),
            forest=forest,
            axis=svg.strip_axis(_scale([row for row in rows if not row.cell.exact])),
            grid=_grid(gate, rows),
            details=_details(gate, rows, results.legs),
            left_out=rows[MOST_DETAILED:],
            blocks=_blocks(gate),
            calibration=_calibration(gate),
            calibrated=gate_view.calibration_sentence(gate.calibration),
            injected=_injected(gate),
            costs=cost_rows(results.legs),
            speed=speed_charts(results.legs),
            checked=checked_rows(gate.checked, results.provenance.get("commit", "")),
            mutation=mutation_view(results),
            retried=retried(results, views),
            quarantined=[
                (views[info.name], info.quarantined) for info in results.devices if info.quarantined
            ],
            percent=percent,
            trend=trend_view(trend),
            devices=list(views.values()),
            simulated=[view for view in views.values() if view.simulated],
            policy=policy(scripts),
            style=Markup(asset("style.css") + asset("gate.css") + asset("trend.css")),
            scripts=[Markup(script) for script in scripts],
        )
    )


def _scale(rows: Sequence[GateRow]) -> svg.Scale:
    """One axis for all rows, even to both sides, as wide as the intervals need."""
    margins = [row.cell.margin for row in rows]
    bounds = [abs(x) for row in rows for x in (row.cell.low, row.cell.high) if x is not None]
    half = min(WIDEST, max([1.4 * m for m in margins] + [1.05 * b for b in bounds] + [0.02]))
    return svg.Scale(-half, half, 6, 294)


def _forest(rows: Sequence[GateRow]) -> tuple[ForestRow, ...]:
    scale = _scale([row for row in rows if not row.cell.exact])
    return tuple(ForestRow(row, None if row.cell.exact else _strip(row.cell, scale)) for row in rows)


def _strip(cell: GateCell, scale: svg.Scale) -> Markup:
    return svg.strip(cell.low, cell.high, cell.estimate, cell.margin, scale)


def _grid(gate: GateInfo, rows: Sequence[GateRow]) -> Grid:
    cells = gate.cells
    several = len({cell.comparison for cell in cells}) > 1, len({cell.workload for cell in cells}) > 1
    columns = {cell.metric: cell.title for cell in cells}
    lines = dict.fromkeys((cell.device, cell.comparison, cell.workload) for cell in cells)
    found = {(r.cell.device, r.cell.comparison, r.cell.workload, r.cell.metric): r for r in rows}
    return Grid(
        tuple(columns.values()),
        tuple(
            (
                line[0],
                " · ".join(name for name, shown in zip(line[1:], several, strict=True) if shown),
                tuple(found.get((*line, metric)) for metric in columns),
            )
            for line in lines
        ),
    )


def _details(gate: GateInfo, rows: Sequence[GateRow], legs: Sequence[LegResult]) -> tuple[CellDetail, ...]:
    by_track: dict[tuple[str, str, str], list[LegResult]] = {}
    for leg in legs:
        if leg.place is not None and leg.place.arm != "canary":
            key = leg.device, leg.place.comparison, leg.place.workload
            by_track.setdefault(key, []).append(leg)
    valid = {(b.device, b.comparison, b.workload, b.index) for b in gate.blocks if not b.reasons}
    weighed = _weighed(by_track)
    found = []
    for number, row in enumerate(rows[:MOST_DETAILED]):
        cell = row.cell
        mine = by_track.get((cell.device, cell.comparison, cell.workload), [])
        mine = [leg for leg in mine if leg.memory_pass == (cell.metric == "memory")]
        counting = weighed if cell.metric == "memory" else valid
        charts = _charts(cell, mine, counting) if number < MOST_CHARTED else ()
        found.append(CellDetail(row, _facts(cell), charts, cell.tails))
    return tuple(found)


def _weighed(
    by_track: dict[tuple[str, str, str], list[LegResult]],
) -> set[tuple[str, str, str, int]]:
    """Pairs of weighings of which both sides are VALID."""
    arms: dict[tuple[str, str, str, int], set[str]] = {}
    for track, legs in by_track.items():
        for leg in legs:
            if leg.memory_pass and leg.place is not None and leg.validity == "VALID":
                arms.setdefault((*track, leg.place.block), set()).add(leg.place.arm)
    return {pair for pair, sides in arms.items() if len(sides) == 2}


def _facts(cell: GateCell) -> tuple[tuple[str, str], ...]:
    facts = [("Why", cell.reason)]
    if cell.advisory:
        facts.append(("Does not gate", cell.advisory))
    if cell.waived:
        facts.append(("Waived", cell.waived))
    if not cell.exact:
        facts += [
            (
                "Pairs of fresh processes" if cell.metric == "memory" else "Valid blocks",
                f"{len(cell.blocks)}{f', {cell.void} void' if cell.void else ''}",
            ),
            ("SD of pairs" if cell.metric == "memory" else "Block SD", percent(cell.sd, False)),
            ("p, not worse (Holm)", _p(cell.p)),
            ("p, sign flips", _p(cell.sign_flip)),
        ]
    if cell.units:
        facts.append(("Units of this model", f"{cell.units}, t on their means"))
    return tuple(facts)


def _p(value: float | None) -> str:
    return text.MISSING if value is None else f"{value:.2g}"


def _charts(
    cell: GateCell, legs: Sequence[LegResult], valid: set[tuple[str, str, str, int]]
) -> tuple[tuple[str, str, Markup], ...]:
    """A/B dots for each block, and the ECDF of all repeats of valid blocks."""
    value = _VALUES.get(cell.metric)
    if value is None or not legs:
        return ()
    points, samples = [], {arm: list[float]() for arm in ARMS}
    for leg in legs:
        place = leg.place
        shown = value(leg)
        if place is None or place.arm == "canary" or not shown:
            continue
        counts = (cell.device, cell.comparison, cell.workload, place.block) in valid
        points.append((place.block, place.arm, _middle(shown), counts))
        if counts:
            samples[place.arm] += shown
    unit = "MiB" if cell.metric == "memory" else cell.unit
    charts = []
    if points:
        label = f"{cell.title} on {cell.device}, one mark a leg, by block"
        what = "pair" if cell.metric == "memory" else "block"
        caption = f"One mark for each leg: ● baseline, ▲ candidate; hollow in void {what}s."
        charts.append((f"{cell.title} by {what}", caption, svg.dots(points, unit, label)))
    arms = [(arm, values) for arm, values in samples.items() if values]
    if cell.metric in ("ttft", "decode") and len(arms) == 2:
        label = f"Share of {cell.title.lower()} at most so long, {cell.device}"
        caption = "All repeats of valid blocks; solid baseline, dashed candidate. Cut at p99."
        charts.append(("Raw legs", caption, svg.ecdf(arms, unit, label)))
    return tuple(charts)


_VALUES = {
    "ttft": lambda leg: [sample.ttft_ms for sample in leg.samples],
    "decode": lambda leg: [gap for sample in leg.samples for gap in sample.itl_ms],
    "memory": lambda leg: [leg.peak_rss_bytes / (1 << 20)],
    "energy": lambda leg: [leg.energy.gross_j_per_token] if leg.energy.gross_j_per_token else [],
}


def _middle(values: Sequence[float]) -> float:
    ordered = sorted(values)
    half = len(ordered) // 2
    return ordered[half] if len(ordered) % 2 else (ordered[half - 1] + ordered[half]) / 2


def _blocks(gate: GateInfo) -> tuple[GateBlocks, ...]:
    tracks: dict[tuple[str, str, str], list[BlockInfo]] = {}
    for block in gate.blocks:
        tracks.setdefault((block.device, block.comparison, block.workload), []).append(block)
    several = len(gate.comparisons) > 1
    found = []
    for (device, comparison, workload), blocks in tracks.items():
        metrics = tuple(dict.fromkeys(name for block in blocks for name in block.data))
        rows = tuple(
            BlockRow(
                block.index + 1,
                block.order,
                percent(block.drift),
                f"{block.waited_s:.0f} s" if block.waited_s else text.MISSING,
                tuple(percent(block.data.get(name)) for name in metrics),
                block.reasons,
            )
            for block in blocks
        )
        title = " · ".join([device, *([comparison] if several else []), workload])
        found.append(GateBlocks(title, metrics, rows, sum(not block.reasons for block in blocks)))
    return tuple(found)


def _injected(gate: GateInfo) -> tuple[str, ...]:
    """Names of the injections that any calibrated cell knows."""
    cells = gate.calibration.cells if gate.calibration else ()
    return tuple(dict.fromkeys(found.comparison for cell in cells for found in cell.found))


def _calibration(gate: GateInfo) -> tuple[CalibrationRow, ...]:
    if gate.calibration is None:
        return ()
    return tuple(_calibration_row(cell) for cell in gate.calibration.cells)


def _aa_blocks(cell: CalibratedCell) -> str:
    """``27 blocks, 3 of 8 to the next verdict``."""
    what = text.plural(cell.blocks, "pair" if cell.metric == "memory" else "block")
    return f"{what}, {cell.waiting} of {cell.size} to the next verdict" if cell.waiting else what


# Of an injected loss: tone, symbol, word. REGRESSED is right here, and PASS is wrong.
_FOUND = {
    "REGRESSED": ("passed", "✓", "found"),
    "PASS": ("failed", "✕", "missed"),
    "INCONCLUSIVE": ("infrastructure", "?", "undecided"),
    "INVALID": ("not_run", "∅", "not measured"),
}


def _calibration_row(cell: CalibratedCell) -> CalibrationRow:
    interval = text.MISSING
    if cell.low is not None and cell.high is not None:
        interval = f"{percent(cell.low).removesuffix(' %')} to {percent(cell.high)}"
    return CalibrationRow(
        name=f"{cell.device} · {cell.model} · {cell.workload} · {cell.title}",
        wrong=f"{cell.false_regressed} of {cell.trials}" if cell.trials else "no verdict yet",
        blocks=_aa_blocks(cell),
        change=percent(cell.estimate),
        interval=interval,
        sd=percent(cell.sd, False),
        detectable=(percent(cell.detectable_8, False), percent(cell.detectable_32, False)),
        found=tuple(
            (
                found.comparison,
                *_FOUND[found.verdict][:2],
                f"{_FOUND[found.verdict][2]} {percent(found.estimate)}",
            )
            for found in cell.found
        ),
        revoked=cell.revoked,
    )

"""The trend over stored nights: one line for each cell, with change points and release tags.

Pure: Series in, plain dataclasses out. What it says informs and never blocks: between two nights
more changes than the code. `kvfarm gate` measures both sides live.
"""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from reports import svg, text
from reports.changes import MAGNITUDE, NIGHTS, Change, changes
from reports.gate_view import percent, value

RECENT = 7  # nights: a change that began within them is news
MOST_CHARTED = 60  # cells drawn large, the changed ones first; the table has a small line of every cell


@dataclass(frozen=True)
class Night:
    """One value of one cell. canary: the same device's frozen workload that night, None without one.

    valid: only then it counts. tags: of the run, e.g. a release.
    """

    run_id: str
    at: str  # ISO 8601, UTC
    value: float
    valid: bool = True
    canary: float | None = None
    tags: tuple[str, ...] = ()


@dataclass(frozen=True)
class Series:
    """One cell: nights oldest first. ``unit`` as in the gate: ms, bytes, J/token, tokens/s.

    simulated: what is simulated of the device, "" for real hardware.
    """

    device: str
    recipe: str
    model: str
    workload: str
    metric: str
    unit: str
    nights: tuple[Night, ...]
    higher_is_better: bool = False
    simulated: str = ""


@dataclass(frozen=True)
class ChangeView:
    """One change point, named by its first night. tone: "failed" for worse, "passed" for better.

    recent: within RECENT nights.
    """

    run_id: str
    at: str  # ISO 8601
    day: str
    before: str
    after: str
    change: str
    word: str
    tone: str
    recent: bool
    tags: str  # release tags from that night on


@dataclass(frozen=True)
class TrendCell:
    """One cell. ``spark`` is a small line for the table; ``chart`` a large one, None where left out."""

    anchor: str
    series: Series
    newest: str
    against: str  # newest against the median of the nights before
    counted: int  # nights that count
    note: str
    changes: tuple[ChangeView, ...]
    spark: Markup
    chart: Markup | None

    @property
    def name(self) -> str:
        one = self.series
        device = f"{one.device} (simulated)" if one.simulated else one.device
        return f"{device} · {one.recipe} · {one.workload} · {one.metric}"

    @property
    def news(self) -> tuple[ChangeView, ...]:
        return tuple(change for change in self.changes if change.recent)


@dataclass(frozen=True)
class TrendView:
    """All cells, those with something new first."""

    sentence: str
    remarks: tuple[str, ...]
    cells: tuple[TrendCell, ...]
    first: str
    last: str
    nights: int

    @property
    def changed(self) -> tuple[TrendCell, ...]:
        return tuple(cell for cell in self.cells if cell.changes)


def trend_view(all_series: Sequence[Series]) -> TrendView | None:
    """None where no cell has a second night: there is no trend yet."""
    cells = [_cell(f"t{i}", series) for i, series in enumerate(all_series) if len(series.nights) > 1]
    if not cells:
        return None
    cells.sort(key=lambda cell: (not _worse(cell.news), not cell.news, not cell.changes))
    charted = [
        cell if i < MOST_CHARTED else dataclasses.replace(cell, chart=None) for i, cell in enumerate(cells)
    ]
    moments = sorted({(night.at, night.run_id) for cell in cells for night in cell.series.nights})
    return TrendView(
        sentence=_sentence(cells),
        remarks=tuple(_remarks(cells)),
        cells=tuple(charted),
        first=text.moment(moments[0][0]),
        last=text.moment(moments[-1][0]),
        nights=len(moments),
    )


def _worse(found: Iterable[ChangeView]) -> bool:
    return any(change.tone == "failed" for change in found)


def _cell(anchor: str, series: Series) -> TrendCell:
    counted = [night for night in series.nights if night.valid and night.value > 0]
    normalised = bool(counted) and all(night.canary for night in counted)
    found = changes([_judged(night, normalised) for night in counted])
    shown = tuple(_change_view(change, series, counted, normalised) for change in found)
    # A night without a canary has no place among those divided by theirs.
    drawn = [night for night in series.nights if night.canary or not normalised]
    places = {id(night): index for index, night in enumerate(drawn)}
    marks = [(places[id(counted[change.index])], _tone(change, series)) for change in found]
    tags = [(places[id(night)], text.joined(night.tags)) for night in drawn if night.tags]
    points = [_point(night, series, normalised) for night in drawn]
    label = f"{series.device} (simulated)" if series.simulated else series.device
    told = f"{series.metric} on {label}, {series.recipe}, {series.workload}, {len(points)} nights. "
    told += "; ".join(f"{each.day}: {each.change}, {each.word}" for each in shown) or "No change point."
    newest, before = series.nights[-1], [night.value for night in counted[:-1]]
    against = (
        percent(newest.value / statistics.median(before) - 1) if before and newest.valid else text.MISSING
    )
    return TrendCell(
        anchor=anchor,
        series=series,
        newest=value(newest.value, series.unit),
        against=against,
        counted=len(counted),
        note=_note(series, counted, normalised),
        changes=shown,
        spark=svg.spark([height for height, _, _ in points], [index for index, _ in marks]),
        chart=svg.nights(points, marks, tags, _axis_unit(series, normalised), told),
    )


def _judged(night: Night, normalised: bool) -> float:
    return night.value / (night.canary or 1.0) if normalised else night.value


def _point(night: Night, series: Series, normalised: bool) -> tuple[float, bool, str]:
    """Height, whether it counts, and words; bytes are drawn in MiB."""
    height = _judged(night, normalised) / (float(1 << 20) if series.unit == "bytes" else 1.0)
    return height, night.valid, f"{text.day(night.at)}: {value(night.value, series.unit)}"


def _axis_unit(series: Series, normalised: bool) -> str:
    return "× canary" if normalised else {"bytes": "MiB"}.get(series.unit, series.unit)


def _tone(change: Change, series: Series) -> str:
    return "passed" if (change.after > change.before) == series.higher_is_better else "failed"


def _change_view(change: Change, series: Series, counted: Sequence[Night], normalised: bool) -> ChangeView:
    night = counted[change.index]
    tone = _tone(change, series)
    # Levels in the metric's own unit, also where the canary was divided out to find the step.
    unit = "× canary" if normalised else series.unit
    tags = [tag for later in counted[change.index :] for tag in later.tags]
    return ChangeView(
        run_id=night.run_id,
        at=night.at,
        day=text.day(night.at),
        before=value(change.before, unit),
        after=value(change.after, unit),
        change=percent(change.ratio),
        word="better" if tone == "passed" else "worse",
        tone=tone,
        recent=len(counted) - change.index <= RECENT,
        tags=text.joined(list(dict.fromkeys(tags))),
    )


def _note(series: Series, counted: Sequence[Night], normalised: bool) -> str:
    left_out = len(series.nights) - len(counted)
    parts = ["divided by the same night's canary" if normalised else "no canary: as measured"]
    if left_out:
        parts.append(f"{text.plural(left_out, 'night')} not VALID and left out")
    if len(counted) < NIGHTS:
        parts.append(f"too few nights for change points ({len(counted)}, needs {NIGHTS})")
    return "; ".join(parts)


def _sentence(cells: Sequence[TrendCell]) -> str:
    able = [cell for cell in cells if cell.counted >= NIGHTS]
    if not able:
        return f"No cell has the {NIGHTS} valid nights that change points need."
    worse = sum(_worse(cell.news) for cell in able)
    better = sum(any(c.tone == "passed" for c in cell.news) for cell in able)
    said = []
    if worse:
        said.append(f"{text.plural(worse, 'cell')} got worse")
    if better:
        said.append(f"{text.plural(better, 'cell')} got better")
    what = text.joined(said) or "no cell changed its level"
    return f"Within the last {RECENT} nights {what}, of {text.plural(len(able), 'cell')} with enough nights."


def _remarks(cells: Sequence[TrendCell]) -> Iterable[str]:
    if few := sum(cell.counted < NIGHTS for cell in cells):
        yield f"{text.plural(few, 'cell')} {'has' if few == 1 else 'have'} fewer than {NIGHTS} valid nights."
    raw = sum("no canary" in cell.note for cell in cells)
    if raw:
        of = "All cells are" if raw == len(cells) else f"{text.plural(raw, 'cell')} of {len(cells)} are"
        yield f"{of} shown as measured, without a canary: a device that drifts looks like a change."
    yield (
        f"A change point is a step of {MAGNITUDE:.0%} or more that held for two nights; every stored run "
        "counts as a night. It informs and never blocks: to decide, measure both sides live with kvfarm gate."
    )

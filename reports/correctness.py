"""Checks: the overview (device × recipe) and one grid (check × recipe) for each device."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from reports import text
from reports.devices import DEVICES_SHOWN_OPEN, DeviceView
from reports.results import CheckResult, Outcome, RunResults
from reports.verdict import count

WORST_FIRST: tuple[Outcome, ...] = ("failed", "infrastructure", "not_run", "passed", "not_supported")
WORDS: dict[Outcome, str] = {
    "passed": "passed",
    "failed": "failed",
    "infrastructure": "infrastructure",
    "not_run": "not run",
    "not_supported": "not supported",
}
SYMBOLS: dict[Outcome, str] = {
    "passed": "✓",
    "failed": "✕",
    "infrastructure": "!",
    "not_run": "○",
    "not_supported": "–",
}


@dataclass(frozen=True)
class CheckCell:
    """One check with one recipe. ``share``: worst error of a passed check, percent of the tolerance.

    error and tolerance: of logits; of the mean KL divergence where the check is judged by that.
    """

    outcome: Outcome
    programs: int
    error: str
    tolerance: str
    share: float | None
    seconds: str
    anchor: str
    reason: str = ""  # why it is not supported

    @property
    def symbol(self) -> str:
        return SYMBOLS[self.outcome]

    @property
    def word(self) -> str:
        return WORDS[self.outcome]


@dataclass(frozen=True)
class CheckRow:
    check: str
    title: str
    cells: tuple[CheckCell | None, ...]  # None: the check does not apply to the recipe


@dataclass(frozen=True)
class CheckGrid:
    """Checks (rows) × recipes (columns) of one device."""

    device: DeviceView
    recipes: tuple[str, ...]
    rows: tuple[CheckRow, ...]
    open: bool

    @property
    def anchor(self) -> str:
        return _anchor(self.device)


@dataclass(frozen=True)
class OverviewCell:
    """All checks of one device with one recipe. ``share``: the worst over the checks, percent."""

    outcome: Outcome
    passed: int
    total: int
    share: float | None
    symbol: str
    word: str


@dataclass(frozen=True)
class Absent:
    """No check of this recipe on this device: never planned, with the reason, or planned and lost ("")."""

    reason: str


@dataclass(frozen=True)
class OverviewRow:
    device: DeviceView
    cells: tuple[OverviewCell | Absent, ...]

    @property
    def anchor(self) -> str:
        """Of the device's CheckGrid."""
        return _anchor(self.device)


def _anchor(device: DeviceView) -> str:
    return f"checks-{device.anchor}"


def check_grids(
    results: RunResults, devices: dict[str, DeviceView], recipes: list[str]
) -> tuple[CheckGrid, ...]:
    links = anchors(results)
    absent = CheckCell("not_run", 0, text.MISSING, text.MISSING, None, "", "")
    # Where all that was planned came back, what is not here was never meant to run.
    unmatched = sum(each.kind == "check" for each in results.not_run)
    missing = absent if count(results).not_run > unmatched else None
    grids = []
    for name, device in devices.items():
        here = [check for check in results.checks if check.device == name]
        titles = {check.check: check.title for check in here}
        used = [recipe for recipe in recipes if any(check.recipe == recipe for check in here)]
        rows = []
        for check, title in titles.items():
            of_recipe = [[c for c in here if (c.check, c.recipe) == (check, recipe)] for recipe in used]
            cells = tuple(_check_cell(found, links) if found else missing for found in of_recipe)
            rows.append(CheckRow(check, title, cells))
        wrong = any(check.outcome not in ("passed", "not_supported") for check in here)
        if rows:
            grids.append(
                CheckGrid(device, tuple(used), tuple(rows), wrong or len(devices) <= DEVICES_SHOWN_OPEN)
            )
    return tuple(grids)


def overview_row(results: RunResults, device: DeviceView, recipes: list[str]) -> OverviewRow:
    reasons = {each.recipe: each.reason for each in results.not_planned if each.device == device.name}
    cells: list[OverviewCell | Absent] = []
    for recipe in recipes:
        found = [c for c in results.checks if (c.device, c.recipe) == (device.name, recipe)]
        cells.append(_overview_cell(found) if found else Absent(reasons.get(recipe, "")))
    return OverviewRow(device, tuple(cells))


def _overview_cell(checks: Sequence[CheckResult]) -> OverviewCell:
    outcome = _worst(check.outcome for check in checks)
    return OverviewCell(
        outcome=outcome,
        passed=sum(check.outcome == "passed" for check in checks),
        total=len(checks),
        share=_largest(map(_share, checks)),
        symbol=SYMBOLS[outcome],
        word=WORDS[outcome],
    )


def _check_cell(checks: Sequence[CheckResult], anchors: dict[int, str]) -> CheckCell:
    """All results of one check with one recipe (several if the check is parametrized)."""
    by_kl = all(_judged_by_kl(check) for check in checks)
    return CheckCell(
        outcome=_worst(check.outcome for check in checks),
        programs=sum(check.programs for check in checks),
        error=("KL " if by_kl else "") + text.error_size(_largest(map(_error, checks))),
        tolerance=text.error_size(_largest(map(_tolerance, checks))),
        share=_largest(map(_share, checks)),
        seconds=text.seconds(sum(check.seconds for check in checks)),
        anchor=next((anchors[id(check)] for check in checks if id(check) in anchors), ""),
        reason=next((check.message for check in checks if check.outcome == "not_supported"), ""),
    )


def anchors(results: RunResults) -> dict[int, str]:
    """An anchor for every check result that has an entry of its own further down the page."""
    shown = [check for check in results.checks if check.outcome in ("failed", "infrastructure")]
    return {id(check): f"problem-{number}" for number, check in enumerate(shown, start=1)}


def _worst(outcomes: Iterable[Outcome]) -> Outcome:
    return min(outcomes, key=WORST_FIRST.index)


def _error(check: CheckResult) -> float | None:
    """The worst error; of a failed check, the one that failed it (worst_error is over passing programs)."""
    if _judged_by_kl(check):
        return check.mean_kl
    if check.outcome != "failed":
        return check.worst_error
    if check.divergence is None:
        return None
    # JSON has no NaN: it comes back as null.
    return math.nan if check.divergence.error is None else check.divergence.error


def _tolerance(check: CheckResult) -> float | None:
    return check.kl_tolerance if _judged_by_kl(check) else check.tolerance


def _judged_by_kl(check: CheckResult) -> bool:
    """A rounded recipe has no band for single logits: its check passed or failed by KL divergence."""
    return check.tolerance is None and check.kl_tolerance is not None and check.divergence is None


def _share(check: CheckResult) -> float | None:
    """Worst error of a passed check over its tolerance, percent. None if unknown or the tolerance is zero."""
    error, tolerance = _error(check), _tolerance(check)
    if check.outcome != "passed" or error is None or not tolerance or not math.isfinite(error):
        return None
    return 100 * error / tolerance


def _largest(values: Iterable[float | None]) -> float | None:
    """The largest known value; NaN wins, because it is the worst error there is."""
    known = [value for value in values if value is not None]
    return next((v for v in known if math.isnan(v)), max(known)) if known else None

"""The view model: everything the page shows, decided here, so that templates only lay it out.

Pure: a RunResults in, plain dataclasses out.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from reports import text
from reports.correctness import CheckGrid, OverviewRow, check_grids, overview_row
from reports.curves import CurveGroup, curve_groups
from reports.devices import DeviceView, device_view, unique
from reports.failures import Problem, Retried, problems, retried
from reports.measurements import MeasureGroup, measure_groups
from reports.mutation import MutationView, mutation_view
from reports.provenance import LegProvenance, leg_provenance
from reports.results import NotRun, RunResults
from reports.verdict import Counts as Counts
from reports.verdict import Verdict as Verdict
from reports.verdict import summary_line as summary_line
from reports.verdict import verdict as verdict


@dataclass(frozen=True)
class RecipeView:
    name: str
    settings: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class ReportView:
    """The whole page."""

    run_id: str
    model: str
    reference: str
    started: str
    elapsed: str
    seed: int
    command: str
    verdict: Verdict
    devices: tuple[DeviceView, ...]
    recipes: tuple[RecipeView, ...]
    overview: tuple[OverviewRow, ...]
    grids: tuple[CheckGrid, ...]
    mutation: MutationView | None
    measures: tuple[MeasureGroup, ...]
    curves: tuple[CurveGroup, ...]
    failures: tuple[Problem, ...]
    infrastructure: tuple[Problem, ...]
    errors: tuple[str, ...]
    not_run: tuple[NotRun, ...]
    retried: tuple[Retried, ...]
    quarantined: tuple[tuple[DeviceView, str], ...]  # with the evidence
    provenance: tuple[tuple[str, str], ...]
    legs: tuple[LegProvenance, ...]


def build_view(results: RunResults) -> ReportView:
    """The view model of ``results``."""
    devices = {info.name: device_view(info) for info in results.devices}
    seen = [(r.device, r.recipe) for r in results.checks] + [(r.device, r.recipe) for r in results.legs]
    for name in unique(device for device, _ in seen):
        devices.setdefault(name, DeviceView(name, "", "not described in these results", ()))
    taken: set[str] = set()
    for name, device in devices.items():
        devices[name] = dataclasses.replace(device, anchor=text.anchor(taken, name))
    recipes = unique([*(recipe.name for recipe in results.recipes), *(recipe for _, recipe in seen)])
    settings = {recipe.name: tuple(recipe.settings.items()) for recipe in results.recipes}
    found = problems(results, devices)
    return ReportView(
        run_id=results.run_id,
        model=results.model,
        reference=results.reference,
        started=text.moment(results.started_at),
        elapsed=text.elapsed(results.started_at, results.finished_at),
        seed=results.seed,
        command=results.command,
        verdict=verdict(results),
        devices=tuple(devices.values()),
        recipes=tuple(RecipeView(name, settings.get(name, ())) for name in recipes),
        overview=tuple(overview_row(results, device, recipes) for device in devices.values()),
        grids=check_grids(results, devices, recipes),
        mutation=mutation_view(results),
        measures=measure_groups(results, devices, recipes),
        curves=curve_groups(results, devices),
        failures=tuple(p for outcome, p in found if outcome == "failed"),
        infrastructure=tuple(p for outcome, p in found if outcome == "infrastructure"),
        errors=results.infrastructure,
        not_run=results.not_run,
        retried=tuple(retried(results, devices)),
        quarantined=tuple((devices[d.name], d.quarantined) for d in results.devices if d.quarantined),
        provenance=tuple(results.provenance.items()),
        legs=tuple(leg_provenance(leg, devices[leg.device]) for leg in results.legs),
    )

"""What a run says of itself before it has results: who it is, what is planned, and what is left out."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from harness import resuming
from harness.mutants import score
from harness.provenance import command_line
from harness.recipes import settings
from reports.results import NotPlanned, RecipeInfo, RunRequest, RunResults

if TYPE_CHECKING:
    from harness.run import DeviceRun


def header_of(run: DeviceRun) -> RunResults:
    """The run without its results; of one that is gone on with as it began, but for what is planned now."""
    if run.before is not None:
        return dataclasses.replace(
            run.before,
            planned_checks=run.planned_checks,
            planned_legs=run.planned_legs,
            not_run=run.not_run,
        )
    named = run.recipes | {recipe.name: recipe for _, recipe, _ in run.further}
    return RunResults(
        run_id=run.run_id,
        started_at=run.started_at,
        finished_at=None,
        command=command_line(run.options.command),
        seed=run.seed,
        model=run.options.model.name,
        reference=f"transformers {run.provenance['transformers']}, float32, no cache",
        provenance=run.provenance | _selected(run),
        devices=(),
        recipes=tuple(RecipeInfo(name, settings(recipe)) for name, recipe in named.items()),
        checks=(),
        legs=(),
        planned_checks=run.planned_checks,
        planned_legs=run.planned_legs,
        not_run=run.not_run,
        not_planned=tuple(_not_planned(run)),
        ablation=run.ablation,
        mutation=score.load(run.options.cache),
        tags=run.options.tags,
        request=_request(run),
    )


def _request(run: DeviceRun) -> RunRequest | None:
    """None: nobody but who started the run can go on with it."""
    arguments = run.options.arguments
    if not arguments:
        return None
    models = [run.options.model, *(model for model, _, _ in run.further)]
    recipes = [*run.recipes.values(), *(recipe for _, recipe, _ in run.further)]
    return resuming.request(arguments, Path.cwd(), run.devices, resuming.subjects(models, recipes))


def _not_planned(run: DeviceRun) -> Iterator[NotPlanned]:
    """Devices and recipes of this run that do not belong together, and why."""
    measured = [recipe.name for _, recipe, _ in run.further if recipe.name not in run.recipes]
    for device in run.devices:
        wanted = run.inventory.device(device).recipes
        planned = {recipe.name for recipe in run.recipes_of(device)}
        for name in run.recipes:
            if name not in planned:
                yield NotPlanned(device, name, f"farm.toml: {device} is for recipes {', '.join(wanted)}")
        for name in dict.fromkeys(measured):
            here = {recipe.name for _, recipe in run.measured_on(device)}
            why = "measured, not checked (--measure)" if name in here else "not measured here (--measure)"
            yield NotPlanned(device, name, why)


def _selected(run: DeviceRun) -> dict[str, str]:
    """Who was passed over is said where the run is signed."""
    passed = "; ".join(f"{each.name}: {each.reason}" for each in run.passed_over)
    return {"devices": run.options.devices} | ({"devices not chosen": passed} if passed else {})

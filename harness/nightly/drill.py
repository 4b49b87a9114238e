"""A drill: something is made wrong on purpose, to see that the night finds it.

A slowdown or heavier memory is injected as a calibration injects it. A mutant alters the export in this
process and in the suite's; what it exports lies apart, so that no later run takes it for the real thing.
"""

from __future__ import annotations

import contextlib
import dataclasses
import re
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import kvengine.export.api
from harness.artifacts import Progress, artifact_of
from harness.mutants.catalogue import MUTANTS
from harness.mutants.mutant import Mutant
from harness.nightly.errors import NightError
from harness.nightly.settings import DrillSettings, NightSettings
from harness.recipes import PRESETS, Recipe
from harness.store.rows import DRILL
from kvengine.artifact import Artifact
from reports.gate_results import Injection
from reports.gate_view import percent
from reports.results import RunResults


def told(drill: DrillSettings | None) -> str:
    """In words, "" for no drill."""
    if drill is None:
        return ""
    said = []
    if drill.mutant:
        found = mutant(drill.mutant)
        said.append(f"the candidate is exported with the bug {found.name!r}: {found.what} ({found.source})")
    if drill.slowdown:
        said.append(f"the candidate's steps are slowed down by {percent(drill.slowdown, False)}")
    if drill.memory:
        share = percent(drill.memory, False)
        said.append(f"the candidate holds {share} of the baseline's peak memory besides")
    return "; ".join(said)


def check(settings: NightSettings) -> None:
    """Raises NightError: an unknown bug, or one that would not get into the candidate."""
    drill = settings.drill
    if drill is None or not drill.mutant:
        return
    mutant(drill.mutant)
    if settings.candidate.partition(",")[0].strip() not in PRESETS:
        raise NightError(
            f"candidate: a drill's mutant is exported anew, so sought a recipe, found {settings.candidate!r}"
        )


def injection(drill: DrillSettings | None) -> Injection:
    return Injection() if drill is None else Injection(drill.slowdown, drill.memory)


def mutant(name: str) -> Mutant:
    """The bug called ``name``, one of those that are in the artifact and so reach every device.

    Raises NightError.
    """
    usable = [m for m in MUTANTS if all(patch.owner is kvengine.export.api for patch in m.patches)]
    for found in usable:
        if found.name == name:
            return found
    names = ", ".join(repr(m.name) for m in usable)
    raise NightError(f"drill.mutant: sought one that alters the export, found {name!r}; there are {names}")


def cache_of(cache: Path, drill: DrillSettings | None) -> Path:
    """Where the candidate's artifacts lie."""
    if drill is None or not drill.mutant:
        return cache
    return cache / "drill" / re.sub(r"[^a-z0-9]+", "-", drill.mutant.lower())


@contextlib.contextmanager
def applied(drill: DrillSettings | None) -> Iterator[None]:
    """Inside, whatever is exported has the drill's bug."""
    if drill is None or not drill.mutant:
        yield
        return
    with mutant(drill.mutant).applied():
        yield


@contextlib.contextmanager
def suite(name: str) -> Iterator[None]:
    """Inside, a run of the suite in this process exports with the bug ``name``, and says so."""
    from harness import opened, run

    drill, header = DrillSettings(mutant=name), run.DeviceRun.header

    def wrong(checkpoint: Path, recipe: Recipe, root: Path, progress: Progress | None = None) -> Artifact:
        with applied(drill):
            return artifact_of(checkpoint, recipe, cache_of(root.parent, drill) / root.name, progress)

    def loud(self: run.DeviceRun) -> RunResults:
        found = header(self)
        return dataclasses.replace(found, provenance=found.provenance | {DRILL: told(drill)})

    with mock.patch.object(opened, "artifact_of", wrong), mock.patch.object(run.DeviceRun, "header", loud):
        yield

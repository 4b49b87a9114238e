"""Every family passes the whole built-in suite, under every kind of cache plan."""

from __future__ import annotations

import importlib
import inspect
import itertools
import pkgutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from harness import suite
from harness.checking import Cell, applies
from harness.presets import PRESETS
from harness.recipes import parse_recipe
from harness.reference import CachedReference, Reference, TransformersReference
from harness.reference.rounded import is_exact, rounded_checkpoint
from harness.synth import synth
from kvengine.engine import LocalEngine
from kvengine.export import export
from kvengine.plan import PlanKind
from kvengine.recipe import SessionRecipe

# Every check of every module of the suite; what takes anything but a cell is a measurement.
CHECKS: dict[str, Callable[[Cell], None]] = {
    name: check
    for found in pkgutil.iter_modules(suite.__path__, suite.__name__ + ".")
    for name, check in inspect.getmembers(importlib.import_module(found.name), inspect.isfunction)
    if name.startswith("test_") and list(inspect.signature(check).parameters) == ["cell"]
}
FAMILIES = [name for name in PRESETS if name.startswith("tiny-")]
RECIPES = ("hybrid,slack=2", "static", "naive", "hybrid-int8kv,slack=2")
ROUNDED = "int4,cache-dtype=int8,slack=1"  # where the reference has to know fused tensors and biases
EXAMPLES = 3


class Models:
    """Checkpoints, references and engines of all families, each made once."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._references: dict[Path, Reference] = {}
        self._engines: dict[tuple[str, str, str], LocalEngine] = {}

    def cell(self, family: str, recipe: str) -> Cell:
        chosen = parse_recipe(recipe)
        checkpoint = synth(family, self._root / family)
        weights = checkpoint
        if not is_exact(chosen.export):
            weights = rounded_checkpoint(checkpoint, chosen.export, self._root / "rounded")
        if weights not in self._references:
            self._references[weights] = CachedReference(TransformersReference(weights))

        def open_plan(kind: PlanKind) -> LocalEngine:
            key = (family, recipe, kind)
            if key not in self._engines:
                cache = chosen.export.cache
                if cache.kind != kind:
                    cache = replace(cache, kind=kind, slack=0)
                folder = self._root / f"{family}-{recipe}-{kind}"
                artifact = export(checkpoint, folder, replace(chosen.export, cache=cache))
                self._engines[key] = LocalEngine.open(artifact.folder, SessionRecipe(threads=1))
            return self._engines[key]

        spec = open_plan(chosen.export.cache.kind).model.spec
        return Cell(
            "here",
            chosen,
            spec,
            self._references[weights],
            open_plan,
            EXAMPLES,
            seed=1,
        )


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    return Models(tmp_path_factory.mktemp("suite"))


@pytest.mark.parametrize(
    ("family", "recipe"),
    [*itertools.product(FAMILIES, RECIPES), ("tiny-phi3", ROUNDED), ("tiny-qwen2", ROUNDED)],
)
def test_the_whole_suite_passes(family: str, recipe: str, models: Models) -> None:
    cell = models.cell(family, recipe)
    for name, check in CHECKS.items():
        marks = {mark.name for mark in getattr(check, "pytestmark", [])}
        if not applies(marks, cell.recipe):
            continue
        check(cell)
        assert cell.take_tally().programs >= 2, name

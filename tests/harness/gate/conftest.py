from __future__ import annotations

from pathlib import Path

import pytest

from harness.gate.references import Resolved
from kvengine.plan import CachePlan
from kvengine.recipe import ExportRecipe, SessionRecipe
from reports.gate_results import Side
from tests.conftest import ExportTiny
from tests.harness.gate.gates import Gate


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """So that the canary is made once."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def gate(export_tiny: ExportTiny, cache: Path, tmp_path: Path) -> Gate:
    recipes = {kind: ExportRecipe(cache=CachePlan(kind)) for kind in ("static", "hybrid")}
    sides = [
        Resolved(Side(name, name, artifact.id, "{}"), artifact, SessionRecipe())
        for name, artifact in ((name, export_tiny(recipe)) for name, recipe in recipes.items())
    ]
    return Gate(sides[0], sides[1], cache, tmp_path / "results.db")

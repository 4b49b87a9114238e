"""What a REF may be, and what is said when it is nothing."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from harness.gate.errors import UnknownReference
from harness.gate.references import Resolved, resolve
from harness.store import SqlStore, open_store
from kvengine.codec import encode
from kvengine.errors import RecipeError
from kvengine.recipe import ExportRecipe, SessionRecipe
from reports.gate_results import Comparison, GateInfo, Side
from tests.conftest import ExportTiny
from tests.harness.test_store import a_leg, a_run


@pytest.fixture
def store(tmp_path: Path) -> Iterator[SqlStore]:
    with open_store(tmp_path / "results.db") as opened:
        yield opened


@pytest.fixture
def cache(tmp_path: Path, export_tiny: ExportTiny) -> Path:
    """A cache that holds one artifact, as an earlier run left it."""
    (tmp_path / "cache" / "artifacts").mkdir(parents=True)
    (tmp_path / "cache" / "artifacts" / "tiny-1").symlink_to(export_tiny(ExportRecipe()).folder)
    return tmp_path / "cache"


def of(ref: str, store: SqlStore, cache: Path, model: Path | None = None) -> Resolved:
    return resolve(ref, model, cache, store, lambda stage, done, total: None)


def gate_of(side: Side) -> GateInfo:
    return GateInfo(
        kind="gate",
        plan_key="k",
        baseline=Side("naive", "naive", "0" * 64, "{}"),
        candidate=side,
        comparisons=(Comparison("gate"),),
        looks=(8,),
        alpha=0.01,
        level=0.003,
        planned_cells=0,
        settings="defaults",
    )


def test_an_artifact_folder_with_session_choices(
    store: SqlStore, cache: Path, export_tiny: ExportTiny
) -> None:
    artifact = export_tiny(ExportRecipe())
    found = of(f"{artifact.folder},threads=2", store, cache)
    assert (found.artifact.id, found.session.threads) == (artifact.id, 2)
    assert of(str(artifact.folder), store, cache).session == SessionRecipe()


def test_an_artifact_cannot_be_exported_otherwise(
    store: SqlStore, cache: Path, export_tiny: ExportTiny
) -> None:
    with pytest.raises(RecipeError, match="exported already"):
        of(f"{export_tiny(ExportRecipe()).folder},weights=int4", store, cache)


def test_a_recipe_of_the_model(store: SqlStore, tmp_path: Path, tiny_checkpoint: Path) -> None:
    found = of("static,threads=1", store, tmp_path, tiny_checkpoint)
    assert found.artifact.manifest.recipe.cache.kind == "static"
    assert (found.side.recipe, found.session.threads) == ("static,threads=1", 1)
    assert found.model == tiny_checkpoint.name


def test_a_recipe_needs_a_model(store: SqlStore, cache: Path) -> None:
    with pytest.raises(UnknownReference, match="say of which checkpoint: --model"):
        of("hybrid", store, cache)


def test_a_run_means_the_very_artifact_it_measured(
    store: SqlStore, cache: Path, export_tiny: ExportTiny
) -> None:
    artifact = export_tiny(ExportRecipe())
    store.begin_run(a_run())
    store.add_leg("r1", replace(a_leg(), provenance={"artifact": artifact.id}))
    assert of("r1", store, cache).artifact.id == artifact.id
    assert of("r1:hybrid", store, cache).side.recipe == "hybrid"


def test_a_run_of_several_recipes_needs_one_named(
    store: SqlStore, cache: Path, export_tiny: ExportTiny
) -> None:
    store.begin_run(a_run())
    for recipe in ("hybrid", "static"):
        provenance = {"artifact": export_tiny(ExportRecipe()).id}
        store.add_leg("r1", replace(a_leg(), recipe=recipe, provenance=provenance))
    with pytest.raises(UnknownReference, match="measured hybrid, static; say which: r1:RECIPE"):
        of("r1", store, cache)
    assert of("r1:static", store, cache).side.recipe == "static"


def test_a_tag_means_the_candidate_that_was_given_it(
    store: SqlStore, cache: Path, export_tiny: ExportTiny
) -> None:
    session = json.dumps(encode(SessionRecipe(threads=2)))
    side = Side("hybrid,threads=2", "hybrid,threads=2", export_tiny(ExportRecipe()).id, session)
    store.begin_run(replace(a_run(), gate=gate_of(side), tags=("v1.2",)))
    found = of("v1.2", store, cache)
    assert (found.side.recipe, found.session.threads) == ("hybrid,threads=2", 2)


def test_a_git_tag_means_the_run_of_its_commit(
    store: SqlStore, cache: Path, export_tiny: ExportTiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for words in (
        ["init", "-q"],
        ["-c", "user.name=x", "-c", "user.email=x@y", "commit", "-q", "--allow-empty", "-m", "x"],
        ["tag", "v2"],
    ):
        subprocess.run(["git", *words], check=True, timeout=30)
    head = subprocess.check_output(["git", "rev-parse", "HEAD"], text=True, timeout=30).strip()
    store.begin_run(replace(a_run(), provenance={"commit": head}))
    store.add_leg("r1", replace(a_leg(), provenance={"artifact": export_tiny(ExportRecipe()).id}))
    assert of("v2", store, cache).side.recipe == "hybrid"


def test_an_artifact_that_is_gone_is_told(store: SqlStore, cache: Path) -> None:
    store.begin_run(a_run())
    store.add_leg("r1", replace(a_leg(), provenance={"artifact": "f" * 64}))
    with pytest.raises(UnknownReference, match="which is no longer in"):
        of("r1", store, cache)


def test_what_names_nothing_is_told_what_there_is(store: SqlStore, cache: Path) -> None:
    with pytest.raises(UnknownReference, match=r"no stored run or tag, no recipe; recipes are naive, static"):
        of("nonsense", store, cache)

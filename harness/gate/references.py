"""What a REF on the command line means: an artifact, a stored run, a tag or a recipe.

- ``FOLDER[,threads=2...]``: an exported artifact, with session choices.
- ``RUN[:RECIPE]``: what that stored run measured; the very artifact, from the cache.
- ``TAG[:RECIPE]``: the newest stored run with this tag (harness.tags), or whose commit git calls TAG.
- ``PRESET[,KEY=VALUE...]``: a recipe of the checkpoint given with --model.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from harness.artifacts import artifact_for
from harness.gate.errors import UnknownReference
from harness.recipes import PRESETS, Recipe, parse_recipe
from harness.store.protocol import Store
from harness.tags import find_run
from kvengine.artifact import MANIFEST, Artifact
from kvengine.codec import decode, encode
from kvengine.errors import ArtifactError, RecipeError
from kvengine.recipe import SessionRecipe
from reports.gate_results import Side
from reports.results import RunResults

Report = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Resolved:
    """One side, ready to be measured."""

    side: Side
    artifact: Artifact
    session: SessionRecipe

    @property
    def model(self) -> str:
        return self.artifact.manifest.checkpoint

    @property
    def recipe(self) -> Recipe:
        return Recipe(self.side.recipe, self.artifact.manifest.recipe, self.session)


def resolve(ref: str, model: Path | None, cache: Path, store: Store, report: Report) -> Resolved:
    """What ``ref`` names, exported if it is a recipe.

    model: checkpoint folder for recipes. cache: holds ``artifacts``.

    Raises:
        UnknownReference: it names nothing, or an artifact that is gone. RecipeError, ArtifactError,
        and what an export raises.
    """
    folder, _, overrides = ref.partition(",")
    if (Path(folder) / MANIFEST).is_file():
        artifact = Artifact.open(folder)
        return _resolved(ref, f"artifact {Path(folder).name}", artifact, _session(ref, overrides))
    if ref.partition(",")[0].strip() in PRESETS:
        if model is None:
            raise UnknownReference(f"{ref!r} is a recipe; say of which checkpoint: --model FOLDER")
        recipe = parse_recipe(ref)
        artifact = artifact_for(model, recipe.export, cache / "artifacts", report)
        return _resolved(ref, recipe.name, artifact, recipe.session)
    name, _, wanted = ref.partition(":")
    run_id = find_run(name, store)
    if run_id is None:
        raise UnknownReference(
            f"sought {ref!r}: no folder with {MANIFEST}, no stored run or tag, no recipe; recipes are "
            f"{', '.join(PRESETS)}, `kvfarm report --list` lists the runs"
        )
    return _of_run(ref, store.results(run_id), wanted, cache)


def _resolved(ref: str, recipe: str, artifact: Artifact, session: SessionRecipe) -> Resolved:
    text = json.dumps(encode(session), sort_keys=True, separators=(",", ":"))
    return Resolved(Side(ref, recipe, artifact.id, text), artifact, session)


def _session(ref: str, overrides: str) -> SessionRecipe:
    """``threads=2,...`` of an artifact; its export is done, so only the session can be chosen."""
    if not overrides:
        return SessionRecipe()
    plain, chosen = parse_recipe("hybrid"), parse_recipe(f"hybrid,{overrides}")
    if chosen.export != plain.export:
        raise RecipeError(f"{ref!r}: an artifact is exported already; only session keys can be given here")
    return chosen.session


def _of_run(ref: str, run: RunResults, wanted: str, cache: Path) -> Resolved:
    if run.gate is not None:
        side = run.gate.candidate
        session = decode(SessionRecipe, json.loads(side.session))
        return _resolved(ref, side.recipe, _cached(ref, side.artifact, cache), session)
    measured = {leg.recipe: leg.provenance.get("artifact", "") for leg in run.legs}
    if (wanted and wanted not in measured) or (not wanted and len(measured) != 1):
        raise UnknownReference(
            f"{ref!r}: run {run.run_id} measured {', '.join(measured) or 'nothing'}; say which: "
            f"{run.run_id}:RECIPE"
        )
    recipe = wanted or next(iter(measured))
    return _resolved(ref, recipe, _cached(ref, measured[recipe], cache), parse_recipe(recipe).session)


def _cached(ref: str, artifact_id: str, cache: Path) -> Artifact:
    """The artifact with this sha256 in the cache."""
    for folder in sorted((cache / "artifacts").glob("*")):
        try:
            if Artifact.open(folder, verify=False).id == artifact_id:
                return Artifact.open(folder)
        except ArtifactError:
            continue
    raise UnknownReference(
        f"{ref!r} measured artifact {artifact_id[:16]}, which is no longer in {cache / 'artifacts'}; "
        "export it again from that commit and give its folder"
    )

"""Make the artifact of each recipe of a checkpoint once and find it again."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import kvengine
import kvengine.export
from harness.recipes import Recipe
from kvengine.artifact import Artifact, sha256_of
from kvengine.codec import encode
from kvengine.errors import ArtifactError
from kvengine.export import export
from kvengine.export.foreign import adopt, inspect_model, recipe_of, stated_by
from kvengine.recipe import ExportRecipe

Progress = Callable[[str, int, int], None]


def resolved(recipe: Recipe, checkpoint: Path) -> Recipe:
    """``recipe`` with what a foreign model is found to be; one of ours as it is.

    Raises what kvengine.export.foreign.inspect_model and Inspection.complete raise.
    """
    if recipe.foreign is None:
        return recipe
    answers = {**stated_by(checkpoint), **dict(recipe.foreign.answers)}
    return dataclasses.replace(recipe, export=recipe_of(inspect_model(recipe.foreign.path, answers)))


def artifact_of(checkpoint: Path, recipe: Recipe, root: Path, progress: Progress | None = None) -> Artifact:
    """The artifact of ``checkpoint`` with ``recipe`` under ``root``: exported, or a foreign model's files.

    Raises what kvengine.export.export and kvengine.export.foreign.adopt raise.
    """
    if recipe.foreign is None:
        return artifact_for(checkpoint, recipe.export, root, progress)
    return adopt(recipe.foreign.path, checkpoint, root, dict(recipe.foreign.answers), progress)


def artifact_for(
    checkpoint: Path,
    recipe: ExportRecipe,
    root: Path,
    progress: Progress | None = None,
) -> Artifact:
    """The artifact of ``checkpoint`` with ``recipe`` under ``root``, exported if it is not there whole.

    Raises what kvengine.export.export raises.
    """
    folder = root / f"{checkpoint.name}-{_key(checkpoint, recipe)[:16]}"
    if folder.exists():
        try:
            return Artifact.open(folder)
        except ArtifactError:
            pass  # damaged on disk: export replaces it
    return export(checkpoint, folder, recipe, progress=progress)


def _key(checkpoint: Path, recipe: ExportRecipe) -> str:
    """Changes with the checkpoint's files (by size and time, not 2 GB of content), recipe and exporter."""
    digest = hashlib.sha256(json.dumps(encode(recipe), sort_keys=True).encode())
    for file in sorted(checkpoint.glob("*")):
        state = file.stat()
        digest.update(f"{file.name} {state.st_size} {state.st_mtime_ns}\n".encode())
    source = Path(kvengine.__file__).parent
    for file in sorted(source.rglob("*.py")):
        digest.update(sha256_of(file).encode())
    return digest.hexdigest()

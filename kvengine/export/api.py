"""Checkpoint to artifact, in one call that leaves a whole artifact or nothing."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import onnx
import onnxruntime

import kvengine
from kvengine.artifact import MANIFEST, MODEL, Artifact, Blob, Manifest, sha256_of
from kvengine.codes import write_scales
from kvengine.errors import ArtifactError
from kvengine.export import genai
from kvengine.export.calibrate import calibrate
from kvengine.export.config import read_architecture
from kvengine.export.datafile import DataFile
from kvengine.export.graph import CacheScales, build_graph
from kvengine.export.store import Progress, WeightWriter
from kvengine.export.weights import Checkpoint
from kvengine.recipe import ExportRecipe

# What a checkpoint's prompts as text need; it goes with the artifact as it is.
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")


def export(
    checkpoint: Path,
    output: Path,
    recipe: ExportRecipe,
    *,
    calibration_tokens: Sequence[int] | None = None,
    progress: Progress | None = None,
) -> Artifact:
    """Export a Hugging Face folder to the artifact folder ``output``.

    Weights are streamed: beyond what is written, memory peaks at a few pieces of one matrix. The
    same checkpoint, recipe, sample and versions give the same bytes. An artifact already at
    ``output`` is replaced when the new one is whole.

    calibration_tokens: the sample that int8 and int4 cache scales are found on (needless for float
        caches); a seeded random one by default, noted in ``manifest.calibration``.
    progress: called as (stage, done, total), total in steps of that stage.

    Raises:
        CheckpointError: a file or tensor is missing, misshapen or not finite.
        UnsupportedModel: an architecture or setting the exporter does not know.
        RecipeError: a combination that onnxruntime cannot run.
        ArtifactError: ``output`` holds something that is not an artifact.
    """
    report = progress or (lambda stage, done, total: None)
    architecture = read_architecture(checkpoint)
    with _whole_or_nothing(output) as folder, Checkpoint(checkpoint) as tensors:
        with DataFile(folder) as data:
            weights = WeightWriter(tensors, data, recipe, report).write(architecture)
            blobs = [data.blob()]
        scales: CacheScales | None = None
        calibration: dict[str, str] = {}
        if recipe.cache.dtype in ("int8", "int4"):
            scales, calibration = calibrate(folder, architecture, recipe, weights, calibration_tokens, report)
            blobs.append(_blob(write_scales(folder, scales)))
        model = build_graph(architecture, recipe, weights, scales)
        (folder / MODEL).write_bytes(model.SerializeToString(deterministic=True))
        theirs = genai.build_genai_graph(architecture, recipe, weights, scales)
        (folder / genai.GRAPH).write_bytes(theirs.SerializeToString(deterministic=True))
        (folder / genai.CONFIG).write_text(genai.genai_config(architecture.spec, recipe.cache))
        copied = [name for name in TOKENIZER_FILES if (checkpoint / name).is_file()]
        for name in copied:
            shutil.copyfile(checkpoint / name, folder / name)
        report("identity", 0, 1)
        manifest = Manifest(
            spec=architecture.spec,
            recipe=recipe,
            plan=tuple(recipe.cache.of_layer(layer) for layer in architecture.spec.layers),
            blobs=(_blob(folder / MODEL), *blobs),
            checkpoint=checkpoint.resolve().name,
            checkpoint_sha256=tensors.sha256(),
            calibration=calibration,
            extras=tuple(_blob(folder / name) for name in (genai.GRAPH, genai.CONFIG, *copied)),
            versions={
                "kvfarm": kvengine.__version__,
                "onnx": onnx.__version__,
                "onnxruntime": onnxruntime.__version__,
            },
        )
        (folder / MANIFEST).write_text(manifest.to_json())
        report("identity", 1, 1)
    return Artifact(output, manifest)


def _blob(path: Path) -> Blob:
    return Blob(path.name, sha256_of(path), path.stat().st_size)


@contextmanager
def _whole_or_nothing(output: Path) -> Iterator[Path]:
    """A temporary folder beside ``output`` that takes its name when the block succeeds."""
    if (
        output.exists()
        and not (output / MANIFEST).is_file()
        and (not output.is_dir() or any(output.iterdir()))
    ):
        raise ArtifactError(
            f"sought a new folder or an artifact to replace at {output}, found something else; "
            "choose another output"
        )
    output.parent.mkdir(parents=True, exist_ok=True)
    parent = Path(tempfile.mkdtemp(prefix=f".{output.name}.", dir=output.parent))
    try:
        folder = parent / "new"
        folder.mkdir()
        yield folder
        if output.exists():
            output.rename(parent / "old")
        folder.rename(output)
    finally:
        shutil.rmtree(parent)

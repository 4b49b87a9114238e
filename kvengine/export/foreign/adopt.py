"""A foreign model and the checkpoint it was made of, as an artifact that deploys like any other."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Literal

import onnx
import onnxruntime

import kvengine
from kvengine.artifact import MANIFEST, MODEL, Artifact, Blob, Manifest, sha256_of
from kvengine.codes import SCALES, packed_scales
from kvengine.contract import Contract
from kvengine.errors import ArtifactError, UnsupportedModel
from kvengine.export.config import read_architecture
from kvengine.export.foreign.inspection import Inspection, inspect_model
from kvengine.export.weights import Checkpoint
from kvengine.plan import CacheDtype, CachePlan, LayerPlan
from kvengine.recipe import ExportRecipe
from kvengine.spec import ModelSpec

Progress = Callable[[str, int, int], None]


def adopt(
    model: Path,
    checkpoint: Path,
    root: Path,
    answers: Mapping[str, str] | None = None,
    progress: Progress | None = None,
) -> Artifact:
    """The artifact of the ONNX file ``model`` under ``root``, made if it is not there whole.

    The files are linked (copied across disks), not changed. What the graph leaves open and the
    checkpoint's config.json states (KV heads, head_dim, window) is taken from there.

    Raises:
        InvalidModel, ContractIncomplete, RecipeError: as inspect_model.
        UnsupportedModel: the graph is not of this checkpoint, or has its data in folders.
        CheckpointError: the checkpoint is not one.
    """
    report = progress or (lambda stage, done, total: None)
    spec = read_architecture(checkpoint).spec
    inspection = inspect_model(model, {**_stated(spec), **(answers or {})})
    contract = inspection.complete()
    spec = _fitted(model, spec, contract)
    files = {MODEL: model, **{_plain(model, name): model.parent / name for name in inspection.file.data}}
    blobs = []
    for done, (name, path) in enumerate(files.items()):
        report("identity", done, len(files) + 1)
        blobs.append(Blob(name, sha256_of(path), path.stat().st_size))
    made = {SCALES: packed_scales(inspection.scales)} if inspection.scales else {}
    blobs += [Blob(name, hashlib.sha256(data).hexdigest(), len(data)) for name, data in made.items()]
    report("identity", len(files), len(files) + 1)
    with Checkpoint(checkpoint) as tensors:
        checkpoint_sha256 = tensors.sha256()
    manifest = Manifest(
        spec=spec,
        recipe=recipe_of(inspection),
        plan=tuple(LayerPlan(la.kind, la.dtype, la.rows) for la in contract.layers),
        blobs=tuple(blobs),
        checkpoint=checkpoint.resolve().name,
        checkpoint_sha256=checkpoint_sha256,
        calibration={},
        versions={
            "kvfarm": kvengine.__version__,
            "onnx": onnx.__version__,
            "onnxruntime": onnxruntime.__version__,
        },
        contract=contract,
    )
    report("identity", len(files) + 1, len(files) + 1)
    return _laid_out(root / f"{model.stem}-{manifest.id[:16]}", manifest, files, made)


def stated_by(checkpoint: Path) -> dict[str, str]:
    """What a checkpoint's config.json says of a cache, as answers; only what is the same for all layers."""
    return _stated(read_architecture(checkpoint).spec)


def _stated(spec: ModelSpec) -> dict[str, str]:
    found = {
        "past.heads": {layer.kv_heads for layer in spec.layers},
        "past.head_dim": {layer.head_dim for layer in spec.layers},
        "past.window": {layer.window for layer in spec.layers if layer.window is not None},
    }
    return {key: str(values.pop()) for key, values in found.items() if len(values) == 1}


def contradictions(checkpoint: Path, contract: Contract) -> list[str]:
    """Where the graph says something else than the checkpoint's config.json, in words.

    What is no more than a wrong window can still be driven, and the suite finds what is wrong with its
    answers; with any other ``adopt`` refuses it.
    """
    spec = read_architecture(checkpoint).spec
    return [*_geometry(spec, contract), *_windows(spec, contract)]


def recipe_of(inspection: Inspection) -> ExportRecipe:
    """What the graph is made of, in the words of our own recipes: what tolerances go by."""
    contract = inspection.complete()
    dtypes = {layer.dtype for layer in contract.layers}
    order: tuple[CacheDtype, ...] = ("int4", "int8", "float16", "float32")
    coarsest = next(dtype for dtype in order if dtype in dtypes)
    activations: Literal["float32", "float16"] = "float16" if inspection.weights == "float16" else "float32"
    slack = min((la.rows - la.window for la in contract.layers if la.rows and la.window), default=0)
    plan = CachePlan(contract.kind, coarsest, slack if contract.kind == "hybrid" else 0)
    return ExportRecipe(inspection.weights, 32, activations, plan)


def _fitted(model: Path, spec: ModelSpec, contract: Contract) -> ModelSpec:
    """The checkpoint's spec with the graph's limit on positions.

    Raises UnsupportedModel where graph and checkpoint cannot belong together.
    """
    if wrong := _geometry(spec, contract):
        raise UnsupportedModel(f"{model} is not of this checkpoint: {'; '.join(wrong)}")
    return dataclasses.replace(spec, max_position=min(spec.max_position, contract.rows or spec.max_position))


def _geometry(spec: ModelSpec, contract: Contract) -> list[str]:
    pairs: list[tuple[str, object, object]] = [
        ("layers", len(spec.layers), len(contract.layers)),
        ("KV heads", [la.kv_heads for la in spec.layers], [la.kv_heads for la in contract.layers]),
        ("head_dim", [la.head_dim for la in spec.layers], [la.head_dim for la in contract.layers]),
        ("vocabulary", spec.vocab_size, contract.vocab_size or spec.vocab_size),
    ]
    return [f"{what}: sought {a} (config.json), found {b}" for what, a, b in pairs if a != b]


def _windows(spec: ModelSpec, contract: Contract) -> Iterator[str]:
    """Of layers whose graph tells a window, or that there is none; a mask tells nothing."""
    found: dict[tuple[int | None, int | None], list[str]] = {}
    for number, (layer, graph) in enumerate(zip(spec.layers, contract.layers, strict=False)):
        told = graph.window is not None or graph.writer == "GroupQueryAttention"
        if told and graph.window != layer.window:
            found.setdefault((layer.window, graph.window), []).append(str(number))
    for (sought, has), layers in found.items():
        yield (
            f"window of layer {', '.join(layers)}: sought {sought or 'none'} (config.json), "
            f"found {has or 'none'}"
        )


def _plain(model: Path, name: str) -> str:
    if PurePosixPath(name).name != name or name in (MODEL, MANIFEST, SCALES) or name.startswith("."):
        raise UnsupportedModel(
            f"{model} keeps data in {name!r}; sought a plain file beside the model, not called {MODEL}, "
            f"{MANIFEST}, {SCALES} or .something; save it again with onnx.save_model(..., location='weights')"
        )
    return name


def _laid_out(
    folder: Path, manifest: Manifest, files: Mapping[str, Path], made: Mapping[str, bytes]
) -> Artifact:
    if folder.exists():
        try:
            return Artifact.open(folder)
        except ArtifactError:
            shutil.rmtree(folder)  # damaged on disk
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        for name, source in files.items():
            _link(source.resolve(), partial / name)
        for name, data in made.items():
            (partial / name).write_bytes(data)
        (partial / MANIFEST).write_text(manifest.to_json())
        partial.chmod(0o755)  # mkdtemp makes it private to this user
        partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return Artifact.open(folder)


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:  # another disk, or one without links
        shutil.copyfile(source, target)

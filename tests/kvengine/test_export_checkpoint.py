"""Checkpoints are streamed, checked tensor by tensor, and an export is whole or not there at all."""

from __future__ import annotations

import json
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from harness.synth import synth
from kvengine.artifact import Artifact
from kvengine.errors import ArtifactError, CheckpointError
from kvengine.export import export
from kvengine.export.config import load_architecture
from kvengine.export.store import layer_layout, vector_layout
from kvengine.export.weights import Checkpoint, Matrix, Part
from kvengine.recipe import ExportRecipe, Weights
from tests.kvengine.export_support import Tensors, initializers, read_config, variant

QUERY = "model.layers.3.self_attn.q_proj.weight"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return synth("tiny-gemma3", tmp_path_factory.mktemp("checkpoints") / "tiny-gemma3")


def spoiled(value: float) -> Callable[[Tensors], Tensors]:
    def spoil(tensors: Tensors) -> Tensors:
        tensors[QUERY][5, 7] = value
        return tensors

    return spoil


def without(name: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {key: value for key, value in tensors.items() if key != name}


def with_query(change: Callable[[Any], Any]) -> Callable[[Tensors], Tensors]:
    return lambda tensors: tensors | {QUERY: change(tensors[QUERY])}


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (spoiled(np.nan), [QUERY, "nan"]),
        (spoiled(-np.inf), [QUERY, "-inf"]),
        (without(QUERY), [QUERY, "found none"]),
        (without("model.norm.weight"), ["model.norm.weight"]),
        (without("model.embed_tokens.weight"), ["model.embed_tokens.weight"]),
        (with_query(lambda query: query[:-1]), [QUERY, "[128, 64]", "[127, 64]"]),
        (with_query(lambda query: query.T), [QUERY, "[128, 64]", "[64, 128]"]),
        (with_query(lambda query: query.astype(np.int8)), [QUERY, "I8", "BF16"]),
    ],
)
@pytest.mark.parametrize("weights", ["float32", "int4"])
def test_an_unusable_tensor_is_named_and_nothing_is_left(
    tiny: Path, tmp_path: Path, change: Callable[[Tensors], Tensors], named: list[str], weights: Weights
) -> None:
    checkpoint = variant(tiny, tmp_path / "spoiled", tensors=change)
    with pytest.raises(CheckpointError) as refusal:
        export(checkpoint, tmp_path / "a", ExportRecipe(weights=weights))
    for word in named:
        assert word in str(refusal.value)
    assert [path.name for path in tmp_path.iterdir()] == ["spoiled"]


def test_a_norm_with_nan_is_named(tiny: Path, tmp_path: Path) -> None:
    def spoil(tensors: Tensors) -> Tensors:
        tensors["model.norm.weight"][0] = np.nan
        return tensors

    checkpoint = variant(tiny, tmp_path / "spoiled", tensors=spoil)
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight"):
        export(checkpoint, tmp_path / "a", ExportRecipe())


def test_a_vocabulary_of_another_size_than_the_embedding_is_refused(tiny: Path, tmp_path: Path) -> None:
    checkpoint = variant(tiny, tmp_path / "m", config=read_config(tiny) | {"vocab_size": 332})
    with pytest.raises(CheckpointError, match=r"embed_tokens.*\[332, 64\].*\[331, 64\]"):
        export(checkpoint, tmp_path / "a", ExportRecipe())


def test_an_untied_config_without_a_head_is_refused(tiny: Path, tmp_path: Path) -> None:
    config = read_config(tiny) | {"tie_word_embeddings": False}
    checkpoint = variant(tiny, tmp_path / "headless", config=config)
    with pytest.raises(CheckpointError, match=r"lm_head\.weight"):
        export(checkpoint, tmp_path / "a", ExportRecipe())


def test_weights_too_large_for_float16_are_refused(tiny: Path, tmp_path: Path) -> None:
    checkpoint = variant(tiny, tmp_path / "large", tensors=spoiled(1e5))
    with pytest.raises(CheckpointError, match=r"q_proj.*65504 for float16.*100000"):
        export(checkpoint, tmp_path / "a", ExportRecipe(weights="float16"))
    export(checkpoint, tmp_path / "a", ExportRecipe(weights="float32"))


def test_a_folder_without_safetensors_is_refused(tiny: Path, tmp_path: Path) -> None:
    checkpoint = variant(tiny, tmp_path / "empty")
    (checkpoint / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        export(checkpoint, tmp_path / "a", ExportRecipe())


def test_a_truncated_file_is_refused(tiny: Path, tmp_path: Path) -> None:
    checkpoint = variant(tiny, tmp_path / "cut")
    path = checkpoint / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=r"model\.safetensors is not a whole safetensors file"):
        export(checkpoint, tmp_path / "a", ExportRecipe())


def shard(checkpoint: Path) -> Path:
    """Split the single file of a checkpoint in two."""
    path = checkpoint / "model.safetensors"
    tensors = dict(load_file(path))
    path.unlink()
    names = sorted(tensors)
    files = {name: f"model-0000{i % 2 + 1}-of-00002.safetensors" for i, name in enumerate(names)}
    for file in set(files.values()):
        save_file({name: tensors[name] for name in names if files[name] == file}, checkpoint / file)
    (checkpoint / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    return checkpoint


def test_a_sharded_checkpoint_gives_the_same_weights(tiny: Path, tmp_path: Path) -> None:
    sharded = export(shard(variant(tiny, tmp_path / "shards")), tmp_path / "a", ExportRecipe())
    whole = export(tiny, tmp_path / "b", ExportRecipe())
    assert sharded.manifest.blobs == whole.manifest.blobs
    assert sharded.manifest.checkpoint_sha256 != whole.manifest.checkpoint_sha256


@pytest.mark.parametrize("damage", ["missing shard", "outside", "no map", "no JSON"])
def test_a_damaged_index_is_refused(tiny: Path, tmp_path: Path, damage: str) -> None:
    checkpoint = shard(variant(tiny, tmp_path / "shards"))
    index = checkpoint / "model.safetensors.index.json"
    if damage == "missing shard":
        (checkpoint / "model-00002-of-00002.safetensors").unlink()
    elif damage == "outside":
        index.write_text(json.dumps({"weight_map": {QUERY: "../tiny/model.safetensors"}}))
    else:
        index.write_text("{}" if damage == "no map" else "{")
    if damage == "outside":
        (tmp_path / "tiny").mkdir()
        save_file({QUERY: np.zeros((128, 64), np.float32)}, tmp_path / "tiny" / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"index\.json"):
        export(checkpoint, tmp_path / "a", ExportRecipe())


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_half_precision_checkpoints_are_widened_exactly(tiny: Path, tmp_path: Path, dtype: Any) -> None:
    def narrow(tensors: Tensors) -> Tensors:
        return {name: value.astype(dtype) for name, value in tensors.items()}

    checkpoint = variant(tiny, tmp_path / "narrow", tensors=narrow)
    stored = initializers(export(checkpoint, tmp_path / "a", ExportRecipe()))
    narrowed = load_file(checkpoint / "model.safetensors")
    embedding = narrowed["model.embed_tokens.weight"].astype(np.float32)
    output = narrowed["model.layers.2.self_attn.o_proj.weight"].astype(np.float32)
    norm = narrowed["model.norm.weight"].astype(np.float32)
    assert np.array_equal(stored["embedding"], embedding)
    assert np.array_equal(stored["layers.2.out"], output.T)
    assert np.array_equal(stored["norm"], norm + np.float32(1))


def test_every_language_tensor_of_the_checkpoint_is_used(tiny: Path) -> None:
    architecture = load_architecture(read_config(tiny))
    used = {part.name for matrix in layer_layout(architecture, "model.").values() for part in matrix.parts}
    used |= {tensor for tensor, _ in vector_layout(architecture, "model.").values()}
    assert used | {"model.embed_tokens.weight"} == set(load_file(tiny / "model.safetensors"))


@pytest.mark.parametrize(("rows", "columns"), [(3000, 700), (700, 3000), (1, 5), (5, 1), (2, 3_000_000)])
def test_pieces_cover_the_matrix_in_either_direction(tmp_path: Path, rows: int, columns: int) -> None:
    rng = np.random.default_rng(0)
    parts = {name: rng.standard_normal((rows, columns), dtype=np.float32) for name in ("a", "b")}
    save_file(parts, tmp_path / "model.safetensors")
    matrix = Matrix((Part("a", rows), Part("b", rows)), columns)
    whole = np.concatenate([parts["a"], parts["b"]])
    with Checkpoint(tmp_path) as checkpoint:
        assert np.array_equal(np.concatenate(list(checkpoint.row_pieces(matrix))), whole)
        assert np.array_equal(np.concatenate(list(checkpoint.column_pieces(matrix))), whole.T)


@pytest.mark.parametrize("weights", ["float32", "int4"])
def test_weights_are_streamed(tiny: Path, tmp_path: Path, weights: Weights) -> None:
    """Peak memory stays below twice the largest tensor; the model is four times as large."""
    config = read_config(tiny) | {"vocab_size": 32_768, "hidden_size": 256, "intermediate_size": 16_384}
    config |= {"num_hidden_layers": 2, "layer_types": ["full_attention"] * 2}
    checkpoint = variant(tiny, tmp_path / "wide", config=config)
    _write_constant_weights(checkpoint)
    largest = 32_768 * 256 * 4
    tracemalloc.start()
    artifact = export(checkpoint, tmp_path / "a", ExportRecipe(weights=weights))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert sum(path.stat().st_size for path in checkpoint.glob("*.safetensors")) > 4 * largest
    assert peak < 2 * largest
    assert artifact.manifest.blobs[1].size > largest / 2


def _write_constant_weights(checkpoint: Path) -> None:
    architecture = load_architecture(read_config(checkpoint))
    tensors: Tensors = {
        part.name: np.full((part.rows, matrix.columns), 0.01, np.float32)
        for matrix in layer_layout(architecture, "model.").values()
        for part in matrix.parts
    }
    tensors |= {
        tensor: np.zeros(size, np.float32) for tensor, size in vector_layout(architecture, "model.").values()
    }
    spec = architecture.spec
    tensors["model.embed_tokens.weight"] = np.full((spec.vocab_size, spec.hidden_size), 0.01, np.float32)
    save_file(tensors, checkpoint / "model.safetensors")


def test_the_identity_covers_the_config(tiny: Path, tmp_path: Path) -> None:
    other = variant(tiny, tmp_path / "other", config=read_config(tiny) | {"comment": "x"})
    with Checkpoint(tiny) as one, Checkpoint(other) as two:
        assert one.sha256() != two.sha256()


def test_a_failed_export_leaves_the_old_artifact(tiny: Path, tmp_path: Path) -> None:
    old = export(tiny, tmp_path / "a", ExportRecipe())
    checkpoint = variant(tiny, tmp_path / "spoiled", tensors=spoiled(np.nan))
    with pytest.raises(CheckpointError):
        export(checkpoint, tmp_path / "a", ExportRecipe())
    assert Artifact.open(tmp_path / "a").id == old.id
    new = export(tiny, tmp_path / "a", ExportRecipe(weights="int8"))
    assert Artifact.open(tmp_path / "a").id == new.id != old.id
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "spoiled"]


def test_what_is_no_artifact_is_never_overwritten(tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter").write_text("dear")
    (tmp_path / "file").write_text("dear")
    for name in ("mine", "file"):
        with pytest.raises(ArtifactError, match=name):
            export(tiny, tmp_path / name, ExportRecipe())
    assert (tmp_path / "mine" / "letter").read_text() == "dear"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "mine"]
    (tmp_path / "empty" / "folder").mkdir(parents=True)
    assert export(tiny, tmp_path / "empty" / "folder", ExportRecipe()).folder.is_dir()

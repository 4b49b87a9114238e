"""The checkpoint that a recipe's weights stand for: the reference then judges the cache, not the rounding.

Every matrix that the exporter stores in float16, int8 or int4 is rounded the same way and written
back in float32; how far that moves a weight is held by the exporter's own tests (at most half a scale).
"""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path

import numpy as np
import numpy.typing as npt
from safetensors.numpy import save_file

from kvengine.export.config import read_architecture
from kvengine.export.families import HEAD_NAMES, WEIGHT_PREFIXES
from kvengine.export.quantize import WEIGHT_BITS, dequantize_rows, quantize_rows
from kvengine.export.store import layer_layout
from kvengine.export.weights import INDEX, Checkpoint, Matrix, Part
from kvengine.recipe import ExportRecipe


def is_exact(recipe: ExportRecipe) -> bool:
    """True if the recipe keeps every weight as the checkpoint has it, up to float32."""
    return recipe.weights == "float32"


def rounded_checkpoint(checkpoint: Path, recipe: ExportRecipe, root: Path) -> Path:
    """A Hugging Face folder under ``root`` with the rounded weights, written once; one shard a tensor.

    Raises what kvengine.export.export raises for a bad checkpoint.
    """
    with Checkpoint(checkpoint) as tensors:
        suffix = f"b{recipe.block_size}" if recipe.weights in WEIGHT_BITS else ""
        folder = root / f"{checkpoint.name}-{tensors.sha256()[:16]}-{recipe.weights}{suffix}"
        if folder.is_dir():
            return folder
        root.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(dir=root, prefix=".partial-"))
        try:
            _write(tensors, checkpoint, recipe, partial)
            partial.rename(folder)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    return folder


def _write(tensors: Checkpoint, checkpoint: Path, recipe: ExportRecipe, folder: Path) -> None:
    for name in ("config.json", "generation_config.json"):
        if (checkpoint / name).is_file():
            shutil.copy(checkpoint / name, folder / name)
    rounded = _matrices(tensors, checkpoint)
    weight_map = {}
    for number, name in enumerate(tensors.names()):
        if name in rounded:
            pieces = [_round(piece, recipe) for piece in tensors.row_pieces(rounded[name])]
            values = np.concatenate(pieces)
        else:
            values = tensors.whole(name)
        shard = f"model-{number:05d}.safetensors"
        save_file({name: values}, str(folder / shard), metadata={"format": "pt"})
        weight_map[name] = shard
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}, indent=1))


def _matrices(tensors: Checkpoint, checkpoint: Path) -> dict[str, Matrix]:
    """The tensors that the exporter rounds, each as a matrix of its own."""
    architecture = read_architecture(checkpoint)
    spec = architecture.spec
    embedding = tensors.find(tuple(p + "embed_tokens.weight" for p in WEIGHT_PREFIXES))
    layout = layer_layout(architecture, embedding.removesuffix("embed_tokens.weight"))
    found = {part.name: Matrix((part,), m.columns) for m in layout.values() for part in m.parts}
    found[embedding] = Matrix((Part(embedding, spec.vocab_size),), spec.hidden_size)
    if not spec.tied_head:
        head = tensors.find(HEAD_NAMES)
        found[head] = Matrix((Part(head, spec.vocab_size),), spec.hidden_size)
    return found


def _round(weights: npt.NDArray[np.float32], recipe: ExportRecipe) -> npt.NDArray[np.float32]:
    if recipe.weights not in WEIGHT_BITS:
        return weights.astype(recipe.weights).astype(np.float32)
    bits = WEIGHT_BITS[recipe.weights]
    stored = quantize_rows(weights, bits, recipe.block_size, np.dtype(recipe.activations))
    return dequantize_rows(stored.codes, stored.scales, bits, weights.shape[1])

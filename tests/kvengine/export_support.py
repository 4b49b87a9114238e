"""Checkpoints, variations of them, and both sides of the comparison with transformers."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from safetensors.numpy import load_file, save_file

from kvengine.artifact import Artifact
from kvengine.decoder import Decoder
from kvengine.export.datafile import NAME
from kvengine.model import Model
from kvengine.recipe import SessionRecipe
from kvengine.rope import rope_tables
from kvengine.spec import ModelSpec

Tensors = dict[str, npt.NDArray[Any]]
Float32 = npt.NDArray[np.float32]

# Longer than several windows of the tiny model, so that windowed caches wrap more than once.
TOKENS = [int(token) for token in np.random.default_rng(7).integers(0, 300, 41)]


def read_config(checkpoint: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((checkpoint / "config.json").read_text())
    return config


def variant(
    source: Path,
    target: Path,
    *,
    config: dict[str, Any] | None = None,
    tensors: Callable[[Tensors], Tensors] | None = None,
) -> Path:
    """A copy of a checkpoint with another config.json or other tensors."""
    shutil.copytree(source, target)
    if config is not None:
        (target / "config.json").write_text(json.dumps(config))
    if tensors is not None:
        path = target / "model.safetensors"
        changed = {
            name: np.ascontiguousarray(value) for name, value in tensors(dict(load_file(path))).items()
        }
        save_file(changed, path, metadata={"format": "pt"})
    return target


def reference_logits(checkpoint: Path, tokens: Sequence[int]) -> Float32:
    """transformers, float32, eager attention, no cache: [len(tokens), vocab]."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        checkpoint, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    with torch.no_grad():
        logits: Float32 = model(torch.tensor([list(tokens)]), use_cache=False).logits[0].numpy()
    return logits


def engine_logits(artifact: Artifact, tokens: Sequence[int], chunk: int = 0) -> Float32:
    """The artifact in our own Decoder: [len(tokens), vocab]."""
    decoder = Decoder(Model(artifact, SessionRecipe(threads=1)), capacity=64)
    return decoder.prefill(tokens, chunk=chunk, logits="all")


def first_step(
    spec: ModelSpec, tokens: npt.NDArray[np.int64], rows_of_cache: int = 0
) -> dict[str, npt.NDArray[Any]]:
    """Inputs of a float32 graph's first step over ``tokens`` [B, S], but for ``logits_index``."""
    batch, length = tokens.shape
    feeds: dict[str, npt.NDArray[Any]] = {
        "input_ids": tokens,
        "seqlens_k": np.full(batch, length - 1, np.int32),
        "total_sequence_length": np.array([length], np.int32),
        "query_seqlens": np.full(batch, length, np.int32),
    }
    for r, rope in enumerate(spec.ropes):
        tables = rope_tables(rope, length, spec.layers[0].head_dim)
        feeds |= {f"cos_cache.{r}": tables[0], f"sin_cache.{r}": tables[1]}
    for i, layer in enumerate(spec.layers):
        empty = np.zeros((batch, layer.kv_heads, rows_of_cache, layer.head_dim), np.float32)
        feeds |= {f"past_key_values.{i}.{part}": empty for part in ("key", "value")}
    return feeds


def initializers(artifact: Artifact) -> dict[str, npt.NDArray[Any]]:
    """Every initializer of the graph, read from the data file by offset and length."""
    data = (artifact.folder / NAME).read_bytes()
    found: dict[str, npt.NDArray[Any]] = {}
    for tensor in onnx.load(artifact.model_path, load_external_data=False).graph.initializer:
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            place = {entry.key: entry.value for entry in tensor.external_data}
            start, length = int(place["offset"]), int(place["length"])
            dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type)
            flat = np.frombuffer(data[start : start + length], dtype)
            found[tensor.name] = flat.reshape(tuple(tensor.dims))
        else:
            found[tensor.name] = onnx.numpy_helper.to_array(tensor)
    return found

"""Scales of an int8 or int4 KV cache: the largest magnitude that each channel takes on a token sample."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime

from kvengine.errors import CheckpointError, InvalidRequest, InvalidToken
from kvengine.export.config import Architecture
from kvengine.export.graph import CacheScales, build_graph
from kvengine.export.store import Progress, StoredModel
from kvengine.plan import BITS, CacheDtype, CachePlan
from kvengine.recipe import ExportRecipe
from kvengine.rope import rope_tables
from kvengine.spec import ModelSpec

Float32 = npt.NDArray[np.float32]
SAMPLE_TOKENS = 512
# A sample misses the extremes. Eight bits can afford room for them: on random tiny models 1.2 cut
# the RMS error of logits by a quarter. With four bits the coarser steps cost more than clipping.
_HEADROOM: dict[CacheDtype, float] = {"int8": 1.2, "int4": 1.0}
SEED = 0
_CHUNK = 64
_GRAPH = "calibration.onnx"


def calibrate(
    folder: Path,
    architecture: Architecture,
    recipe: ExportRecipe,
    weights: StoredModel,
    tokens: Sequence[int] | None,
    progress: Progress,
) -> tuple[CacheScales, dict[str, str]]:
    """Run the model, weights as exported but cache in float, over the sample.

    The scale of a channel is ``headroom * max |x| / (2**(bits-1) - 1)`` over the sample, x being
    V or K rotated to its worst position; nothing in the sample is clipped.

    Returns:
        Per layer the scales of K and V, float32 [1, kv_heads, 1, head_dim]; and how they were
        found, for the manifest.

    Raises:
        InvalidToken: a sample token out of vocabulary. InvalidRequest: an empty sample.
        CheckpointError: K or V overflows.
    """
    spec = architecture.spec
    sample = _sample(spec, tokens)
    plain = replace(recipe, cache=CachePlan("growing", dtype=recipe.activations))
    path = folder / _GRAPH
    path.write_bytes(build_graph(architecture, plain, weights, None).SerializeToString())
    try:
        magnitudes = _channel_magnitudes(path, spec, np.dtype(recipe.activations), sample, progress)
    finally:
        path.unlink()
    dtype = recipe.cache.dtype
    step = _HEADROOM[dtype] / ((1 << (BITS[dtype] - 1)) - 1)
    scales = [(_scale(key, step), _scale(value, step)) for key, value in magnitudes]
    for i, pair in enumerate(scales):
        if not np.isfinite(pair).all():
            raise CheckpointError(
                f"layer {i}: sought finite K and V on the calibration sample, found NaN or infinity; "
                f"activations {recipe.activations} may be too narrow for this checkpoint"
            )
    note = {
        "method": "per-channel max-abs of V and of K at any rotation, float cache",
        "headroom": str(_HEADROOM[dtype]),
        "sample": "given" if tokens is not None else f"random, numpy default_rng({SEED})",
        "sample_tokens": str(len(sample)),
        "sample_sha256": hashlib.sha256(sample.astype("<i8").tobytes()).hexdigest(),
    }
    return scales, note


def _sample(spec: ModelSpec, tokens: Sequence[int] | None) -> npt.NDArray[np.int64]:
    if tokens is None:
        length = min(SAMPLE_TOKENS, spec.max_position)
        return np.random.default_rng(SEED).integers(0, spec.vocab_size, length)
    sample = np.array(tokens, np.int64)
    if not sample.size:
        raise InvalidRequest("sought at least one calibration token, found none")
    bad = sample[(sample < 0) | (sample >= spec.vocab_size)]
    if bad.size:
        raise InvalidToken(f"calibration token {bad[0]} is outside [0, {spec.vocab_size})")
    return sample


def _channel_magnitudes(
    path: Path, spec: ModelSpec, dtype: np.dtype[Any], sample: npt.NDArray[np.int64], progress: Progress
) -> list[tuple[Float32, Float32]]:
    """max |K| and max |V| over all positions, [kv_heads, head_dim] per layer."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    cache = [
        np.zeros((1, layer.kv_heads, 0, layer.head_dim), dtype) for layer in spec.layers for _ in range(2)
    ]
    names = [f"past_key_values.{i}.{part}" for i in range(len(spec.layers)) for part in ("key", "value")]
    feeds = _rotary_tables(spec, len(sample), dtype)
    for start in range(0, len(sample), _CHUNK):
        progress("calibration", start, len(sample))
        chunk = sample[start : start + _CHUNK]
        total = start + len(chunk)
        feeds |= {
            "input_ids": chunk[None],
            "logits_index": np.zeros(0, np.int64),
            "seqlens_k": np.array([total - 1], np.int32),
            "total_sequence_length": np.array([total], np.int32),
            "query_seqlens": np.array([len(chunk)], np.int32),
            **dict(zip(names, cache, strict=True)),
        }
        cache = session.run([name.replace("past_key_values", "present") for name in names], feeds)
    progress("calibration", len(sample), len(sample))
    keys = [
        _rotated_magnitude(rows.astype(np.float32), 0 if layer.rope is None else spec.rotary_dim(layer.rope))
        for rows, layer in zip(cache[0::2], spec.layers, strict=True)
    ]
    values = [np.abs(rows.astype(np.float32)).max(axis=(0, 2)) for rows in cache[1::2]]
    return list(zip(keys, values, strict=True))


def _rotated_magnitude(keys: Float32, rotary_dim: int) -> Float32:
    """The most that each channel of K can be at any position, [kv_heads, head_dim].

    Rotation moves length between channels j and j + rotary_dim / 2 and keeps their joint length.
    A short sample shows slow channels at one angle only, so the joint length is what counts.
    Channels from rotary_dim on do not rotate.
    """
    first, second = np.split(keys[..., :rotary_dim], 2, axis=3)
    joint = np.hypot(first, second).max(axis=(0, 2))
    still = np.abs(keys[..., rotary_dim:]).max(axis=(0, 2))
    return np.concatenate([joint, joint, still], axis=1)


def _rotary_tables(spec: ModelSpec, positions: int, dtype: np.dtype[Any]) -> dict[str, npt.NDArray[Any]]:
    feeds: dict[str, npt.NDArray[Any]] = {}
    for r, rope in enumerate(spec.ropes):
        cos, sin = rope_tables(rope, positions, spec.head_dim_of(r))
        feeds |= {f"cos_cache.{r}": cos.astype(dtype), f"sin_cache.{r}": sin.astype(dtype)}
    return feeds


def _scale(magnitude: Float32, step: float) -> Float32:
    # A channel that stayed zero has no scale of its own; a zero scale would divide by zero.
    scale = np.where(magnitude > 0, magnitude, magnitude.max() or 1.0) * step
    return scale.astype(np.float32)[None, :, None, :]

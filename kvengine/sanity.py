"""Whether artifact.json makes sense, by itself and with the graph beside it: anybody may have edited it."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterator
from typing import TYPE_CHECKING

import onnxruntime as ort

from kvengine.codec import encode
from kvengine.contract import wrong_in_contract
from kvengine.errors import ArtifactError
from kvengine.recipe import ExportRecipe
from kvengine.spec import LayerSpec, LongRopeScaling, ModelSpec, RopeSpec, YarnScaling

if TYPE_CHECKING:
    from kvengine.artifact import Blob, Manifest

IDENTITY = "kvfarm.identity"  # key in the graph's metadata
_MOST = 1 << 24  # of any size in a model
_MOST_LAYERS = 4096
_MOST_POSITIONS = 2**31 - 1  # lengths are int32 in the graph
_SHA256 = re.compile(r"[0-9a-f]{64}")


def check_manifest(manifest: Manifest) -> None:
    """Raise ArtifactError for sizes that no model has, and for names that are not plain files'."""
    wrong = next(_wrong_in(manifest), None)
    if wrong is not None:
        raise ArtifactError(f"artifact.json makes no sense: {wrong}; export or deploy again")


def identity_of(spec: ModelSpec, recipe: ExportRecipe) -> str:
    """sha256 of what a graph was built from; the exporter writes it into the graph as ``IDENTITY``."""
    return hashlib.sha256(json.dumps([encode(spec), encode(recipe)], sort_keys=True).encode()).hexdigest()


def check_identity(session: ort.InferenceSession, manifest: Manifest) -> None:
    """Raise ArtifactError unless the graph was built from the manifest's spec and recipe.

    The manifest vouches for the graph's bytes; this is the other direction. Another window, RoPE base
    or head map in artifact.json would otherwise give wrong logits, or buffers of another size than
    onnxruntime writes to.
    """
    found = session.get_modelmeta().custom_metadata_map.get(IDENTITY)
    plan = tuple(manifest.recipe.cache.of_layer(layer) for layer in manifest.spec.layers)
    if found != identity_of(manifest.spec, manifest.recipe) or plan != manifest.plan:
        raise ArtifactError(
            "artifact.json is not what the graph was built from: its spec, recipe or plan was altered, or "
            "an older kvfarm exported it; export again"
        )


def _wrong_in(manifest: Manifest) -> Iterator[str]:
    yield from _wrong_in_files((*manifest.blobs, *manifest.extras))
    spec = manifest.spec
    yield from wrong_in_spec(spec)
    if manifest.contract is not None:
        yield from wrong_in_contract(manifest.contract, len(spec.layers))
    if len(manifest.plan) != len(spec.layers):
        yield f"sought a plan for {len(spec.layers)} layers, found one for {len(manifest.plan)}"
    if not 0 <= manifest.recipe.cache.slack <= _MOST:
        yield f"sought a slack of 0 or more rows, found {manifest.recipe.cache.slack}"


def wrong_in_spec(spec: ModelSpec) -> Iterator[str]:
    """Everything about a geometry that no model has; nothing for a sound one."""
    yield from _wrong_in_sizes(spec)
    for number, layer in enumerate(spec.layers):
        yield from (f"layer {number}: {wrong}" for wrong in _wrong_in_layer(layer, spec))
    for number, rope in enumerate(spec.ropes):
        yield from (f"rope {number}: {wrong}" for wrong in _wrong_in_rope(rope, number, spec))


def _wrong_in_files(blobs: tuple[Blob, ...]) -> Iterator[str]:
    seen: set[str] = set()
    for blob in blobs:
        plain = blob.name and "/" not in blob.name and "\\" not in blob.name and "\0" not in blob.name
        if not plain or blob.name.startswith(".") or len(blob.name) > 200 or blob.name == "artifact.json":
            yield f"sought a plain file name, found {blob.name[:80]!r}"
        if blob.name in seen:
            yield f"{blob.name!r} is there twice"
        seen.add(blob.name)
        if not _SHA256.fullmatch(blob.sha256) or blob.size < 0:
            yield f"{blob.name!r} has no sha256 of 64 hex digits or a negative size"


def _wrong_in_sizes(spec: ModelSpec) -> Iterator[str]:
    if not 1 <= len(spec.layers) <= _MOST_LAYERS:
        yield f"sought 1..{_MOST_LAYERS} layers, found {len(spec.layers)}"
    for name in ("vocab_size", "hidden_size", "intermediate_size", "num_heads"):
        if not 1 <= getattr(spec, name) <= _MOST:
            yield f"{name}: sought 1..{_MOST}, found {_short(getattr(spec, name))}"
    if not 1 <= spec.max_position <= _MOST_POSITIONS:
        yield f"max_position: sought 1..{_MOST_POSITIONS}, found {_short(spec.max_position)}"
    for name in ("attention_scale", "norm_eps"):
        if not _is_positive(getattr(spec, name)):
            yield f"{name}: sought a positive number, found {getattr(spec, name)}"
    if any(not 0 <= token < spec.vocab_size for token in spec.eos_tokens):
        yield f"eos_tokens: sought ids in 0..{spec.vocab_size - 1}, found another"


def _wrong_in_layer(layer: LayerSpec, spec: ModelSpec) -> Iterator[str]:
    if not 1 <= layer.kv_heads <= spec.num_heads or spec.num_heads % layer.kv_heads:
        yield f"sought KV heads that divide {spec.num_heads} query heads, found {_short(layer.kv_heads)}"
    if not 2 <= layer.head_dim <= _MOST or layer.head_dim % 2:
        yield f"sought an even head_dim, found {_short(layer.head_dim)}"
    if layer.window is not None and not 1 <= layer.window <= _MOST_POSITIONS:
        yield f"sought a window of at least 1 token, found {_short(layer.window)}"
    if layer.rope is not None and not 0 <= layer.rope < len(spec.ropes):
        yield f"sought one of {len(spec.ropes)} ropes, found {_short(layer.rope)}"


def _wrong_in_rope(rope: RopeSpec, number: int, spec: ModelSpec) -> Iterator[str]:
    scaling = rope.scaling
    numbers = [rope.theta, rope.factor, rope.magnitude]
    if isinstance(scaling, LongRopeScaling):
        numbers += scaling.factors
    elif scaling is not None:
        ends = (
            (scaling.slow, scaling.fast) if isinstance(scaling, YarnScaling) else (scaling.low, scaling.high)
        )
        numbers += [scaling.factor, *ends, min(scaling.original, _MOST_POSITIONS)]
        if ends[0] >= ends[1]:
            yield f"sought slow below fast, found {ends}"
    if not all(map(_is_positive, numbers)) or (isinstance(scaling, YarnScaling) and rope.theta == 1):
        yield "sought positive numbers of a moderate size, found another"
    users = [layer for layer in spec.layers if layer.rope == number]
    if not users:
        yield "sought a layer that uses it, found none"
    for layer in users:
        width = layer.head_dim if rope.rotary_dim is None else rope.rotary_dim
        if not 2 <= width <= layer.head_dim or width % 2:
            yield f"sought an even number of rotating channels up to {layer.head_dim}, found {_short(width)}"
        if isinstance(scaling, LongRopeScaling) and len(scaling.factors) != width // 2:
            yield f"sought {width // 2} factors, found {len(scaling.factors)}"


def _is_positive(value: float) -> bool:
    return math.isfinite(value) and 1e-30 < value < 1e30


def _short(value: int) -> str:
    return str(value) if abs(value) < 10**18 else "an enormous integer"

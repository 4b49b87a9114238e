"""What a Decoder does with the rows it holds, without running the model: read, rewind, compact."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from kvengine.codes import dequantize, quantize
from kvengine.errors import InvalidRequest, RewindTooFar
from kvengine.program import CacheRows
from kvengine.rope import rope_tables

if TYPE_CHECKING:
    from kvengine.decoder import Decoder

Float32Array = npt.NDArray[np.float32]


def read_cache(decoder: Decoder, layer: int, row: int) -> CacheRows:
    """See Decoder.read_cache."""
    spec, plan, rows = decoder.model.spec, decoder.plan, decoder.rows
    if not 0 <= layer < len(spec.layers):
        raise InvalidRequest(f"sought a layer of 0..{len(spec.layers) - 1}, found {layer}")
    held = rows.held[row]
    first = plan.oldest(spec.layers[layer], decoder.capacity, held)
    there = first
    if plan.is_windowed(spec.layers[layer]):
        there = max(first, int(rows.floors[layer, row]))
    keys, values = (part[row, :, there - first : held - first].copy() for part in decoder.cache.read(layer))
    key_scale, value_scale = decoder.model.cache_scales[layer]
    return CacheRows(
        positions=rows.origins[row, there:held].copy(),
        key=dequantize(keys, key_scale, plan.dtype),
        value=dequantize(values, value_scale, plan.dtype),
        key_codes=keys,
        value_codes=values,
        key_scale=key_scale,
        value_scale=value_scale,
    )


def rewind_limit(decoder: Decoder, held: int, row: int) -> int:
    """The shortest length to which ``row``, were it of ``held`` tokens, could be rewound (but for 0)."""
    floors = decoder.rows.floors[:, row].tolist()
    layers = decoder.model.spec.layers
    return max(
        decoder.plan.rewind_limit(layer, decoder.capacity, held, floor)
        for layer, floor in zip(layers, floors, strict=True)
    )


def check_rewind(decoder: Decoder, count: int, row: int) -> None:
    """Raise what ``rewind`` would raise, without changing anything."""
    held = decoder.rows.held[row]
    if not 0 <= count <= held:
        raise InvalidRequest(f"sought to drop 0..{held} tokens, found {count}")
    limit = rewind_limit(decoder, held, row)
    if count and count < held and held - count < limit:
        raise RewindTooFar(
            f"sought to drop {count} of {held} tokens, found windows that can drop {max(0, held - limit)} at "
            "most; open the decoder with more slack, save before, or reset and prefill again"
        )


def rewind(decoder: Decoder, count: int, row: int) -> None:
    """See Decoder.rewind."""
    spec, plan, rows = decoder.model.spec, decoder.plan, decoder.rows
    capacity, held = decoder.capacity, decoder.rows.held[row]
    check_rewind(decoder, count, row)
    target = held - count
    if not target:
        rows.clear(row)
    elif count:
        for index, layer in enumerate(spec.layers):
            if plan.is_windowed(layer):
                before, after = (plan.oldest(layer, capacity, total) for total in (held, target))
                _move_up(decoder, index, row, held - before, before - after)
                rows.floors[index, row] = max(int(rows.floors[index, row]), before)
        rows.rewind(row, target)
    decoder.cache.trim(rows.longest)


def _move_up(decoder: Decoder, layer: int, row: int, alive: int, by: int) -> None:
    """Move a layer's first ``alive`` rows up by ``by``, as far as they fit, with zeros below them.

    Zeros, since the op multiplies masked rows by zero and so they must be finite.
    """
    if not by:
        return
    key, value = decoder.cache.read(layer)
    for part in (key, value):
        kept = part[row, :, : min(alive, part.shape[2] - by)].copy()
        part[row, :, by : by + kept.shape[1]] = kept
        part[row, :, :by] = 0
    decoder.cache.write(layer, key, value)


def compact(decoder: Decoder, keep: int, sinks: int, row: int) -> None:
    """See Decoder.compact."""
    spec, plan, rows = decoder.model.spec, decoder.plan, decoder.rows
    held = rows.held[row]
    if keep < 1 or sinks < 0:
        raise InvalidRequest(f"sought to keep at least 1 token and 0 sinks, found {keep} and {sinks}")
    dropped = held - sinks - keep
    if dropped <= 0:
        return
    window = max((layer.window or 0 for layer in spec.layers), default=0)
    if sinks and keep < window - 1:
        raise InvalidRequest(
            f"sought to keep the newest {window - 1} tokens or more beside sinks, so that no window of "
            f"{window} reaches them, found {keep}"
        )
    for index, layer in enumerate(spec.layers):
        _compact_layer(decoder, index, row, held - keep, dropped)
        if layer.window is not None:
            there = int(rows.floors[index, row])
            if plan.is_windowed(layer):
                there = max(there, plan.oldest(layer, decoder.capacity, held))
            rows.floors[index, row] = max(there - dropped, sinks)
    rows.compact(row, sinks, keep)
    decoder.cache.trim(rows.longest)


def _compact_layer(decoder: Decoder, index: int, row: int, newest: int, dropped: int) -> None:
    """Move the rows of positions ``newest`` and on down by ``dropped``, rotating every key that is kept back
    by as much: then a query at its new place finds them all as far away as they were."""
    plan, layer = decoder.plan, decoder.model.spec.layers[index]
    held, capacity = decoder.rows.held[row], decoder.capacity
    first, base = (plan.oldest(layer, capacity, total) for total in (held, held - dropped))
    stored = decoder.cache.read(index)
    for part, scale in zip(stored, decoder.model.cache_scales[index], strict=True):
        rows = part[row, :, : held - first]
        if part is stored[0]:
            rotated = _rotate_back(decoder, index, dequantize(rows, scale, plan.dtype), dropped)
            rows = quantize(rotated, scale, plan.dtype)
        else:
            rows = rows.copy()
        if plan.is_windowed(layer):
            # Below what a window may still read there are zeros, since masked rows must be finite.
            part[row, :, : held - dropped - base] = 0
        else:
            part[row, :, : newest - dropped] = rows[:, : newest - dropped]  # the sinks
        start = max(newest, first, base + dropped)
        kept = rows[:, start - first :]
        part[row, :, start - dropped - base : held - dropped - base] = kept
    decoder.cache.write(index, *stored)


def _rotate_back(decoder: Decoder, index: int, keys: Float32Array, by: int) -> Float32Array:
    """Keys [kv_heads, rows, head_dim] as they would be ``by`` positions earlier."""
    layer = decoder.model.spec.layers[index]
    if layer.rope is None:
        return keys
    rope = replace(decoder.model.spec.ropes[layer.rope], magnitude=1.0)  # the keys have theirs already
    cos, sin = (table[by] for table in rope_tables(rope, by + 1, layer.head_dim))
    half = len(cos)
    first, second = keys[..., :half], keys[..., half : 2 * half]
    turned = [first * cos + second * sin, second * cos - first * sin, keys[..., 2 * half :]]
    return np.concatenate(turned, axis=-1)

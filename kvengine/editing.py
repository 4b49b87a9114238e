"""Changes to what a Decoder holds that append nothing: reading back, rewinding."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvengine.codes import dequantize
from kvengine.errors import InvalidRequest, RewindTooFar
from kvengine.program import CacheRows

if TYPE_CHECKING:
    from kvengine.decoder import Decoder


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


def rewind(decoder: Decoder, count: int, row: int) -> None:
    """See Decoder.rewind."""
    spec, plan, rows = decoder.model.spec, decoder.plan, decoder.rows
    capacity, held = decoder.capacity, decoder.rows.held[row]
    if not 0 <= count <= held:
        raise InvalidRequest(f"sought to drop 0..{held} tokens, found {count}")
    target = held - count
    floors = rows.floors[:, row]
    limits = [
        plan.rewind_limit(layer, capacity, held, int(floor))
        for layer, floor in zip(spec.layers, floors, strict=True)
    ]
    if target and target < max(limits):
        raise RewindTooFar(
            f"sought to drop {count} of {held} tokens, found windows that can drop {held - max(limits)} at "
            "most; open the decoder with more slack, save before, or reset and prefill again"
        )
    if not target:
        rows.clear(row)
    elif count:
        for index, layer in enumerate(spec.layers):
            if plan.is_windowed(layer):
                before, after = (plan.oldest(layer, capacity, total) for total in (held, target))
                _move_up(decoder, index, row, held - before, before - after)
                rows.floors[index, row] = max(int(floors[index]), before)
        rows.held[row] = target
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

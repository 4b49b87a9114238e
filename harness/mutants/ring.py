"""Catalogue 11-19: what is evicted, and where rows lie."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from harness.mutants import seams
from harness.mutants.mutant import Mutant
from kvengine.decoder import Decoder
from kvengine.plan import CachePlan
from kvengine.spec import LayerSpec


def _overwritten(run: Callable[..., Any], decoder: Decoder, ids: Any, *rest: Any, **named: Any) -> Any:
    """The first tokens of a long chunk are those of later tokens that take their slots."""
    rows = decoder.plan.rows(decoder.model.spec.layers[0], decoder.capacity)
    excess = ids.shape[1] - rows
    if excess > 0:
        ids = ids.copy()
        ids[:, :excess] = ids[:, [at + rows * ((ids.shape[1] - 1 - at) // rows) for at in range(excess)]]
    return run(decoder, ids, *rest, **named)


def _trimmed_for_one(held: seams.Held) -> None:
    """A chunk of n evicts as if it were one token: rows lie n - 1 too far up."""
    count = held.after - held.before
    if held.evicts and count > 1:
        for now, _ in held.parts:
            now[:, :, : held.alive] = np.roll(now[:, :, : held.alive], count - 1, axis=2)


def _partial_write(held: seams.Held) -> None:
    """Of a chunk into a full window, the newest row is not written."""
    if held.evicts and held.after - held.before > 1:
        for now, was in held.parts:
            now[:, :, held.alive - 1] = was[:, :, held.alive - 1]


def _newest_evicted(held: seams.Held) -> None:
    """A full window keeps its oldest rows and gives up those before the new one."""
    if held.evicts and held.after - held.before == 1 and held.before >= held.capacity:
        for now, was in held.parts:
            now[:, :, : held.alive - 1] = was[:, :, : held.alive - 1]


def _trimmed_by_width(held: seams.Held) -> None:
    """What is kept after an eviction ends where the buffer ends, not where its rows do."""
    if held.evicts and held.alive < held.capacity:
        for now, _ in held.parts:
            now[:] = np.roll(now, held.capacity - held.alive, axis=2)


def _full_length(
    rows: Callable[..., int], plan: CachePlan, layer: LayerSpec, capacity: int, batch: int = 1
) -> int:
    return max(rows(plan, layer, capacity, batch), capacity)


def _multiplied_by_zero(run: Callable[..., Any], decoder: Decoder, *arguments: Any, **named: Any) -> Any:
    """Dead rows are masked by a weight of 0, and 0 times NaN is NaN."""
    dead = any(np.isnan(part).any() for pair in decoder.cache.arrays() for part in pair)
    logits = run(decoder, *arguments, **named)
    return np.full_like(logits, np.nan) if dead else logits


def _nearly_masked(run: Callable[..., Any], decoder: Decoder, *arguments: Any, **named: Any) -> Any:
    """The mask is -13, not minus infinity: what lies in dead rows comes through at e^-13."""
    rows = decoder.rows.held
    layers = enumerate(decoder.model.spec.layers)
    alive = [decoder.plan.resident(layer, decoder.capacity, max(rows)) for _, layer in layers]
    dead = [
        value[:, :, held:].ravel() for held, (_, value) in zip(alive, decoder.cache.arrays(), strict=True)
    ]
    stale = np.nan_to_num(np.concatenate(dead))
    logits = run(decoder, *arguments, **named)
    return logits + np.float32(np.exp(-13) * (np.abs(stale).mean() if stale.size else 0))


def _rotating_write(seen: seams.Fed) -> None:
    """Tokens are counted modulo what a window's buffer holds, as a page table of that size would."""
    rows = seen.decoder.plan.rows(seen.decoder.model.spec.layers[0], seen.decoder.capacity)
    seen.say(max(seen.before[0] % rows + seen.count, seen.count))


MUTANTS = (
    Mutant(
        "prefill overwrites its own ring",
        11,
        "litgpt#2182",
        "tokens of a chunk longer than the buffer are replaced by later ones",
        (seams.method(Decoder, "_run", _overwritten),),
        model="w3",
    ),
    Mutant(
        "chunk trimmed for one token",
        13,
        "mlx#1914",
        "after a chunk of n, the rows of a full window lie n - 1 too far up",
        (seams.after_step(_trimmed_for_one),),
        model="w4",
    ),
    Mutant(
        "partial write into a full window",
        14,
        "keys_values#140",
        "the last row of a chunk into a full window is not written",
        (seams.after_step(_partial_write),),
        model="w5",
    ),
    Mutant(
        "partial write under int4",
        14,
        "keys_values#140",
        "as above, in an int4 cache",
        (seams.after_step(_partial_write),),
        recipe="hybrid-int4kv,slack=2",
        model="w5",
    ),
    Mutant(
        "newest evicted",
        15,
        "Reward-Forcing#5",
        "a full window gives up its newest row, not its oldest",
        (seams.after_step(_newest_evicted),),
        model="w3",
    ),
    Mutant(
        "trimmed by buffer width",
        16,
        "mlx-vlm#2036",
        "rows that survive an eviction lie at the end of the buffer",
        (seams.after_step(_trimmed_by_width),),
        model="w2",
    ),
    Mutant(
        "local layer with global capacity",
        17,
        "HF#31785",
        "windowed layers get the capacity of full-length ones",
        (seams.method(CachePlan, "rows", _full_length),),
        model="w4",
    ),
    Mutant(
        "position into a window-sized table",
        18,
        "tt-metal#45184",
        "tokens are counted modulo a window's buffer",
        (seams.fed(_rotating_write),),
        model="local",
    ),
    Mutant(
        "zero times NaN",
        19,
        "openvino#37377",
        "dead rows take part with a weight of zero",
        (seams.method(Decoder, "_run", _multiplied_by_zero),),
        recipe="static",
    ),
    Mutant(
        "mask of -13",
        19,
        "openvino#37377, stale rows",
        "what was in dead rows comes through below every tolerance",
        (seams.method(Decoder, "_run", _nearly_masked),),
        recipe="static",
        model="w4",
    ),
)

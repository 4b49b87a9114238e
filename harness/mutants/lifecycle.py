"""Catalogue 35-46, and what compaction adds (20, 26): reset, rewind, copies, saved states, beams."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any
from unittest import mock

import numpy as np

import kvengine.decoder
import kvengine.editing
import kvengine.shortcuts
import kvengine.state
from harness.mutants import seams
from harness.mutants.mutant import Mutant, Patch
from kvengine.buffers import Buffer
from kvengine.cache import StaticCache
from kvengine.decoder import Decoder
from kvengine.errors import StateError
from kvengine.interpreter import Interpreter
from kvengine.plan import CachePlan
from kvengine.rows import Rows
from kvengine.spec import LayerSpec
from kvengine.steps import Step


def _pooled(make: Callable[..., None]) -> Callable[..., None]:
    """Buffers come from a pool that forgets who has them."""
    pool: dict[tuple[Any, ...], Any] = {}

    def broken(cache: StaticCache, *arguments: Any) -> None:
        make(cache, *arguments)
        shapes = tuple(buffer.read().shape for pair in cache._buffers for buffer in pair)
        cache._buffers = pool.setdefault(shapes, cache._buffers)

    return broken


def _prefix_by_length(kept: Callable[..., int], decoder: Decoder, ids: Any, row: int) -> int:
    """A prompt is taken to begin like the one before, as far as both reach."""
    return min(decoder.rows.held[row], len(ids) - 1) if kept(decoder, ids, row) else 0


def _shares_buffers(fork: Callable[..., Decoder], decoder: Decoder) -> Decoder:
    """A fork copies the bookkeeping and goes on in the same cache."""
    other = fork(decoder)
    if isinstance(decoder.cache, StaticCache):
        assert isinstance(other.cache, StaticCache)
        other.cache._buffers = decoder.cache._buffers
        other._feedback = [other._make_feedback_binding(source) for source in range(2)]
    return other


def _keeps_a_token(reset: Callable[..., None], decoder: Decoder, *arguments: Any) -> None:
    held = decoder.rows.held[0]
    reset(decoder, *arguments)
    decoder.rows.held[0] = min(held, 1)


def _keeps_the_row(clear: Callable[..., None], rows: Rows, row: int) -> None:
    """Of a batch, a row that leaves keeps its length."""
    if len(rows.held) == 1:
        clear(rows, row)


def _last_token_lost(run: Callable[..., Any], decoder: Decoder, ids: Any, *rest: Any, **named: Any) -> Any:
    """When a sequence goes on by a chunk, its last token is dropped and the one before counted twice."""
    if ids.shape[1] > 1 and decoder.position:
        ids = np.ascontiguousarray(np.concatenate([ids[:, :-1], ids[:, -2:-1]], axis=1))
    return run(decoder, ids, *rest, **named)


def _end_cached(generate: Callable[..., tuple[int, ...]], interpreter: Interpreter, operation: Any) -> Any:
    """The token that ends a generation goes into the cache as well."""
    found = generate(interpreter, operation)
    decoder = interpreter._decoder
    if decoder.rows.held[operation.row] < decoder.capacity:
        decoder.extend(decoder.alone((found[-1],), operation.row))
    return found


def _never(rewind: Callable[..., None], *arguments: Any) -> None:
    """Nothing is rewound."""


def _drafts_stay(speculate: Callable[..., Any], decoder: Decoder, *arguments: Any) -> Any:
    """Rejected drafts stay in the cache, only their count is taken back."""

    def counted(self: Decoder, count: int, row: int = 0) -> None:
        self.rows.held[row] -= count

    with (
        mock.patch.object(kvengine.editing, "_move_up"),
        mock.patch.object(Decoder, "rewind", counted),
    ):
        return speculate(decoder, *arguments)


def _loses_geometry(load: Callable[..., None], decoder: Decoder, path: Any) -> None:
    """A window that has wrapped is restored as if its first row were its oldest token's still."""
    load(decoder, path)
    for index, layer in enumerate(decoder.model.spec.layers):
        if decoder.plan.is_windowed(layer):
            key, value = decoder.cache.read(index)
            for row, held in enumerate(decoder.rows.held):
                shift = held % key.shape[2] if held > key.shape[2] else 0
                alive = decoder.plan.resident(layer, decoder.capacity, held)
                for part in (key, value):
                    part[row, :, :alive] = np.roll(part[row, :, :alive], shift, axis=1)
            decoder.cache.write(index, key, value)


def _poisons_on_failure(load: Callable[..., None], decoder: Decoder, path: Any) -> None:
    """A restore that fails has overwritten the first layer already."""
    try:
        load(decoder, path)
    except StateError:
        key, value = decoder.cache.read(0)
        decoder.cache.write(0, np.zeros_like(key), np.zeros_like(value))
        raise


def _moves_the_buffers(reset: Callable[..., None], cache: StaticCache) -> None:
    """A reset allocates anew; bindings captured before still point to the old buffers."""
    reset(cache)
    old = cache.__dict__.setdefault("mutant_kept_alive", [])
    old.append(cache._buffers)
    cache._buffers = [
        (Buffer(key.read().shape, key.read().dtype), Buffer(value.read().shape, value.read().dtype))
        for key, value in cache._buffers
    ]


def _first_chunk(cut: Callable[..., Iterator[Step]], ids: Any, chunk: int) -> Iterator[Step]:
    """The logits asked for are those of the first chunk's last token."""
    steps = list(cut(ids, chunk))
    for index, step in enumerate(steps):
        last = [every[-1:] if index == 0 else every[:0] for every in step.every_row]
        yield replace(step, last_rows=last) if len(steps) > 1 else step


def _not_reordered(take: Callable[..., None], *arguments: Any) -> None:
    """Lengths move, the cache does not."""


def _one_layer_reordered(take: Callable[..., None], cache: Any, layers: int, order: Sequence[int]) -> None:
    take(cache, 1, order)


def _naive_limit(rows: bool) -> Callable[..., int]:
    """Allows a rewind by as many tokens as the window sees, or as its buffer has rows."""

    def limit(
        right: Callable[..., int], plan: CachePlan, layer: LayerSpec, capacity: int, total: int, *_: int
    ) -> int:
        if not plan.is_windowed(layer):
            return 0
        span = plan.rows(layer, capacity) if rows else layer.window or 0
        return max(0, total - span)

    return limit


def _timid_limit(
    right: Callable[..., int], plan: CachePlan, layer: LayerSpec, capacity: int, total: int, *rest: int
) -> int:
    """Refuses more than three tokens, though all are still there."""
    return max(right(plan, layer, capacity, total, *rest), total - 3)


def _no_limit(right: Callable[..., int], *arguments: Any) -> int:
    return 0


def _rows_not_moved(move: Callable[..., None], *arguments: Any) -> None:
    """After a rewind over an eviction the rows stay where they were."""


def _not_rotated(rotate: Callable[..., Any], decoder: Decoder, index: int, keys: Any, by: int) -> Any:
    return keys


def _held_only(clear: Callable[..., None], rows: Rows, row: int) -> None:
    """What a compaction or a rewind left in a row's bookkeeping outlives its reset."""
    rows.held[row] = 0


def _one_token_too_many(kept: Callable[..., int], decoder: Decoder, ids: Any, row: int) -> int:
    """A kept prefix is one token longer than what both prompts share."""
    right = kept(decoder, ids, row)
    return right + (0 < right < min(decoder.rows.held[row], len(ids) - 1))


class _Believed(int):
    """A draft that differs from nothing."""

    def __ne__(self, other: object) -> bool:
        return False

    __hash__ = int.__hash__


def _drafts_believed(guess: Callable[..., list[int]], *arguments: Any) -> list[int]:
    """A draft is never compared with what the model says."""
    return [_Believed(token) for token in guess(*arguments)]


def _second_rewind_forgets(rewind: Callable[..., None], decoder: Decoder, count: int, row: int) -> None:
    """How far a window was rewound before is forgotten."""
    rewind(decoder, count, row)
    decoder.rows.floors[:] = 0


def _unread_checksum(load: Callable[..., None], decoder: Decoder, path: Any) -> None:
    """A file's checksum is made right before anybody looks."""
    try:
        data = path.read_bytes()
    except OSError:
        data = b""
    if len(data) > 32:
        path.write_bytes(data[:-32] + hashlib.sha256(data[:-32]).digest())
    load(decoder, path)


def _one_sink_more(compact: Callable[..., None], decoder: Decoder, keep: int, sinks: int, row: int) -> None:
    """The first token is taken for a BOS that is kept besides the sinks."""
    if sinks and keep > 1 and decoder.rows.held[row] > keep + sinks:
        keep, sinks = keep - 1, sinks + 1
    compact(decoder, keep, sinks, row)


MUTANTS = (
    Mutant(
        "two sessions, one buffer",
        35,
        "genai#1057",
        "a pool hands the same cache buffers to every decoder",
        (Patch(StaticCache, "__init__", _pooled),),
        recipe="static",
    ),
    Mutant(
        "fork shares its buffers",
        35,
        "genai#1057",
        "a fork writes into the cache it came from",
        (seams.method(Decoder, "fork", _shares_buffers),),
        model="w3",
    ),
    Mutant(
        "another prompt's prefix",
        35,
        "genai#1057",
        "a kept prefix is as long as both prompts reach, whatever their tokens",
        (seams.method(kvengine.shortcuts, "_kept", _prefix_by_length),),
        recipe="static",
    ),
    Mutant(
        "reset keeps a length",
        36,
        "HF#48509",
        "after a reset one token is still counted",
        (seams.method(Decoder, "reset", _keeps_a_token),),
        recipe="static",
    ),
    Mutant(
        "a row that leaves keeps its length",
        36,
        "HF#48509",
        "resetting one row of a batch does nothing",
        (seams.method(Rows, "clear", _keeps_the_row),),
    ),
    Mutant(
        "bookkeeping outlives a reset",
        36,
        "HF#48509",
        "a reset forgets the length alone, not what a rewind or a compaction left",
        (seams.method(Rows, "clear", _held_only),),
        model="w3",
    ),
    Mutant(
        "a kept prefix one too long",
        37,
        "genai#1110, the other way",
        "a kept prefix includes the first token that differs",
        (seams.method(kvengine.shortcuts, "_kept", _one_token_too_many),),
        model="w4",
    ),
    Mutant(
        "last token lost on continuing",
        37,
        "genai#1110",
        "the last token of a continuing chunk is dropped",
        (seams.method(Decoder, "_run", _last_token_lost),),
        recipe="static",
        model="w3",
    ),
    Mutant(
        "end of sequence cached",
        37,
        "genai#1814",
        "the last generated token is appended too",
        (seams.method(Interpreter, "_generate", _end_cached),),
    ),
    Mutant(
        "rewind does nothing",
        38,
        "genai#2140",
        "tokens to be dropped stay",
        (seams.method(kvengine.editing, "rewind", _never),),
        recipe="static",
        model="w3",
    ),
    Mutant(
        "rejected drafts move nothing back",
        38,
        "genai#2140",
        "a rejected draft is taken off the count, windows keep its rows",
        (seams.method(kvengine.shortcuts, "speculate", _drafts_stay),),
        model="w2",
    ),
    Mutant(
        "drafts are believed",
        38,
        "genai#2140, accepting instead",
        "no token of a draft is ever rejected",
        (seams.method(kvengine.shortcuts, "_guess", _drafts_believed),),
    ),
    Mutant(
        "rewind past the window",
        39,
        "vllm-mlx#678",
        "no rewind is refused",
        (seams.method(kvengine.editing, "rewind_limit", _no_limit),),
        model="w3",
    ),
    Mutant(
        "restored window loses its geometry",
        40,
        "ll#25295, ll#25297",
        "rows of a window that has wrapped are restored in another order",
        (seams.method(kvengine.state, "load", _loses_geometry),),
        model="w4",
    ),
    Mutant(
        "failed restore leaves damage",
        41,
        "ll#27052",
        "a refused state has cleared the first layer",
        (seams.method(kvengine.state, "load", _poisons_on_failure),),
    ),
    Mutant(
        "checksum not looked at",
        41,
        "ll#27052",
        "an altered state is loaded",
        (seams.method(kvengine.state, "load", _unread_checksum),),
        recipe="static",
        model="w3",
    ),
    Mutant(
        "captured binding after a reset",
        42,
        "genai#2244",
        "a reset moves the buffers, captured steps read the old ones",
        (seams.method(StaticCache, "reset", _moves_the_buffers),),
        model="w4",
    ),
    Mutant(
        "logits of the first chunk",
        43,
        "genai#1636",
        "a chunked prompt answers for its first chunk",
        (Patch(kvengine.decoder, "equal_steps", seams.calling(_first_chunk)),),
    ),
    Mutant(
        "beam reorder skipped",
        44,
        "HF#46612",
        "lengths are reordered, the cache is not",
        (seams.method(kvengine.decoder, "take_rows", _not_reordered),),
    ),
    Mutant(
        "beam reorder of one layer",
        44,
        "HF#46612",
        "only the first layer's rows are reordered",
        (seams.method(kvengine.decoder, "take_rows", _one_layer_reordered),),
        recipe="static",
        model="w3",
    ),
    Mutant(
        "rewind by a window",
        45,
        "ours, by simulation of ET's SequenceCache",
        "a rewind of up to W tokens is allowed",
        (seams.method(CachePlan, "rewind_limit", _naive_limit(rows=False)),),
        model="w4",
    ),
    Mutant(
        "rewind by a buffer",
        45,
        "ours, by simulation of ET's SequenceCache",
        "a rewind of up to W + slack tokens is allowed",
        (seams.method(CachePlan, "rewind_limit", _naive_limit(rows=True)),),
        model="w2",
    ),
    Mutant(
        "rewind refused too soon",
        45,
        "genai refuses any rewind after an eviction",
        "a rewind of more than three tokens is refused",
        (seams.method(CachePlan, "rewind_limit", _timid_limit),),
    ),
    Mutant(
        "rewind without moving rows",
        46,
        "suspect, by reading genai's RewindPastTensorsTo",
        "rows are not moved back where a rewind crosses an eviction",
        (seams.method(kvengine.editing, "_move_up", _rows_not_moved),),
        model="w3",
    ),
    Mutant(
        "a second rewind forgets the first",
        46,
        "suspect, by reading genai's RewindPastTensorsTo",
        "what a rewind has cost a window is not remembered by the next",
        (seams.method(kvengine.editing, "rewind", _second_rewind_forgets),),
        model="w4",
    ),
    Mutant(
        "shift by the global theta",
        20,
        "ll#12373",
        "compaction rotates every layer's keys back by the global table",
        (seams.other_rope(lambda rope: replace(rope, theta=10_000.0), kvengine.editing),),
    ),
    Mutant(
        "shift without rotation",
        20,
        "ll#12373",
        "compaction moves keys and does not rotate them",
        (seams.method(kvengine.editing, "_rotate_back", _not_rotated),),
        recipe="static",
    ),
    Mutant(
        "one sink more",
        26,
        "ll#5622",
        "one more token is kept at the beginning, one fewer at the end",
        (seams.method(kvengine.editing, "compact", _one_sink_more),),
        recipe="static",
        model="w3",
    ),
)

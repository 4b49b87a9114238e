"""Catalogue 27-34: lengths, and rows of a batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

import kvengine.decoder
from harness.mutants import seams
from harness.mutants.mutant import Mutant, Patch
from kvengine.decoder import Decoder
from kvengine.steps import Step


def _before_the_scatter(seen: seams.Fed) -> None:
    """Valid rows are counted before the new ones are written."""
    for row, before in enumerate(seen.before):
        if before:
            seen.lengths[row] = max(before, seen.count) - 1


def _capacity_for_length(seen: seams.Fed) -> None:
    seen.say(seen.decoder.capacity)


def _one_too_many(seen: seams.Fed) -> None:
    if seen.before[0] + seen.count < seen.decoder.capacity:
        seen.lengths[:] += 1
        seen.total[:] += 1


def _by_non_zero_keys(seen: seams.Fed) -> None:
    """Rows of the first global layer whose key is not zero are taken for tokens."""
    layers = seen.decoder.model.spec.layers
    index = next(i for i, layer in enumerate(layers) if layer.window is None)
    key, _ = seen.decoder.cache.read(index)
    if len(seen.before) == 1:
        used = int((key[0] != 0).any(axis=(0, 2)).sum())
        seen.say(min(used + seen.count, seen.decoder.capacity))


def _longest_for_all(seen: seams.Fed) -> None:
    seen.lengths[:] = seen.lengths.max()


def _joins_at_the_longest(seen: seams.Fed) -> None:
    """A row that is empty begins where the longest row ends."""
    if not any(seen.before):
        return
    for row, before in enumerate(seen.before):
        if not before and seen.new[row]:
            seen.lengths[row] = min(max(seen.before) + seen.new[row], seen.decoder.capacity) - 1
    seen.total[:] = max(int(seen.total[0]), int(seen.lengths.max()) + 1)


def _first_rows_stride(cut: Callable[..., Iterator[Step]], *arguments: Any) -> Iterator[Step]:
    """Rows of a ragged step are found as if every row were as long as the first."""
    for step in cut(*arguments):
        assert step.new is not None
        wrong = step.ids.shape[1] - max(1, int(step.new[0]))
        every, last = (
            [np.maximum(at - row * wrong, 0) for row, at in enumerate(indices)]
            for indices in (step.every_row, step.last_rows)
        )
        yield replace(step, every_row=every, last_rows=last)


def _padding_appended(
    advance: Callable[..., None], decoder: Decoder, binding: Any, ids: Any, new: Any
) -> None:
    """A row shorter than the step's longest counts one token of its padding."""
    every = None if new is None else np.where(new > 0, np.minimum(ids.shape[1], new + 1), 0)
    advance(decoder, binding, ids, every)


def _overflow_cut_off(append: Callable[..., Any], decoder: Decoder, parts: Sequence[Any], *rest: Any) -> Any:
    """What does not fit is left out without a word."""
    room = [decoder.capacity - held for held in decoder.rows.held]
    fits = [part[:left] for part, left in zip(parts, room, strict=True)]
    if not any(len(part) for part in fits):
        return np.zeros((1, decoder.model.spec.vocab_size), np.float32)
    return append(decoder, fits, *rest)


def _unchecked(check: Callable[..., None], decoder: Decoder, *arguments: Any) -> None:
    """There is always room."""


def _refused_late(check: Callable[..., None], decoder: Decoder, *arguments: Any) -> None:
    """A request is refused only after its first token was counted."""
    try:
        check(decoder, *arguments)
    except Exception:
        if decoder.rows.held[0] < decoder.capacity:
            decoder.rows.held[0] += 1
        raise


def _write_at_the_end(held: seams.Held) -> None:
    """The write that fills the buffer goes one row too far and is lost."""
    if held.after == held.capacity:
        for now, was in held.parts:
            now[:, :, held.after - 1] = was[:, :, held.after - 1]


MUTANTS = (
    Mutant(
        "valid rows counted before the scatter",
        27,
        "mobius#365",
        "the operator is told how many rows there were, not how many there are",
        (seams.fed(_before_the_scatter),),
        recipe="static",
    ),
    Mutant(
        "capacity for length",
        28,
        "hip-ep#753",
        "the operator is told the capacity",
        (seams.fed(_capacity_for_length),),
        recipe="static",
        model="w3",
    ),
    Mutant(
        "one row too many",
        28,
        "hip-ep#753, openvino#37377",
        "one row that was never written takes part",
        (seams.fed(_one_too_many),),
        recipe="static",
        model="w4",
    ),
    Mutant(
        "overflow cut off",
        29,
        "ORT#29447",
        "tokens past the capacity are left out, not refused",
        (
            seams.method(Decoder, "_check_room", _unchecked),
            seams.method(Decoder, "_append", _overflow_cut_off),
        ),
        recipe="static",
        model="w4",
    ),
    Mutant(
        "refused after counting",
        29,
        "ORT#29447",
        "a refused request moves the position",
        (seams.method(Decoder, "_check_room", _refused_late),),
    ),
    Mutant(
        "length by non-zero keys",
        30,
        "HF#30377",
        "cache rows that are not zero are taken for tokens",
        (seams.fed(_by_non_zero_keys),),
        recipe="static",
        model="w3",
    ),
    Mutant(
        "stride of the first row",
        31,
        "genai#1639",
        "a batch's rows are found as if all were as long as the first",
        (Patch(kvengine.decoder, "ragged_steps", seams.calling(_first_rows_stride)),),
    ),
    Mutant(
        "padding appended",
        16,
        "mlx-vlm#2036",
        "the padding of shorter rows goes into the cache",
        (seams.method(Decoder, "_advance", _padding_appended),),
    ),
    Mutant(
        "longest length for every row",
        32,
        "ORT#32419, ORT#29752",
        "all rows of a batch are taken to be as long as the longest",
        (seams.fed(_longest_for_all),),
        recipe="static",
    ),
    Mutant(
        "joins at the longest row's end",
        33,
        "omlx#2172",
        "a row that joins a running batch is appended at the longest row's end",
        (seams.fed(_joins_at_the_longest),),
        recipe="static",
        model="w3",
    ),
    Mutant(
        "write at max_length",
        34,
        "genai#2111",
        "the token that fills the capacity is not written",
        (seams.after_step(_write_at_the_end, windowed=False),),
        recipe="static",
        model="w2",
    ),
)

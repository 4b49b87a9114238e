"""Two ways to the same answer with less work: a prefix that is there already, a draft that may be right."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from kvengine import editing
from kvengine.errors import ContextOverflow, InvalidRequest

if TYPE_CHECKING:
    from kvengine.decoder import Decoder

Int64Array = npt.NDArray[np.int64]
Float32Array = npt.NDArray[np.float32]


def reuse(decoder: Decoder, tokens: Sequence[int], chunk: int, row: int) -> Float32Array:
    """See Decoder.reuse."""
    ids = np.asarray(tokens, np.int64).reshape(-1)
    decoder.check_tokens(ids)
    if chunk < 0:
        raise InvalidRequest(f"sought a chunk of 0 (one shot) or more tokens, found {chunk}")
    if len(ids) > decoder.capacity:
        raise ContextOverflow(f"sought room for {len(ids)} tokens, the capacity is {decoder.capacity}")
    kept = _kept(decoder, ids, row)
    if kept:
        decoder.rewind(decoder.rows.held[row] - kept, row)
    else:
        decoder.reset(row)
    return decoder.extend(decoder.alone(ids[kept:], row), chunk=chunk, logits="all")


def _kept(decoder: Decoder, ids: Int64Array, row: int) -> int:
    """How many of the tokens held need not be run again."""
    held = decoder.rows.sequence(row)
    both = min(len(held), len(ids) - 1)  # the last one runs again, for its logits
    differing = np.flatnonzero(held[:both] != ids[:both])
    common = int(differing[0]) if differing.size else both
    # What a compacted row holds was computed with tokens that the prompt lacks.
    reachable = common >= editing.rewind_limit(decoder, len(held), row) or common == len(held)
    return common if reachable and not decoder.rows.compacted(row) else 0


def speculate(
    decoder: Decoder, token: int, count: int, draft: int, ngram: int, row: int, hint: Sequence[int]
) -> tuple[int, ...]:
    """See Decoder.speculate."""
    if count < 1 or draft < 1 or ngram < 1:
        raise InvalidRequest(
            f"sought count, draft and ngram of at least 1, found {count}, {draft} and {ngram}"
        )
    decoder.check_rows(decoder.alone((token,) * count, row))
    text = np.asarray(hint, np.int64)
    if text.size:
        decoder.check_tokens(text)
    found: list[int] = []
    newest = token
    while len(found) < count:
        said = np.concatenate([text, decoder.rows.sequence(row), [newest]])
        most = min(draft, count - len(found) - 1)
        guess = _guess(said, ngram, _undoable(decoder, most, row))
        logits = decoder.extend(decoder.alone([newest, *guess], row), logits="all")
        answers = logits.argmax(axis=-1).tolist()
        right = next((i for i, g in enumerate(guess) if g != answers[i]), len(guess))
        decoder.rewind(len(guess) - right, row)
        found += answers[: right + 1]
        newest = found[-1]
    return tuple(found)


def _guess(said: Int64Array, ngram: int, most: int) -> list[int]:
    """Up to ``most`` tokens that followed the newest earlier place where the last ``ngram`` tokens stood."""
    if most < 1 or len(said) <= ngram:
        return []
    windows = np.lib.stride_tricks.sliding_window_view(said[:-1], ngram)
    places = np.flatnonzero((windows == said[-ngram:]).all(axis=1))
    if not places.size:
        return []
    after = int(places[-1]) + ngram
    guess: list[int] = said[after : after + most].tolist()
    return guess


def _undoable(decoder: Decoder, most: int, row: int) -> int:
    """The longest draft that can be rewound whole, should every token of it be wrong."""
    kept = decoder.rows.held[row] + 1
    lengths = range(most, 0, -1)
    return next((n for n in lengths if editing.rewind_limit(decoder, kept + n, row) <= kept), 0)

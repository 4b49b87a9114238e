"""How a request is cut into steps of the graph."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Int64Array = npt.NDArray[np.int64]
_NOTHING = np.empty(0, np.int64)


@dataclass(frozen=True)
class Step:
    """One run of the graph.

    ids: int64 [batch, n]. new: int64 [batch], how many of a row's n are real and not right padding;
    None is all of them. Of each row, as flat indices into [batch * n]: every_row, its real tokens;
    last_rows, the last token of its request if this step holds it, else none.
    """

    ids: Int64Array
    new: Int64Array | None
    every_row: list[Int64Array]
    last_rows: list[Int64Array]


def equal_steps(ids: Int64Array, chunk: int) -> Iterator[Step]:
    """Steps over ``ids`` [batch, n], every row the same number of tokens."""
    batch, count = ids.shape
    for start in range(0, count, chunk or count):
        part = ids[:, start : start + (chunk or count)]
        width = part.shape[1]
        every = [np.arange(row * width, (row + 1) * width) for row in range(batch)]
        ends = start + width == count
        yield Step(part, None, every, [row[-1:] if ends else _NOTHING for row in every])


def ragged_steps(parts: Sequence[Int64Array], held: Sequence[int], chunk: int, room: int) -> Iterator[Step]:
    """Steps over rows of different lengths; ``held`` tokens are in each row already.

    room: the cache rows that a padded step must stay within, in idle rows too.
    """
    held, done = list(held), [0] * len(parts)
    while any(left := [len(part) - start for part, start in zip(parts, done, strict=True)]):
        width = min(max(left), chunk or max(left), room - max(*held, 1))
        assert width > 0, "a row holds more than its capacity"
        new = np.minimum(left, width)
        ids = np.zeros((len(parts), width), np.int64)
        every, last = [], []
        for row, (part, count) in enumerate(zip(parts, new.tolist(), strict=True)):
            ids[row, :count] = part[done[row] : done[row] + count]
            every.append(np.arange(row * width, row * width + count))
            last.append(every[-1][-1:] if count == left[row] else _NOTHING)
            held[row] += count
            done[row] += count
        yield Step(ids, new, every, last)

"""What a Decoder knows of its batch rows, beside the cache itself."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

Int64Array = npt.NDArray[np.int64]


class Rows:
    """Bookkeeping of ``batch`` rows of at most ``capacity`` tokens.

    held: tokens in each row. tokens: int64 [batch, capacity], which they are. origins: int64
    [batch, capacity], the position in the sequence that each stands for; differs from its index
    only after a compaction. floors: int64 [layers, batch], the oldest index that a layer with a window
    really has, where that is more than the plan says.
    """

    def __init__(self, layers: int, batch: int, capacity: int) -> None:
        self.held = [0] * batch
        self.tokens = np.zeros((batch, capacity), np.int64)
        self.origins = np.tile(np.arange(capacity, dtype=np.int64), (batch, 1))
        self.floors = np.zeros((layers, batch), np.int64)

    @property
    def longest(self) -> int:
        return max(self.held)

    def clear(self, row: int) -> None:
        self.held[row] = 0
        self.origins[row] = np.arange(self.origins.shape[1])
        self.floors[:, row] = 0

    def append(self, row: int, tokens: Int64Array) -> None:
        """Tokens that are in the cache now; ``held`` is not moved."""
        held = self.held[row]
        self.tokens[row, held : held + len(tokens)] = tokens

    def compact(self, row: int, sinks: int, keep: int) -> None:
        """Drop all but the first ``sinks`` and the newest ``keep`` tokens; floors are the caller's."""
        held = self.held[row]
        kept = np.r_[:sinks, held - keep : held]
        self.tokens[row, : len(kept)] = self.tokens[row, kept]
        later = self.origins[row, held - 1] + 1 + np.arange(self.origins.shape[1] - len(kept))
        self.origins[row] = np.concatenate([self.origins[row, kept], later])
        self.held[row] = len(kept)

    def rewind(self, row: int, held: int) -> None:
        """Keep the first ``held`` tokens; what comes next is as far from them as the rotation of their keys
        says, which after a compaction counts what it dropped."""
        capacity = self.origins.shape[1]
        shift = self.origins[row, -1] - (capacity - 1)
        self.origins[row, held:] = np.arange(held, capacity) + shift
        self.held[row] = held

    def take(self, order: Sequence[int]) -> None:
        """Row i becomes what row ``order[i]`` was."""
        chosen = list(order)
        self.held = [self.held[row] for row in chosen]
        self.tokens, self.origins = self.tokens[chosen], self.origins[chosen]
        self.floors = self.floors[:, chosen]

    def copy_from(self, other: Rows) -> None:
        self.held = list(other.held)
        self.tokens, self.origins = other.tokens.copy(), other.origins.copy()
        self.floors = other.floors.copy()

    def sequence(self, row: int) -> Int64Array:
        """The tokens in a row, oldest first; a view."""
        return self.tokens[row, : self.held[row]]

    def compacted(self, row: int) -> bool:
        """Whether this row's cache was computed with tokens that a compaction has dropped since."""
        return bool(self.origins[row, -1] != self.origins.shape[1] - 1)

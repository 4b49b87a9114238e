"""The seam of the oracle."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from harness.errors import HarnessError

Float32Array = npt.NDArray[np.float32]
KeysAndValues = tuple[Float32Array, Float32Array]
"""K as attention sees it (normed, rotated) and V of one layer, float32 [kv_heads, n, head_dim]."""


class ReferenceUnavailable(HarnessError):
    """The reference cannot be made here: its libraries are missing, or they refuse the checkpoint."""


@dataclass(frozen=True)
class Hidden:
    """Positions ``start`` .. ``stop`` - 1 are hidden from every token at position ``since`` or later."""

    start: int
    stop: int
    since: int


class Reference(Protocol):
    """The right logits of one checkpoint."""

    @property
    def identity(self) -> str:
        """What was asked: the checkpoint's sha256, the libraries and their versions, the precision."""
        ...

    def logits(self, tokens: tuple[int, ...], hidden: tuple[Hidden, ...] = ()) -> Float32Array:
        """Read-only float32 [len(tokens), vocab]; row i is after tokens[0..i].

        hidden: what the attention mask hides, beside the future and what is outside a layer's window.

        Raises:
            ValueError: no tokens, or one outside the vocabulary.
            InfrastructureError: the process that computes it failed or took too long.
        """
        ...

    def cache(self, tokens: tuple[int, ...]) -> tuple[KeysAndValues, ...]:
        """What a cache must hold of each layer after ``tokens``: every position, none evicted.

        Raises as ``logits``.
        """
        ...

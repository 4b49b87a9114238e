"""The KV cache as numpy arrays of the host, for decoding without IO binding.

What one step returned is what the next one is fed; everything else is as in the ordinary caches.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnxruntime as ort

from kvengine.cache import GrowingCache, StaticCache, Stored, _shape, past_names
from kvengine.codes import STORAGE
from kvengine.plan import CachePlan
from kvengine.spec import ModelSpec


class _Arrays:
    """K and V of each layer, [batch, kv_heads, rows, width]."""

    _pairs: list[tuple[Stored, Stored]]

    @property
    def nbytes(self) -> int:
        return sum(array.nbytes for pair in self._pairs for array in pair)

    def feeds(self) -> dict[str, Stored]:
        """The past of every layer, by the name of its input."""
        named = zip(map(past_names, range(len(self._pairs))), self._pairs, strict=True)
        return {name: array for names, pair in named for name, array in zip(names, pair, strict=True)}

    def take(self, presents: Sequence[Stored]) -> None:
        """K and V of each layer in turn, as the step returned them."""
        self._pairs = list(zip(presents[::2], presents[1::2], strict=True))

    def bind(self, binding: ort.IOBinding) -> None:
        """Nothing to do: ``feeds`` and ``take`` carry the arrays."""

    def collect(self, binding: ort.IOBinding) -> None:
        """Nothing to do, see ``bind``."""

    def read(self, layer: int) -> tuple[Stored, Stored]:
        """The live arrays of a layer."""
        return self._pairs[layer]

    def write(self, layer: int, key: Stored, value: Stored) -> None:
        """Replace K and V of a layer by copies."""
        self._pairs[layer] = (key.copy(), value.copy())


class StaticArrays(_Arrays, StaticCache):
    """Every layer as many rows as its plan says, all of them fed and returned at every step."""

    def __init__(self, spec: ModelSpec, plan: CachePlan, capacity: int, batch: int) -> None:
        self._plan, self._layers, self._capacity = plan, spec.layers, capacity
        self._pairs = [
            _zeros(_shape(plan, layer, plan.rows(layer, capacity, batch), batch), plan)
            for layer in spec.layers
        ]


class GrowingArrays(_Arrays, GrowingCache):
    """Begins without rows; every step returns longer arrays."""

    def __init__(self, spec: ModelSpec, plan: CachePlan, capacity: int, batch: int) -> None:
        self._plan, self._spec, self._batch = plan, spec, batch
        self._least = 0 if batch == 1 else 1  # see GrowingCache
        self.reset()

    def reset(self) -> None:
        shapes = (_shape(self._plan, layer, self._least, self._batch) for layer in self._spec.layers)
        self._pairs = [_zeros(shape, self._plan) for shape in shapes]


def _zeros(shape: tuple[int, int, int, int], plan: CachePlan) -> tuple[Stored, Stored]:
    dtype = STORAGE[plan.dtype]
    return np.zeros(shape, dtype), np.zeros(shape, dtype)

"""The KV cache: one K and one V buffer a layer, and where onnxruntime reads and writes them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import onnxruntime as ort

from kvengine.buffers import Buffer
from kvengine.plan import CacheDtype, CachePlan
from kvengine.recipe import SessionRecipe
from kvengine.spec import LayerSpec, ModelSpec

STORAGE: dict[CacheDtype, type] = {
    "float32": np.float32,
    "float16": np.float16,
    "int8": np.int8,
    "int4": np.uint8,  # two codes a byte
}


def past_names(layer: int) -> tuple[str, str]:
    return f"past_key_values.{layer}.key", f"past_key_values.{layer}.value"


def present_names(layer: int) -> tuple[str, str]:
    return f"present.{layer}.key", f"present.{layer}.value"


class Cache(Protocol):
    """What a Decoder asks of its cache."""

    @property
    def nbytes(self) -> int: ...

    def bind(self, binding: ort.IOBinding) -> None: ...

    def collect(self, binding: ort.IOBinding) -> None: ...

    def reset(self) -> None: ...

    def poison(self, total: int) -> None: ...

    def arrays(self) -> Iterator[tuple[npt.NDArray[Any], npt.NDArray[Any]]]: ...


class StaticCache:
    """Buffers allocated once; present is bound onto past, so a step writes in place.

    Each buffer is [batch, kv_heads, rows, head_dim] of the plan's dtype (int4: head_dim / 2 bytes).
    """

    def __init__(
        self, spec: ModelSpec, plan: CachePlan, capacity: int, batch: int, recipe: SessionRecipe
    ) -> None:
        self._plan = plan
        self._layers = spec.layers
        self._capacity = capacity
        dtype = STORAGE[plan.dtype]
        self._buffers = [
            tuple(
                Buffer(_shape(plan, layer, capacity, batch), dtype, recipe.device_type, recipe.device_id)
                for _ in "KV"
            )
            for layer in spec.layers
        ]

    @property
    def nbytes(self) -> int:
        return sum(buffer.nbytes for pair in self._buffers for buffer in pair)

    def bind(self, binding: ort.IOBinding) -> None:
        for index, pair in enumerate(self._buffers):
            for past, present, buffer in zip(past_names(index), present_names(index), pair, strict=True):
                binding.bind_ortvalue_input(past, buffer.value)
                binding.bind_ortvalue_output(present, buffer.value)

    def collect(self, binding: ort.IOBinding) -> None:
        """After a run: nothing to do, it was written in place."""

    def reset(self) -> None:
        """Nothing to do: which rows are alive follows from the position alone."""

    def poison(self, total: int) -> None:
        """Overwrite every row that holds none of the newest tokens; ``total`` tokens were appended so far."""
        for layer, pair in zip(self._layers, self._buffers, strict=True):
            alive = self._plan.resident(layer, self._capacity, total)
            for buffer in pair:
                contents = buffer.read()
                contents[:, :, alive:, :] = _poison_of(contents.dtype)
                buffer.write(contents)

    def arrays(self) -> Iterator[tuple[npt.NDArray[Any], npt.NDArray[Any]]]:
        """(K, V) of each layer, as stored."""
        for key, value in self._buffers:
            yield key.read(), value.read()


class GrowingCache:
    """The naive baseline: every step returns a longer K and V, which become the next step's past."""

    def __init__(
        self, spec: ModelSpec, plan: CachePlan, capacity: int, batch: int, recipe: SessionRecipe
    ) -> None:
        self._plan = plan
        self._spec = spec
        self._batch = batch
        self._device = (recipe.device_type, recipe.device_id)
        self.reset()

    @property
    def nbytes(self) -> int:
        """Bytes now; grows with every token."""
        return sum(value.tensor_size_in_bytes() for pair in self._values for value in pair)

    def reset(self) -> None:
        dtype = STORAGE[self._plan.dtype]
        self._values = [
            tuple(Buffer(_shape(self._plan, layer, 0, self._batch), dtype, *self._device).value for _ in "KV")
            for layer in self._spec.layers
        ]

    def bind(self, binding: ort.IOBinding) -> None:
        for index, pair in enumerate(self._values):
            for past, present, value in zip(past_names(index), present_names(index), pair, strict=True):
                binding.bind_ortvalue_input(past, value)
                binding.bind_output(present, *self._device)

    def collect(self, binding: ort.IOBinding) -> None:
        """Take the present of the run just made as the past of the next.

        Outputs come in the order they were bound: the step's result, then K and V of each layer.
        """
        presents = binding.get_outputs()[1:]
        self._values = list(zip(presents[::2], presents[1::2], strict=True))

    def poison(self, total: int) -> None:
        """Nothing to do: a growing cache has no dead rows."""

    def arrays(self) -> Iterator[tuple[npt.NDArray[Any], npt.NDArray[Any]]]:
        for key, value in self._values:
            yield key.numpy(), value.numpy()


class ArrayCache:
    """K and V as numpy arrays of the host: what one step returned is what the next is fed.

    For decoding without IO binding. A growing plan begins with 0 rows.
    """

    def __init__(self, spec: ModelSpec, plan: CachePlan, capacity: int, batch: int) -> None:
        self._layers, self._plan, self._capacity, self._batch = spec.layers, plan, capacity, batch
        self.reset()

    @property
    def nbytes(self) -> int:
        return sum(array.nbytes for pair in self._pairs for array in pair)

    def bind(self, binding: ort.IOBinding) -> None:
        """Nothing to do: ``feeds`` and ``take`` carry the arrays."""

    def collect(self, binding: ort.IOBinding) -> None:
        """Nothing to do, see ``bind``."""

    def feeds(self) -> dict[str, npt.NDArray[Any]]:
        """The past of every layer, by the name of its input."""
        named = zip(map(past_names, range(len(self._pairs))), self._pairs, strict=True)
        return {name: array for names, pair in named for name, array in zip(names, pair, strict=True)}

    def take(self, presents: Sequence[npt.NDArray[Any]]) -> None:
        """K and V of each layer in turn, as the step returned them."""
        self._pairs = list(zip(presents[::2], presents[1::2], strict=True))

    def reset(self) -> None:
        growing = self._plan.kind == "growing"
        shapes = [
            _shape(self._plan, layer, 0 if growing else self._capacity, self._batch) for layer in self._layers
        ]
        dtype = STORAGE[self._plan.dtype]
        self._pairs = [(np.zeros(shape, dtype), np.zeros(shape, dtype)) for shape in shapes]

    def poison(self, total: int) -> None:
        """See StaticCache.poison; a growing cache has no dead rows."""
        if self._plan.kind == "growing":
            return
        for layer, pair in zip(self._layers, self._pairs, strict=True):
            alive = self._plan.resident(layer, self._capacity, total)
            for array in pair:
                array[:, :, alive:, :] = _poison_of(array.dtype)

    def arrays(self) -> Iterator[tuple[npt.NDArray[Any], npt.NDArray[Any]]]:
        yield from self._pairs


def _shape(plan: CachePlan, layer: LayerSpec, capacity: int, batch: int) -> tuple[int, int, int, int]:
    width = layer.head_dim // 2 if plan.dtype == "int4" else layer.head_dim
    return batch, layer.kv_heads, plan.rows(layer, capacity), width


def _poison_of(dtype: np.dtype[Any]) -> float | int:
    """NaN spreads to every logit it touches; integers have none, so the code farthest from zero."""
    if dtype.kind == "f":
        return float("nan")
    return -128 if dtype == np.int8 else 0xFF

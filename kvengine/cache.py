"""The KV cache: one K and one V buffer a layer, and where onnxruntime reads and writes them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import onnxruntime as ort

from kvengine.buffers import Buffer
from kvengine.codes import STORAGE
from kvengine.plan import CachePlan
from kvengine.recipe import SessionRecipe
from kvengine.spec import LayerSpec, ModelSpec

Stored = npt.NDArray[Any]


def past_names(layer: int) -> tuple[str, str]:
    return f"past_key_values.{layer}.key", f"past_key_values.{layer}.value"


def present_names(layer: int) -> tuple[str, str]:
    return f"present.{layer}.key", f"present.{layer}.value"


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
                Buffer(
                    _shape(plan, layer, plan.rows(layer, capacity, batch), batch),
                    dtype,
                    recipe.device_type,
                    recipe.device_id,
                )
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

    def poison(self, held: Sequence[int]) -> None:
        """Overwrite every row that holds none of the newest tokens; ``held`` tokens are in each batch row."""
        for index, layer in enumerate(self._layers):
            key, value = self.read(index)
            for row, total in enumerate(held):
                alive = self._plan.resident(layer, self._capacity, total)
                key[row, :, alive:] = value[row, :, alive:] = _poison_of(key.dtype)
            self.write(index, key, value)

    def read(self, layer: int) -> tuple[Stored, Stored]:
        """K and V of a layer as stored, [batch, kv_heads, rows, width]; on the CPU the live arrays."""
        key, value = self._buffers[layer]
        return key.read(), value.read()

    def write(self, layer: int, key: Stored, value: Stored) -> None:
        """Replace K and V of a layer."""
        for buffer, contents in zip(self._buffers[layer], (key, value), strict=True):
            buffer.write(contents)

    def put(self, layer: int, key: Stored, value: Stored) -> None:
        """Overwrite the first rows of K and V of a layer; what is behind them is dead."""
        whole = self.read(layer)
        for mine, theirs in zip(whole, (key, value), strict=True):
            mine[:, :, : theirs.shape[2]] = theirs
        self.write(layer, *whole)

    def trim(self, rows: int) -> None:
        """Nothing to do: the buffers keep their size."""

    def arrays(self) -> Iterator[tuple[Stored, Stored]]:
        """(K, V) of each layer, as stored."""
        return (self.read(layer) for layer in range(len(self._layers)))


class GrowingCache:
    """The naive baseline: every step returns a longer K and V, which become the next step's past."""

    def __init__(
        self, spec: ModelSpec, plan: CachePlan, capacity: int, batch: int, recipe: SessionRecipe
    ) -> None:
        self._plan = plan
        self._spec = spec
        self._batch = batch
        # An idle row counts as one token, so the op wants a row for it (see Decoder._advance).
        self._least = 0 if batch == 1 else 1
        self._device = (recipe.device_type, recipe.device_id)
        self.reset()

    @property
    def nbytes(self) -> int:
        """Bytes now; grows with every token."""
        return sum(value.tensor_size_in_bytes() for pair in self._values for value in pair)

    def reset(self) -> None:
        dtype = STORAGE[self._plan.dtype]
        self._values = [
            tuple(
                Buffer(_shape(self._plan, layer, self._least, self._batch), dtype, *self._device).value
                for _ in "KV"
            )
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

    def poison(self, held: Sequence[int]) -> None:
        """Nothing to do: a growing cache has no dead rows."""

    def read(self, layer: int) -> tuple[Stored, Stored]:
        """Copies of K and V of a layer, [batch, kv_heads, rows, width]."""
        key, value = self._values[layer]
        return key.numpy(), value.numpy()

    def write(self, layer: int, key: Stored, value: Stored) -> None:
        """Replace K and V of a layer; of any number of rows."""
        self._values[layer] = (self._value(key), self._value(value))

    def put(self, layer: int, key: Stored, value: Stored) -> None:
        """Replace K and V of a layer, padded to as many rows as there must be."""
        missing = max(0, self._least - key.shape[2])
        padding = ((0, 0), (0, 0), (0, missing), (0, 0))
        self.write(layer, np.pad(key, padding), np.pad(value, padding))

    def trim(self, rows: int) -> None:
        """Forget what is behind the first ``rows`` rows."""
        rows = max(rows, self._least)
        for index, (key, value) in enumerate(self.arrays()):
            if key.shape[2] > rows:
                self.write(index, key[:, :, :rows], value[:, :, :rows])

    def arrays(self) -> Iterator[tuple[Stored, Stored]]:
        return (self.read(layer) for layer in range(len(self._spec.layers)))

    def _value(self, contents: Stored) -> ort.OrtValue:
        value = ort.OrtValue.ortvalue_from_shape_and_type(list(contents.shape), contents.dtype, *self._device)
        if contents.size:
            value.update_inplace(np.ascontiguousarray(contents))
        return value


class Cache(Protocol):
    """What a Decoder asks of its cache; see StaticCache."""

    @property
    def nbytes(self) -> int: ...

    def bind(self, binding: ort.IOBinding) -> None: ...

    def collect(self, binding: ort.IOBinding) -> None: ...

    def reset(self) -> None: ...

    def poison(self, held: Sequence[int]) -> None: ...

    def read(self, layer: int) -> tuple[Stored, Stored]: ...

    def write(self, layer: int, key: Stored, value: Stored) -> None: ...

    def put(self, layer: int, key: Stored, value: Stored) -> None: ...

    def trim(self, rows: int) -> None: ...

    def arrays(self) -> Iterator[tuple[Stored, Stored]]: ...


def take_rows(cache: Cache, layers: int, order: Sequence[int]) -> None:
    """Batch row i becomes what row ``order[i]`` was."""
    for layer in range(layers):
        key, value = cache.read(layer)
        cache.write(layer, key[list(order)], value[list(order)])


def _shape(plan: CachePlan, layer: LayerSpec, rows: int, batch: int) -> tuple[int, int, int, int]:
    width = layer.head_dim // 2 if plan.dtype == "int4" else layer.head_dim
    return batch, layer.kv_heads, rows, width


def _poison_of(dtype: np.dtype[Any]) -> float | int:
    """NaN spreads to every logit it touches; integers have none, so the code farthest from zero."""
    if dtype.kind == "f":
        return float("nan")
    return -128 if dtype == np.int8 else 0xFF

"""The KV cache of a graph that somebody else exported: each layer as its contract says."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime as ort

from kvengine.buffers import Buffer
from kvengine.codes import STORAGE
from kvengine.contract import Contract, LayerContract
from kvengine.recipe import SessionRecipe

Stored = npt.NDArray[Any]
Device = tuple[str, int]

# Where dead rows are masked, NaN would spread through the mask (0 * NaN), as no real stale row does. So
# they get a number far from any key or value, yet finite in float16.
_FINITE_POISON = 1e3


class ForeignCache:
    """K and V of every layer: static ones bound in place, growing ones handed over without a copy.

    ``read`` and ``write`` speak [batch, kv_heads, rows, head_dim], whatever the graph's own layout is.
    """

    def __init__(
        self, contract: Contract, slack: int, capacity: int, batch: int, recipe: SessionRecipe
    ) -> None:
        device = recipe.device_type, recipe.device_id
        self._layers: list[_Growing | _Static] = [
            _Growing(layer, batch, device)
            if layer.kind == "growing"
            else _Static(layer, _rows(layer, capacity, slack), batch, device)
            for layer in contract.layers
        ]

    @property
    def rings(self) -> dict[int, int]:
        """Rows of each layer that keeps position p in slot p modulo rows."""
        return {i: la.rows for i, la in enumerate(self._layers) if isinstance(la, _Static) and la.is_ring}

    @property
    def nbytes(self) -> int:
        return sum(layer.nbytes for layer in self._layers)

    def bind(self, binding: ort.IOBinding) -> None:
        """Presents become outputs in the order of layers, K before V, behind what is bound already."""
        for layer in self._layers:
            layer.bind(binding)

    def collect(self, binding: ort.IOBinding) -> None:
        """After a run. The graph's one other output was bound first."""
        presents = binding.get_outputs()[1:]
        for layer, key, value in zip(self._layers, presents[::2], presents[1::2], strict=True):
            layer.collect(key, value)

    def reset(self) -> None:
        for layer in self._layers:
            layer.trim(0)

    def trim(self, rows: int) -> None:
        """Growing layers forget what is behind the first ``rows`` rows; buffers keep their size."""
        for layer in self._layers:
            layer.trim(rows)

    def poison(self, held: Sequence[int]) -> None:
        """Overwrite all dead rows: NaN where the writer never reads them, else a number far off."""
        for layer in self._layers:
            layer.poison(held)

    def read(self, layer: int) -> tuple[Stored, Stored]:
        """K and V of a layer as stored; on the CPU the live arrays."""
        key, value = self._layers[layer].read()
        return key, value

    def write(self, layer: int, key: Stored, value: Stored) -> None:
        """Replace K and V of a layer; of a growing one, by any number of rows."""
        self._layers[layer].write(key, value)

    def put(self, layer: int, key: Stored, value: Stored) -> None:
        """Overwrite the first rows of K and V of a layer; a growing one has no others then."""
        self._layers[layer].put(key, value)

    def arrays(self) -> Iterator[tuple[Stored, Stored]]:
        """(K, V) of each layer, as stored."""
        return (self.read(layer) for layer in range(len(self._layers)))


class _Growing:
    """Past and present are two tensors; present is handed over as the next past, without a copy."""

    def __init__(self, layer: LayerContract, batch: int, device: Device) -> None:
        self._layer = layer
        self._device = device
        self._values = [self._value(np.empty(layer.shape(batch, 0), STORAGE[layer.dtype])) for _ in "KV"]

    @property
    def nbytes(self) -> int:
        return sum(value.tensor_size_in_bytes() for value in self._values)

    def bind(self, binding: ort.IOBinding) -> None:
        layer = self._layer
        for name, value in zip((layer.past_key, layer.past_value), self._values, strict=True):
            binding.bind_ortvalue_input(name, value)
        for name in (layer.present_key, layer.present_value):
            binding.bind_output(name, *self._device)

    def collect(self, key: ort.OrtValue, value: ort.OrtValue) -> None:
        self._values = [key, value]

    def trim(self, rows: int) -> None:
        key, value = self.read()
        if key.shape[2] > rows:
            self.write(key[:, :, :rows], value[:, :, :rows])

    def poison(self, held: Sequence[int]) -> None:
        """A growing cache has no dead rows."""

    def read(self) -> list[Stored]:
        """Copies."""
        return [_plain(self._layer, value.numpy()) for value in self._values]

    def write(self, key: Stored, value: Stored) -> None:
        self._values = [self._value(_own(self._layer, half)) for half in (key, value)]

    put = write

    def _value(self, contents: Stored) -> ort.OrtValue:
        buffer = Buffer(contents.shape, contents.dtype, *self._device)
        buffer.write(contents)
        return buffer.value


class _Static:
    """Buffers allocated once: present is bound onto past, or beside it where others read past too."""

    def __init__(self, layer: LayerContract, rows: int, batch: int, device: Device) -> None:
        self._layer = layer
        self.rows = rows
        self.is_ring = layer.kind == "windowed" and layer.writer == "TensorScatter"
        shape, dtype = layer.shape(batch, rows), STORAGE[layer.dtype]
        self._past = [Buffer(shape, dtype, *device) for _ in "KV"]
        self._present = self._past if layer.shared else [Buffer(shape, dtype, *device) for _ in "KV"]

    @property
    def nbytes(self) -> int:
        buffers = self._past if self._layer.shared else [*self._past, *self._present]
        return sum(buffer.nbytes for buffer in buffers)

    def bind(self, binding: ort.IOBinding) -> None:
        layer = self._layer
        for name, buffer in zip((layer.past_key, layer.past_value), self._past, strict=True):
            binding.bind_ortvalue_input(name, buffer.value)
        for name, buffer in zip((layer.present_key, layer.present_value), self._present, strict=True):
            binding.bind_ortvalue_output(name, buffer.value)

    def collect(self, key: ort.OrtValue, value: ort.OrtValue) -> None:
        self._past, self._present = self._present, self._past

    def trim(self, rows: int) -> None:
        """Which rows are alive follows from the position alone."""

    def poison(self, held: Sequence[int]) -> None:
        halves = self.read()
        for row, total in enumerate(held):
            # A ring of R rows is full from R tokens on; so is GroupQueryAttention's of exactly its window,
            # and one with slack holds at least what this leaves alone.
            for half in halves:
                half[row, :, min(total, self.rows) :] = _poison(half.dtype, self._layer.skips_dead_rows)
        self.write(*halves)

    def read(self) -> list[Stored]:
        return [_plain(self._layer, buffer.read()) for buffer in self._past]

    def put(self, key: Stored, value: Stored) -> None:
        whole = self.read()
        for mine, theirs in zip(whole, (key, value), strict=True):
            mine[:, :, : theirs.shape[2]] = theirs
        self.write(*whole)

    def write(self, key: Stored, value: Stored) -> None:
        for buffer, half in zip(self._past, (key, value), strict=True):
            buffer.write(_own(self._layer, half))


def _rows(layer: LayerContract, capacity: int, slack: int) -> int:
    """Rows of a static layer; a GroupQueryAttention with a window wants no fewer than that."""
    if layer.rows is not None:
        return layer.rows
    if layer.kind == "windowed":
        assert layer.window is not None
        return layer.window + slack
    return capacity


def _plain(layer: LayerContract, stored: Stored) -> Stored:
    """A view with the axes [batch, kv_heads, rows, head_dim]."""
    return stored.transpose([layer.layout.index(axis) for axis in "bnsh"])


def _own(layer: LayerContract, plain: Stored) -> Stored:
    """The inverse of ``_plain``."""
    return plain.transpose(["bnsh".index(axis) for axis in layer.layout])


def _poison(dtype: np.dtype[Any], skips_dead_rows: bool) -> float | int:
    if dtype.kind != "f":
        return 255 if dtype.kind == "u" else -128
    return float("nan") if skips_dead_rows else _FINITE_POISON

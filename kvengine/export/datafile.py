"""model.onnx.data: the weights outside the graph, written as a stream and hashed on the way."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from math import prod
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx

from kvengine.artifact import Blob

NAME = "model.onnx.data"
# onnxruntime maps each tensor by its offset. 64 KiB is the coarsest granularity in use (Windows)
# and a multiple of every page size (4 KiB, 16 KiB on new Android); small tensors need only a cache line.
_LARGE = 1 << 20
_LARGE_ALIGNMENT = 1 << 16
_SMALL_ALIGNMENT = 64


@dataclass(frozen=True)
class Region:
    """Where a tensor's bytes lie in the file."""

    offset: int
    length: int


class DataFile:
    """Appends tensors; ``blob`` is the finished file's identity."""

    def __init__(self, folder: Path) -> None:
        self._file = (folder / NAME).open("wb")
        self._digest = hashlib.sha256()
        self._size = 0

    def __enter__(self) -> DataFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def append(self, length: int, pieces: Iterable[npt.NDArray[Any]]) -> Region:
        """Write C-contiguous ``pieces``, ``length`` bytes in all."""
        alignment = _LARGE_ALIGNMENT if length >= _LARGE else _SMALL_ALIGNMENT
        self._write(bytes(-self._size % alignment))
        offset = self._size
        for piece in pieces:
            self._write(piece.data if piece.size else b"")
        assert self._size == offset + length, "a weight matrix gave other bytes than its shape says"
        return Region(offset, length)

    def blob(self) -> Blob:
        self._file.flush()
        return Blob(NAME, self._digest.hexdigest(), self._size)

    def _write(self, data: memoryview | bytes) -> None:
        self._file.write(data)
        self._digest.update(data)
        self._size += len(data) if isinstance(data, bytes) else data.nbytes


def external_tensor(
    name: str, dtype: npt.DTypeLike, shape: tuple[int, ...], region: Region
) -> onnx.TensorProto:
    """An initializer whose bytes are ``region``; two initializers may share one region."""
    size = np.dtype(dtype).itemsize * prod(shape)
    assert size == region.length, f"{name}: {size} bytes by shape, {region.length} in the file"
    tensor = onnx.TensorProto(
        name=name,
        data_type=onnx.helper.np_dtype_to_tensor_dtype(np.dtype(dtype)),
        dims=shape,
        data_location=onnx.TensorProto.EXTERNAL,
    )
    for key, value in (("location", NAME), ("offset", region.offset), ("length", region.length)):
        tensor.external_data.add(key=key, value=str(value))
    return tensor

"""Reading a checkpoint's safetensors piece by piece, as float32, checked."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError, safe_open

from kvengine.artifact import sha256_of
from kvengine.errors import CheckpointError

Float32 = npt.NDArray[np.float32]
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
_PIECE_ELEMENTS = 1 << 20  # one piece as float32: 4 MiB, so that it stays in the CPU's cache
_DTYPES = ("F32", "F16", "BF16")


@dataclass(frozen=True)
class Part:
    """One tensor of a checkpoint as rows of a matrix: [rows, columns]."""

    name: str
    rows: int


@dataclass(frozen=True)
class Matrix:
    """Tensors of equal width, stacked by rows, read as one [rows, columns] matrix."""

    parts: tuple[Part, ...]
    columns: int

    @property
    def rows(self) -> int:
        return sum(part.rows for part in self.parts)

    @property
    def name(self) -> str:
        return " + ".join(part.name for part in self.parts)


class Checkpoint:
    """The tensors of a Hugging Face folder, single-file or sharded; files stay memory-mapped while open."""

    def __init__(self, folder: Path) -> None:
        """Raises CheckpointError: no safetensors, a missing shard, an unreadable file."""
        self.folder = folder
        self._stack = ExitStack()
        self._files: dict[str, Any] = {}
        try:
            for path in self.shards():
                file = self._stack.enter_context(_open(path))
                self._files.update(dict.fromkeys(file.keys(), file))
        except BaseException:
            self._stack.close()
            raise

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def __contains__(self, name: str) -> bool:
        return name in self._files

    def names(self) -> list[str]:
        """Every tensor's name, sorted."""
        return sorted(self._files)

    def whole(self, name: str) -> Float32:
        """A tensor of any shape, whole; raises CheckpointError for NaN or infinity."""
        return _finite(name, _float32(self._slice(name)[...]))

    def shards(self) -> list[Path]:
        """Every safetensors file of the checkpoint, sorted by name; as transformers, a single one first."""
        index = self.folder / INDEX
        if (self.folder / SINGLE).is_file():
            return [self.folder / SINGLE]
        if not index.is_file():
            raise CheckpointError(
                f"sought {SINGLE} or {INDEX} in {self.folder}, found neither; "
                "only safetensors checkpoints can be exported"
            )
        try:
            names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
            raise CheckpointError(f"{index} has no readable weight_map: {error!r}") from error
        for name in names:
            if Path(name).name != name or not (self.folder / name).is_file():
                raise CheckpointError(f"{INDEX} names shard {name!r}, which is not in {self.folder}")
        return [self.folder / name for name in names]

    def sha256(self) -> str:
        """The checkpoint's identity: sha256 over the names and sha256 of config.json and all shards."""
        digest = hashlib.sha256()
        for path in [self.folder / "config.json", *self.shards()]:
            digest.update(f"{path.name} {sha256_of(path)}\n".encode())
        return digest.hexdigest()

    def find(self, names: tuple[str, ...]) -> str:
        """The first of ``names`` that the checkpoint has; raises CheckpointError if it has none."""
        for name in names:
            if name in self._files:
                return name
        raise CheckpointError(
            f"sought tensor {' or '.join(names)} in {self.folder}, found none among its "
            f"{len(self._files)} tensors; the checkpoint is incomplete or of another architecture"
        )

    def check(self, name: str, shape: tuple[int, ...]) -> None:
        """Raises CheckpointError: tensor missing, of another shape or not a float type."""
        tensor = self._slice(name)
        found = tuple(tensor.get_shape())
        if found != shape:
            raise CheckpointError(
                f"tensor {name}: sought shape {list(shape)} from config.json, found {list(found)}"
            )
        if tensor.get_dtype() not in _DTYPES:
            raise CheckpointError(
                f"tensor {name}: sought one of {', '.join(_DTYPES)}, found {tensor.get_dtype()}"
            )

    def vector(self, name: str, size: int) -> Float32:
        """A whole [size] tensor. Raises CheckpointError as ``check``, and for NaN or infinity."""
        self.check(name, (size,))
        return _finite(name, _float32(self._slice(name)[:]))

    def row_pieces(self, matrix: Matrix) -> Iterator[Float32]:
        """``matrix`` as [r, columns] pieces of consecutive rows; raises as ``vector``."""
        step = max(1, _PIECE_ELEMENTS // matrix.columns)
        for part in matrix.parts:
            self.check(part.name, (part.rows, matrix.columns))
            tensor = self._slice(part.name)
            for start in range(0, part.rows, step):
                yield _finite(part.name, _float32(tensor[start : min(start + step, part.rows)]))

    def column_pieces(self, matrix: Matrix) -> Iterator[Float32]:
        """The transpose of ``matrix`` as [c, rows] pieces of consecutive columns; raises as ``vector``."""
        step = max(1, _PIECE_ELEMENTS // matrix.rows)
        for part in matrix.parts:
            self.check(part.name, (part.rows, matrix.columns))
        for start in range(0, matrix.columns, step):
            end = min(start + step, matrix.columns)
            pieces = [
                _finite(part.name, _float32(self._slice(part.name)[:, start:end])) for part in matrix.parts
            ]
            yield np.ascontiguousarray(np.concatenate(pieces).T)

    def _slice(self, name: str) -> Any:
        return self._files[self.find((name,))].get_slice(name)


def _open(path: Path) -> Any:
    try:
        return safe_open(str(path), framework="numpy")
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is not a whole safetensors file: {error}") from error


def _float32(array: npt.NDArray[Any]) -> Float32:
    if array.dtype == np.float32:
        return array
    if array.dtype == np.float16:
        return array.astype(np.float32)
    # bfloat16 is the upper half of a float32.
    return (array.view(np.uint16).astype(np.uint32) << 16).view(np.float32)


def _finite(name: str, array: Float32) -> Float32:
    finite = np.isfinite(array)
    if not finite.all():
        bad = array[~finite]
        raise CheckpointError(
            f"tensor {name}: sought finite weights, found {bad[0]} ({bad.size} in the piece read); "
            "the checkpoint is damaged"
        )
    return array

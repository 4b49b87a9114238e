"""Fixed buffers for IO binding, on whichever device the recipe names."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime as ort


class Buffer:
    """A tensor that lives as long as its Decoder and never moves.

    On the CPU it is a numpy array that onnxruntime reads and writes in place; elsewhere
    ``read`` and ``write`` copy. ``value`` is what gets bound.
    """

    def __init__(
        self, shape: tuple[int, ...], dtype: npt.DTypeLike, device_type: str = "cpu", device_id: int = 0
    ) -> None:
        self._array: npt.NDArray[Any] | None = None
        if device_type == "cpu":
            self._array = np.zeros(shape, dtype)
            self.value = ort.OrtValue.ortvalue_from_numpy(self._array)
        else:
            self.value = ort.OrtValue.ortvalue_from_shape_and_type(
                list(shape), np.dtype(dtype), device_type, device_id
            )
            self.write(np.zeros(shape, dtype))

    @property
    def nbytes(self) -> int:
        return int(self.value.tensor_size_in_bytes())

    def read(self) -> npt.NDArray[Any]:
        """The contents; on the CPU the live array itself."""
        if self._array is not None:
            return self._array
        contents: npt.NDArray[Any] = self.value.numpy()
        return contents

    def write(self, contents: npt.NDArray[Any]) -> None:
        """Replace the contents by an array of the same shape and dtype."""
        if self._array is None:
            self.value.update_inplace(np.ascontiguousarray(contents))
        elif contents is not self._array:
            self._array[...] = contents

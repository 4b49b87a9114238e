"""The speed that memory allows: a decode step reads every weight once.

``ceiling = read bandwidth / bytes of weights and scales a token reads``. It is optimistic on two
sides: it leaves out the KV cache and what the kernel packs beside the scales, and weights that
partly stay in a large last-level cache can be read faster than memory. 100 % is not the goal.
"""

from __future__ import annotations

import re
import threading
import time
from pathlib import Path

import numpy as np
import onnx

CACHE_SIZES = "/sys/devices/system/cpu/cpu0/cache"
_MINIMUM = 1 << 30  # bytes; the least that is read, however small the cache
_MAXIMUM = 4 << 30
_REPEATS = 30  # about 3 s


def buffer_bytes(last_level_cache: int) -> int:
    """Bytes to stream so that the cache (bytes) cannot hold them: four times it, within 1 to 4 GiB."""
    return min(max(4 * last_level_cache, _MINIMUM), _MAXIMUM)


def last_level_cache(folder: str = CACHE_SIZES) -> int:
    """Bytes of the largest cache that Linux reports for the first CPU; 0 where it reports none."""
    sizes = [path.read_text().strip() for path in Path(folder).glob("index*/size")]
    return max((parse_size(size) for size in sizes), default=0)


def parse_size(text: str) -> int:
    """``"480K"`` or ``"2M"`` in bytes. Raises ValueError for anything else."""
    match = re.fullmatch(r"(\d+)([KMG]?)", text)
    if match is None:
        raise ValueError(f"sought a size such as 480K, found {text!r}")
    return int(match[1]) << {"": 0, "K": 10, "M": 20, "G": 30}[match[2]]


def read_bandwidth(threads: int, size: int) -> float:
    """Bytes a second that ``threads`` threads together read from ``size`` bytes; best of several passes.

    The best, because a pass can only be slowed by others. numpy's maximum releases the GIL and is
    vectorised, so that it waits for memory and not for arithmetic.
    """
    parts = [np.ones(size // threads // 8, np.int64) for _ in range(threads)]
    seconds = min(_pass(parts) for _ in range(_REPEATS))
    return sum(part.nbytes for part in parts) / seconds


def _pass(parts: list[np.ndarray[tuple[int], np.dtype[np.int64]]]) -> float:
    start = threading.Barrier(len(parts) + 1)

    def read(part: np.ndarray[tuple[int], np.dtype[np.int64]]) -> None:
        start.wait(timeout=60)
        part.max()

    workers = [threading.Thread(target=read, args=(part,)) for part in parts]
    for worker in workers:
        worker.start()
    start.wait(timeout=60)
    started = time.perf_counter()
    for worker in workers:
        worker.join()
    return time.perf_counter() - started


def weight_bytes(model: Path) -> int:
    """Bytes of codes and scales (and zero points) that one token reads: all inputs of MatMulNBits.

    The embedding adds one row and the norms some kilobytes; both are left out.
    """
    graph = onnx.load(str(model), load_external_data=False).graph
    sizes = {tensor.name: _stored_bytes(tensor) for tensor in graph.initializer}
    return sum(
        sizes.get(name, 0) for node in graph.node if node.op_type == "MatMulNBits" for name in node.input
    )


def _stored_bytes(tensor: onnx.TensorProto) -> int:
    bits = {onnx.TensorProto.UINT4: 4, onnx.TensorProto.INT4: 4}.get(tensor.data_type)
    if bits is None:
        bits = 8 * onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize
    return int(np.prod(tensor.dims, dtype=np.int64)) * bits // 8


def tokens_per_second(bandwidth: float, bytes_per_token: int) -> float:
    """The ceiling; bandwidth in bytes/s. Raises ValueError unless both are positive."""
    if bandwidth <= 0 or bytes_per_token <= 0:
        raise ValueError(f"sought a positive bandwidth and size, found {bandwidth} and {bytes_per_token}")
    return bandwidth / bytes_per_token

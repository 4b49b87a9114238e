"""The speed that memory allows: a decode step reads every weight once.

``ceiling = read bandwidth / bytes of weights and scales a token reads``; see kvengine.bandwidth for the one
and kvengine.export.reads for the other. It leaves out the KV cache.
"""

from __future__ import annotations

LEAST_BYTES = 1 << 30  # to read here, where nobody is short of memory
REPEATS = 30  # about 3 s


def tokens_per_second(bandwidth: float, bytes_per_token: int) -> float:
    """The ceiling; bandwidth in bytes/s. Raises ValueError unless both are positive."""
    if bandwidth <= 0 or bytes_per_token <= 0:
        raise ValueError(f"sought a positive bandwidth and size, found {bandwidth} and {bytes_per_token}")
    return bandwidth / bytes_per_token

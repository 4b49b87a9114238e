"""The bandwidth ceiling: the arithmetic. See also tests/kvengine/test_bandwidth.py and test_reads.py."""

from __future__ import annotations

import pytest

from bench.ceiling import tokens_per_second


def test_the_ceiling_is_bandwidth_over_bytes() -> None:
    assert tokens_per_second(31e9, 620_000_000) == pytest.approx(50.0)


@pytest.mark.parametrize(("bandwidth", "size"), [(0.0, 1), (1.0, 0), (-1.0, 1)])
def test_no_ceiling_without_bandwidth_or_bytes(bandwidth: float, size: int) -> None:
    with pytest.raises(ValueError, match="positive"):
        tokens_per_second(bandwidth, size)

"""The bandwidth ceiling: what is counted, and the arithmetic."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from bench.ceiling import (
    buffer_bytes,
    last_level_cache,
    parse_size,
    read_bandwidth,
    tokens_per_second,
    weight_bytes,
)

GIB = 1 << 30


@pytest.mark.parametrize(("text", "size"), [("48K", 48 << 10), ("2M", 2 << 20), ("1G", 1 << 30), ("7", 7)])
def test_a_cache_size_is_read_as_linux_writes_it(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "K", "2 M", "-1K", "2T"])
def test_anything_else_is_no_size(text: str) -> None:
    with pytest.raises(ValueError, match="sought a size"):
        parse_size(text)


def test_the_last_level_is_the_largest_cache_reported(tmp_path: Path) -> None:
    for index, size in enumerate(["48K", "32K", "2048K", "16M"]):
        (tmp_path / f"index{index}").mkdir()
        (tmp_path / f"index{index}" / "size").write_text(size + "\n")
    assert last_level_cache(str(tmp_path)) == 16 << 20
    assert last_level_cache(str(tmp_path / "missing")) == 0


@pytest.mark.parametrize(
    ("cache", "size"), [(0, GIB), (32 << 20, GIB), (480 << 20, 1920 << 20), (8 * GIB, 4 * GIB)]
)
def test_the_buffer_is_four_caches_within_what_a_machine_has(cache: int, size: int) -> None:
    assert buffer_bytes(cache) == size


def test_every_thread_reads_its_part() -> None:
    assert read_bandwidth(threads=2, size=1 << 20) > 0


def test_the_ceiling_is_bandwidth_over_bytes() -> None:
    assert tokens_per_second(31e9, 620_000_000) == pytest.approx(50.0)


@pytest.mark.parametrize(("bandwidth", "size"), [(0.0, 1), (1.0, 0), (-1.0, 1)])
def test_no_ceiling_without_bandwidth_or_bytes(bandwidth: float, size: int) -> None:
    with pytest.raises(ValueError, match="positive"):
        tokens_per_second(bandwidth, size)


def test_a_token_reads_codes_scales_and_zero_points_but_not_the_embedding(tmp_path: Path) -> None:
    tensors = [
        _external("codes", TensorProto.UINT8, [64, 2, 16]),
        _external("scales", TensorProto.FLOAT, [64, 2]),
        _external("zeros", TensorProto.UINT8, [64, 1]),
        _external("half", TensorProto.FLOAT16, [64, 2]),
        _external("table", TensorProto.FLOAT, [1000, 64]),
    ]
    nodes = [
        helper.make_node("Gather", ["table", "ids"], ["x"]),
        helper.make_node("MatMulNBits", ["x", "codes", "scales", "zeros"], ["y"], domain="com.microsoft"),
        helper.make_node("MatMulNBits", ["y", "codes", "half"], ["z"], domain="com.microsoft"),
    ]
    path = tmp_path / "model.onnx"
    onnx.save_model(helper.make_model(helper.make_graph(nodes, "step", [], [], tensors)), str(path))
    codes, scales, zeros, half = 64 * 2 * 16, 64 * 2 * 4, 64, 64 * 2 * 2
    assert weight_bytes(path) == codes + scales + zeros + codes + half


def _external(name: str, dtype: int, dims: list[int]) -> onnx.TensorProto:
    """An initializer whose bytes lie in a file that is not there: sizes come from the shape alone."""
    tensor = TensorProto(name=name, data_type=dtype, dims=np.array(dims), data_location=TensorProto.EXTERNAL)
    tensor.external_data.add(key="location", value="model.onnx.data")
    return tensor

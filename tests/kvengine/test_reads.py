"""What a step reads of its weights, by the graph alone."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from kvengine.errors import ArtifactError
from kvengine.export import export
from kvengine.export.reads import weight_bytes
from kvengine.plan import CachePlan
from kvengine.recipe import ExportRecipe, Weights

OURS = "com.microsoft"


def test_a_token_reads_codes_scales_zero_points_and_norms_but_one_row_of_a_table(tmp_path: Path) -> None:
    tensors = [
        _external("codes", TensorProto.UINT8, [64, 2, 16]),
        _external("scales", TensorProto.FLOAT, [64, 2]),
        _external("zeros", TensorProto.UINT8, [64, 1]),
        _external("half", TensorProto.FLOAT16, [64, 2]),
        _external("table", TensorProto.FLOAT, [1000, 64]),
        _external("codes of the table", TensorProto.UINT8, [1000, 64]),
        _external("scales of the table", TensorProto.FLOAT, [1000, 2]),
        _external("norm", TensorProto.FLOAT, [64]),
        _external("nowhere", TensorProto.FLOAT, [64]),
    ]
    nodes = [
        helper.make_node("Gather", ["table", "ids"], ["w"]),
        helper.make_node(
            "GatherBlockQuantized", ["codes of the table", "ids", "scales of the table"], ["v"], domain=OURS
        ),
        helper.make_node("Mul", ["w", "norm"], ["x"]),
        helper.make_node("MatMulNBits", ["x", "codes", "scales", "zeros"], ["y"], domain=OURS),
        helper.make_node("MatMulNBits", ["y", "codes", "half"], ["z"], domain=OURS),
    ]
    path = tmp_path / "model.onnx"
    onnx.save_model(helper.make_model(helper.make_graph(nodes, "step", [], [], tensors)), str(path))
    codes, scales, zeros, half, norm = 64 * 2 * 16, 64 * 2 * 4, 64, 64 * 2 * 2, 64 * 4
    assert weight_bytes(path) == codes + scales + zeros + half + norm


def test_a_table_that_is_the_head_as_well_is_read_whole(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("Gather", ["table", "ids"], ["x"]),
        helper.make_node("MatMul", ["x", "table"], ["logits"]),
    ]
    graph = helper.make_graph(nodes, "step", [], [], [_external("table", TensorProto.FLOAT16, [64, 64])])
    onnx.save_model(helper.make_model(graph), str(tmp_path / "model.onnx"))
    assert weight_bytes(tmp_path / "model.onnx") == 64 * 64 * 2


@pytest.mark.parametrize("weights", ["float32", "int4"])
def test_of_an_artifact_all_but_the_embedding_is_read(
    weights: Weights, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    recipe = ExportRecipe(weights=weights, cache=CachePlan("hybrid", slack=4))
    artifact = export(tiny_checkpoint, tmp_path / "artifact", recipe)
    blobs = sum(blob.size for blob in artifact.manifest.blobs)
    assert 0.3 * blobs < weight_bytes(artifact.model_path) < blobs


@pytest.mark.parametrize("content", [None, b"no graph"])
def test_what_is_no_graph_is_told(content: bytes | None, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "model.onnx").write_bytes(content)
    with pytest.raises(ArtifactError, match="sought a graph at"):
        weight_bytes(tmp_path / "model.onnx")


def _external(name: str, dtype: int, dims: list[int]) -> onnx.TensorProto:
    """An initializer whose bytes lie in a file that is not there: sizes come from the shape alone."""
    tensor = TensorProto(name=name, data_type=dtype, dims=np.array(dims), data_location=TensorProto.EXTERNAL)
    tensor.external_data.add(key="location", value="model.onnx.data")
    return tensor

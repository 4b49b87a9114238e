"""What a graph reads of its weights for each token: the larger part of what a decode step waits for."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import onnx

from kvengine.errors import ArtifactError

# Inputs of which an op reads single rows: embeddings by token, cosines and sines by position.
_BY_ROW: dict[str, frozenset[int]] = {
    "Gather": frozenset({0}),
    "GatherBlockQuantized": frozenset({0, 2, 3}),
    "GroupQueryAttention": frozenset({7, 8}),
    "RotaryEmbedding": frozenset({2, 3}),
}


def weight_bytes(model: Path) -> int:
    """Bytes of all weights (codes, scales, zero points, norms) that one step of ``model`` reads.

    By the shapes alone; the weights' own file is not opened. Tables of which a step reads a row are left out.

    Raises:
        ArtifactError: ``model`` cannot be read.
    """
    try:
        graph = onnx.load(str(model), load_external_data=False).graph
    except Exception as error:  # protobuf's DecodeError, whose package we do not import
        raise ArtifactError(f"sought a graph at {model}: {error}") from error
    whole = {
        name
        for node in _nodes(graph)
        for index, name in enumerate(node.input)
        if index not in _BY_ROW.get(node.op_type, ())
    }
    return sum(_stored_bytes(tensor) for tensor in graph.initializer if tensor.name in whole)


def _nodes(graph: onnx.GraphProto) -> Iterator[onnx.NodeProto]:
    """Also of branches and loops."""
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.GRAPH:
                yield from _nodes(attribute.g)


def _stored_bytes(tensor: onnx.TensorProto) -> int:
    four = tensor.data_type in (onnx.TensorProto.UINT4, onnx.TensorProto.INT4)
    bits = 4 if four else 8 * onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize
    return int(math.prod(tensor.dims) * bits // 8)

"""What the elements of a quantized cache stand for: the scales that GroupQueryAttention takes."""

from __future__ import annotations

import numpy as np
import onnx
from onnx import numpy_helper

from kvengine.codes import Float32Array, Scales
from kvengine.contract import Contract, LayerContract
from kvengine.errors import InvalidModel, UnsupportedModel
from kvengine.export.foreign.reading import ModelFile

# Inputs of the operator, by its documentation: past_key, k_scale, v_scale.
_PAST, _KEY_SCALE, _VALUE_SCALE = 3, 12, 13


def scales_of(file: ModelFile, contract: Contract) -> tuple[Scales, ...]:
    """Of K and V of each layer; none for a cache of floats.

    Raises:
        UnsupportedModel: a scale that is no constant of the graph.
        InvalidModel: one that cannot be read, or is not of the cache's size.
    """
    if not any(layer.dtype in ("int8", "int4") for layer in contract.layers):
        return ()
    tensors = {tensor.name: tensor for tensor in file.proto.graph.initializer}
    nodes = {
        node.input[_PAST]: node
        for node in file.proto.graph.node
        if node.op_type == "GroupQueryAttention" and len(node.input) > _PAST
    }
    return tuple(_layer(file, layer, nodes.get(layer.past_key), tensors) for layer in contract.layers)


def _layer(
    file: ModelFile,
    layer: LayerContract,
    node: onnx.NodeProto | None,
    tensors: dict[str, onnx.TensorProto],
) -> Scales:
    if layer.dtype not in ("int8", "int4"):
        one = np.ones((layer.kv_heads, layer.head_dim), np.float32)
        return one, one
    names = [] if node is None else [*node.input, *[""] * 14][_KEY_SCALE : _VALUE_SCALE + 1]
    if node is None or not all(name in tensors for name in names):
        raise UnsupportedModel(
            f"{file.path}: cache {layer.past_key} is of {layer.dtype}; sought its scales as constants of the "
            f"graph, found {names or 'no operator that takes them'}"
        )
    key, value = (_scale(file, layer, tensors[name]) for name in names)
    return key, value


def _scale(file: ModelFile, layer: LayerContract, tensor: onnx.TensorProto) -> Float32Array:
    """[kv_heads, head_dim]; one for all elements is spread out."""
    try:
        flat = numpy_helper.to_array(tensor, base_dir=str(file.path.parent)).astype(np.float32).reshape(-1)
    except Exception as error:  # onnx raises whatever comes up
        raise InvalidModel(f"{file.path}: scale {tensor.name!r} cannot be read: {error}") from error
    shape = layer.kv_heads, layer.head_dim
    if flat.size not in (1, shape[0] * shape[1]) or not np.isfinite(flat).all():
        raise InvalidModel(
            f"{file.path}: scale {tensor.name!r}: sought 1 or {shape[0] * shape[1]} finite numbers, "
            f"found {flat.size}"
        )
    return np.full(shape, flat[0], np.float32) if flat.size == 1 else flat.reshape(shape)

"""Read an ONNX file that anybody may have made: bounded, without onnxruntime, without following it elsewhere.

Nothing here recurses over what the file says, nothing allocates what it declares, and no code of
onnx's C++ half (checker, shape inference) sees it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import onnx

from kvengine.errors import InvalidModel

MAX_BYTES = (1 << 31) - 1  # protobuf refuses larger messages; weights beyond belong into external data
_BITS: dict[int, int] = {
    onnx.TensorProto.FLOAT: 32,
    onnx.TensorProto.UINT8: 8,
    onnx.TensorProto.INT8: 8,
    onnx.TensorProto.UINT16: 16,
    onnx.TensorProto.INT16: 16,
    onnx.TensorProto.INT32: 32,
    onnx.TensorProto.INT64: 64,
    onnx.TensorProto.BOOL: 8,
    onnx.TensorProto.FLOAT16: 16,
    onnx.TensorProto.DOUBLE: 64,
    onnx.TensorProto.UINT32: 32,
    onnx.TensorProto.UINT64: 64,
    onnx.TensorProto.BFLOAT16: 16,
    onnx.TensorProto.UINT4: 4,
    onnx.TensorProto.INT4: 4,
}


@dataclass(frozen=True)
class ModelFile:
    """A parsed and checked ONNX file. data: the external files it names, relative to its folder."""

    path: Path
    proto: onnx.ModelProto
    data: tuple[str, ...]


def read_model(path: Path) -> ModelFile:
    """Parse ``path`` and check its shape as a graph; weights in external files are not loaded.

    Raises:
        InvalidModel: no plain file, too large, not protobuf; a graph that is cyclic, uses what nobody
            makes or makes a value twice; external data outside the model's folder or beyond its file.
    """
    proto = _parse(path)
    try:
        if not proto.graph.node:
            raise InvalidModel(f"{path}: sought a graph with nodes, found none; is this an ONNX model?")
        _check_order(path, proto.graph)
        names = {name for tensor in _tensors(proto) if (name := _check_tensor(path, tensor)) is not None}
    except UnicodeDecodeError as error:  # protobuf decodes strings only when they are looked at
        raise InvalidModel(f"{path}: a name in it is not UTF-8: {error}") from error
    return ModelFile(path, proto, tuple(sorted(names)))


def _parse(path: Path) -> onnx.ModelProto:
    if not path.is_file():  # also of pipes and devices, which could be read for ever
        raise InvalidModel(
            f"sought an ONNX model at {path}, found {'no plain file' if path.exists() else 'none'}"
        )
    size = path.stat().st_size
    if not 0 < size <= MAX_BYTES:
        raise InvalidModel(
            f"{path}: sought 1 to {MAX_BYTES:,} bytes, found {size:,}; save larger models with external data "
            "(onnx.save_model(..., save_as_external_data=True))"
        )
    proto = onnx.ModelProto()
    try:
        proto.ParseFromString(path.read_bytes())
    except Exception as error:  # protobuf's DecodeError, whose package we do not import
        raise InvalidModel(f"{path} is not an ONNX model: {type(error).__name__}: {error}") from error
    return proto


def _check_order(path: Path, graph: onnx.GraphProto) -> None:
    """ONNX lists nodes in the order they run; so a cycle, too, uses what is not there yet."""
    known = {value.name for value in graph.input}
    known |= {tensor.name for tensor in graph.initializer}
    known |= {tensor.values.name for tensor in graph.sparse_initializer}
    made = {name for node in graph.node for name in node.output if name}
    for node in graph.node:
        for name in node.input:
            if name and name not in known:
                why = "which a later node makes: the graph is cyclic or out of order"
                raise InvalidModel(
                    f"{path}: node {node.name or node.op_type!r} takes {name!r}, "
                    f"{why if name in made else 'which nothing makes'}"
                )
        for name in node.output:
            if name and name in known:
                raise InvalidModel(
                    f"{path}: two makers of {name!r}, one of them {node.name or node.op_type!r}"
                )
            known.add(name)
    for value in graph.output:
        if value.name not in known:
            raise InvalidModel(f"{path}: its output {value.name!r} is made by nothing")


def _tensors(proto: onnx.ModelProto) -> Iterator[onnx.TensorProto]:
    """Every tensor of the model, in subgraphs and functions too."""
    graphs = [proto.graph]
    nodes = [node for function in proto.functions for node in function.node]
    while graphs or nodes:
        if graphs:
            graph = graphs.pop()
            yield from graph.initializer
            for sparse in graph.sparse_initializer:
                yield sparse.values
                yield sparse.indices
            nodes += graph.node
            continue
        for attribute in nodes.pop().attribute:
            if attribute.HasField("t"):
                yield attribute.t
            yield from attribute.tensors
            if attribute.HasField("g"):
                graphs.append(attribute.g)
            graphs += attribute.graphs


def _check_tensor(path: Path, tensor: onnx.TensorProto) -> str | None:
    """The external file a tensor lives in, if it does."""
    if any(size < 0 for size in tensor.dims):
        raise InvalidModel(f"{path}: tensor {tensor.name!r} has shape {list(tensor.dims)}")
    if tensor.data_location != onnx.TensorProto.EXTERNAL:
        return None
    entries = {entry.key: entry.value for entry in tensor.external_data}
    location = str(entries.get("location", ""))
    file = _inside(path, tensor.name, location)
    offset, length = (_number(path, tensor.name, entries, key) for key in ("offset", "length"))
    if tensor.data_type not in _BITS:
        raise InvalidModel(
            f"{path}: tensor {tensor.name!r} has element type {tensor.data_type}, unknown here"
        )
    needed = -(-math.prod(tensor.dims) * _BITS[tensor.data_type] // 8)
    size = file.stat().st_size
    if length and length < needed:
        raise InvalidModel(f"{path}: tensor {tensor.name!r} of {needed:,} bytes, yet {length:,} are stored")
    if offset + max(length, needed) > size:
        raise InvalidModel(
            f"{path}: tensor {tensor.name!r} ends at byte {offset + max(length, needed):,} of {location!r}, "
            f"which has {size:,}; is the file whole?"
        )
    return location


def _inside(path: Path, name: str, location: str) -> Path:
    """The plain file at ``location``, which must be in the model's folder, also once links are followed."""
    parts = PurePosixPath(location).parts
    escapes = not parts or location.startswith("/") or ".." in parts or "\\" in location or "\0" in location
    folder = path.parent
    try:
        if not escapes and (folder / location).resolve().is_relative_to(folder.resolve()):
            if (folder / location).is_file():
                return folder / location
            raise InvalidModel(f"{path}: sought the data of {name!r} in {location!r}, found no such file")
        escapes = True
    except (OSError, ValueError, RuntimeError) as error:  # a name too long, a loop of links
        raise InvalidModel(f"{path}: the data of {name!r} is in {location[:80]!r}: {error}") from error
    raise InvalidModel(
        f"{path}: the data of {name!r} is in {location[:80]!r}, outside the model's folder, and is not "
        "followed; copy it there"
    )


def _number(path: Path, name: str, entries: dict[str, str], key: str) -> int:
    text = entries.get(key, "0")
    if not (text.isascii() and text.isdigit() and len(text) < 20):
        raise InvalidModel(f"{path}: the data of {name!r} has {key} {text[:40]!r}")
    return int(text)

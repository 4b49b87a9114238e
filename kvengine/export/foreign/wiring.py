"""Which graph input is carried on to which graph output, and which operator feeds on an input where."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass

import onnx

# Operators that hand a value on as it is.
_SAME = {"Identity", "Cast"}


@dataclass(frozen=True)
class Value:
    """A graph input or output. dims: an int, a symbol's name, or "" where nothing is said."""

    name: str
    element: int  # onnx.TensorProto.DataType
    dims: tuple[int | str, ...]


@dataclass(frozen=True)
class Use:
    """``node`` takes the value as its input number ``slot``."""

    node: onnx.NodeProto
    slot: int


@dataclass(frozen=True)
class Carried:
    """The cache tensor ``past`` comes out as ``present``, written by ``node``.

    half: "key" or "value" where the operator's own inputs tell, else "".
    axis: of the sequence; None where the operator does not tell.
    alone: nothing but ``node`` reads past.
    """

    past: Value
    present: Value
    node: onnx.NodeProto
    half: str
    axis: int | None
    alone: bool


class Wiring:
    """The main graph of a checked model, indexed once."""

    def __init__(self, graph: onnx.GraphProto) -> None:
        initializers = {tensor.name for tensor in graph.initializer}
        self.inputs = {v.name: v for v in map(_value, graph.input) if v.name not in initializers}
        self.outputs = {v.name: v for v in map(_value, graph.output)}
        self._makers = {name: node for node in graph.node for name in node.output if name}
        self._uses: defaultdict[str, list[Use]] = defaultdict(list)
        for node in graph.node:
            for slot, name in enumerate(node.input):
                if name:
                    self._uses[name].append(Use(node, slot))
        # A subgraph sees the names of the graph around it.
        self._captured = set(_names_in_subgraphs(graph))

    def uses(self, name: str) -> list[Use]:
        """Every use of a graph input, also through Identity and Cast."""
        found, names, seen = [], [name], set[str]()
        while names:
            at = names.pop()
            if at in seen:
                continue
            seen.add(at)
            for use in self._uses[at]:
                if use.node.op_type in _SAME:
                    names += use.node.output
                else:
                    found.append(use)
        return found

    def carried(self, output: Value) -> Carried | None:
        """What ``output`` carries on, where its maker is an operator known to write a cache."""
        node, number = self._maker(output.name)
        if node is None:
            return None
        rank = len(output.dims)
        for slot, half, axis in _writes(node, number, rank):
            past = self.inputs.get(self._origin(node.input[slot])) if slot < len(node.input) else None
            if past is not None:
                alone = len(self.uses(past.name)) == 1 and past.name not in self._captured
                return Carried(past, output, node, half, axis, alone)
        return None

    def maker(self, output: str) -> str:
        """The type of the operator that makes an output, for people."""
        node, _ = self._maker(output)
        return "nothing" if node is None else node.op_type

    def _maker(self, name: str) -> tuple[onnx.NodeProto | None, int]:
        name = self._origin(name)
        node = self._makers.get(name)
        return (None, 0) if node is None else (node, list(node.output).index(name))

    def _origin(self, name: str) -> str:
        """Back through Identity (nodes are in order, so this ends), not Cast: that makes another tensor."""
        while (node := self._makers.get(name)) is not None and node.op_type == "Identity" and node.input:
            name = node.input[0]
        return name


def attribute(node: onnx.NodeProto, name: str, default: int) -> int:
    """An integer attribute, or its default."""
    return next((int(a.i) for a in node.attribute if a.name == name), default)


def text_attribute(node: onnx.NodeProto, name: str, default: str) -> str:
    return next((a.s.decode(errors="replace") for a in node.attribute if a.name == name), default)


def _writes(node: onnx.NodeProto, output: int, rank: int) -> Iterator[tuple[int, str, int | None]]:
    """(slot of past, half, sequence axis) if ``output`` of ``node`` is a cache.

    Slots and axes are those of the operators' documentation: GroupQueryAttention and Attention keep
    [batch, kv_heads, sequence, head_size].
    """
    match node.op_type:
        case "GroupQueryAttention":
            yield from {1: [(3, "key", 2)], 2: [(4, "value", 2)]}.get(output, [])
        case "Attention" if node.domain in ("", "ai.onnx"):
            yield from {1: [(4, "key", 2)], 2: [(5, "value", 2)]}.get(output, [])
        case "TensorScatter":
            yield 0, "", _axis(attribute(node, "axis", -2), rank)
        case "Concat" if len(node.input) == 2:
            yield 0, "", _axis(attribute(node, "axis", 0), rank)
        case "ScatterND" | "ScatterElements" | "Scatter":
            yield 0, "", None  # which axis the sequence is stands in the indices


def _axis(axis: int, rank: int) -> int | None:
    axis = axis + rank if axis < 0 else axis
    return axis if 0 <= axis < rank else None


def _value(info: onnx.ValueInfoProto) -> Value:
    tensor = info.type.tensor_type
    dims = tuple(d.dim_value if d.HasField("dim_value") else d.dim_param for d in tensor.shape.dim)
    return Value(info.name, tensor.elem_type, dims)


def _names_in_subgraphs(graph: onnx.GraphProto) -> Iterator[str]:
    pending = [a for node in graph.node for a in node.attribute]
    while pending:
        one = pending.pop()
        for inner in [*([one.g] if one.HasField("g") else []), *one.graphs]:
            for node in inner.node:
                yield from node.input
                pending += node.attribute
            yield from (value.name for value in inner.output)

"""Seeded damage for bytes, JSON and ONNX graphs. ``count`` scales from ``make test`` to ``make soak``."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Callable
from typing import Any

import onnx

# What hostile numbers look like.
NUMBERS = (0, 1, -1, 2, 7, 255, 2**31 - 1, -(2**31), 2**32, 2**63 - 1, -(2**63))


def count(in_test: int, in_soak: int) -> int:
    """KVFARM_FUZZ=soak asks for the many."""
    return in_soak if os.environ.get("KVFARM_FUZZ") == "soak" else in_test


def damaged(draw: random.Random, data: bytes) -> bytes:
    """``data`` with a few bits flipped, pieces cut, doubled, moved or replaced by noise."""
    found = bytearray(data)
    for _ in range(draw.randint(1, 4)):
        at, end = sorted(draw.randrange(len(found) + 1) for _ in range(2))
        end = min(end, at + draw.choice((1, 4, 16, 1000)))
        match draw.randrange(6):
            case 0 if at < len(found):
                found[at] ^= 1 << draw.randrange(8)
            case 1:
                del found[at:end]
            case 2:
                del found[at:]
            case 3:
                found[at:at] = found[at:end]
            case 4:
                found[at:end] = draw.randbytes(end - at)
            case _:
                found[at:at] = draw.randbytes(draw.randint(1, 8))
    return bytes(found)


def damaged_json(draw: random.Random, value: Any) -> Any:
    """``value`` with one place of it replaced by something of another kind, dropped or nested deeper."""
    value = json.loads(json.dumps(value))
    place: Any = value
    while isinstance(place, dict | list) and place:
        key = draw.choice(list(place)) if isinstance(place, dict) else draw.randrange(len(place))
        inner = place[key]
        if not isinstance(inner, dict | list) or not inner or draw.random() < 0.3:
            if draw.random() < 0.2:
                del place[key]
            else:
                place[key] = draw.choice((_odd(draw), [inner], {"kind": inner}, _odd(draw)))
            return value
        place = inner
    return _odd(draw)


def _odd(draw: random.Random) -> Any:
    return draw.choice(
        (None, True, "", "x", "\x00", "é" * 50, [], {}, 1.5, 1e308, draw.choice(NUMBERS), 10**400, [[[]]] * 3)
    )


def damaged_model(draw: random.Random, model: onnx.ModelProto) -> bytes:
    """A graph that still parses and means something else: wires, shapes, attributes and operators changed."""
    found = onnx.ModelProto()
    found.CopyFrom(model)
    for _ in range(draw.randint(1, 3)):
        if found.graph.node:  # of a small graph the last may have been dropped
            draw.choice(_TWISTS)(draw, found.graph)
    return bytes(found.SerializeToString())


def _rewire(draw: random.Random, graph: onnx.GraphProto) -> None:
    node = draw.choice(graph.node)
    names = [name for other in graph.node for name in (*other.input, *other.output)]
    names += [value.name for value in graph.input]
    if node.input:
        node.input[draw.randrange(len(node.input))] = draw.choice(names)


def _attribute(draw: random.Random, graph: onnx.GraphProto) -> None:
    places = [a for node in graph.node for a in node.attribute]
    if places:
        one = draw.choice(places)
        one.i = draw.choice(NUMBERS)
        if one.ints:
            one.ints[draw.randrange(len(one.ints))] = draw.choice(NUMBERS)


def _operator(draw: random.Random, graph: onnx.GraphProto) -> None:
    draw.choice(graph.node).op_type = draw.choice(graph.node).op_type


def _drop(draw: random.Random, graph: onnx.GraphProto) -> None:
    del graph.node[draw.randrange(len(graph.node))]


def _shape(draw: random.Random, graph: onnx.GraphProto) -> None:
    value = draw.choice([*graph.input, *graph.output])
    dims = value.type.tensor_type.shape.dim
    if dims:
        draw.choice(dims).dim_value = draw.choice(NUMBERS)
    if draw.random() < 0.3:
        value.type.tensor_type.elem_type = draw.randrange(25)


def _tensor(draw: random.Random, graph: onnx.GraphProto) -> None:
    tensor = draw.choice(graph.initializer)
    match draw.randrange(4):
        case 0 if tensor.dims:
            tensor.dims[draw.randrange(len(tensor.dims))] = draw.choice(NUMBERS)
        case 1:
            tensor.raw_data = tensor.raw_data[: draw.randrange(len(tensor.raw_data) + 1)]
        case 2:
            tensor.data_location = onnx.TensorProto.EXTERNAL
            entry = tensor.external_data.add()
            entry.key = draw.choice(("location", "offset", "length", ""))
            entry.value = draw.choice(("../secret", "/etc/hostname", "no-such-file", "-1", "9" * 30, ""))
        case _:
            # Also small integers: axes, shapes and slices of the graph.
            tensor.raw_data = draw.randbytes(len(tensor.raw_data))


def _name(draw: random.Random, graph: onnx.GraphProto) -> None:
    draw.choice([*graph.input, *graph.output]).name = draw.choice(
        ("", "x", "input_ids", "present.0.key", "ü" * 99)
    )


_TWISTS: tuple[Callable[[random.Random, onnx.GraphProto], None], ...] = (
    _rewire,
    _attribute,
    _operator,
    _drop,
    _shape,
    _tensor,
    _name,
)

"""Catalogue 47-56: overflow, scales, codes, heads."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

from harness.mutants import seams
from harness.mutants.mutant import Mutant
from kvengine.decoder import Decoder

_HEADS, _KV_HEADS, _HEAD_DIM = 4, 2, 32  # of the tiny models
_Alter = Callable[[onnx.ModelProto], None]


def _scaled_norm(model: onnx.ModelProto, name: str, by: float) -> None:
    for tensor in model.graph.initializer:
        if tensor.name.endswith(name):
            tensor.CopyFrom(
                numpy_helper.from_array(numpy_helper.to_array(tensor) * np.float32(by), tensor.name)
            )


def _large_keys(model: onnx.ModelProto) -> None:
    """K times 2^15 and Q divided by it: the same in float32, beyond what float16 holds."""
    _scaled_norm(model, ".k_norm", 2.0**15)
    _scaled_norm(model, ".q_norm", 2.0**-15)


def _constant(model: onnx.ModelProto, name: str, value: seams.Array) -> str:
    model.graph.initializer.append(numpy_helper.from_array(value, name))
    return name


def _put_before(model: onnx.ModelProto, node: onnx.NodeProto, nodes: list[onnx.NodeProto]) -> None:
    at = list(model.graph.node).index(node)
    for offset, new in enumerate(nodes):
        model.graph.node.insert(at + offset, new)


def _columns(heads: list[int]) -> seams.Array:
    """Columns of [.., heads * head_dim] in the order of ``heads``."""
    return np.concatenate([np.arange(h * _HEAD_DIM, (h + 1) * _HEAD_DIM) for h in heads]).astype(np.int64)


def _gathered(which: int, heads: list[int], layers: Callable[[int], bool]) -> _Alter:
    """Input ``which`` (0 Q, 1 K, 2 V) of attention in some layers has its heads taken from ``heads``."""

    def alter(model: onnx.ModelProto) -> None:
        for index, node in enumerate(seams.attention_nodes(model)):
            if layers(index):
                columns = _constant(model, f"mutant.columns.{index}", _columns(heads))
                name = f"mutant.heads.{index}"
                gather = helper.make_node("Gather", [node.input[which], columns], [name], axis=-1)
                _put_before(model, node, [gather])
                node.input[which] = name

    return alter


def _tiled(model: onnx.ModelProto) -> None:
    """Query head h reads KV head h % n and not h // (heads / n): by moving query heads there and back."""
    order = [0, 2, 1, 3]  # its own inverse
    _gathered(0, order, lambda index: True)(model)
    for index, node in enumerate(seams.attention_nodes(model)):
        columns = _constant(model, f"mutant.back.{index}", _columns(order))
        right, moved = node.output[0], f"mutant.moved.{index}"
        node.output[0] = moved
        at = list(model.graph.node).index(node)
        model.graph.node.insert(at + 1, helper.make_node("Gather", [moved, columns], [right], axis=-1))


def _descale_skipped(model: onnx.ModelProto) -> None:
    """The attention output is of V's codes, not of V: divided by V's scale."""
    for index, node in enumerate(seams.attention_nodes(model)):
        (scale,) = [t for t in model.graph.initializer if t.name == f"layers.{index}.value_scale"]
        channels = numpy_helper.to_array(scale).reshape(_KV_HEADS, _HEAD_DIM)
        by_query = np.repeat(channels, _HEADS // _KV_HEADS, axis=0).reshape(-1)
        inverse = _constant(model, f"mutant.inverse.{index}", (1 / by_query).astype(np.float32))
        right, coded = node.output[0], f"mutant.coded.{index}"
        node.output[0] = coded
        at = list(model.graph.node).index(node)
        model.graph.node.insert(at + 1, helper.make_node("Mul", [coded, inverse], [right]))


def _queries_saturate(model: onnx.ModelProto) -> None:
    """A scale of 2^14 is folded into Q, which is float16 for a moment and saturates at 65504."""
    large = _constant(model, "mutant.large", np.array(2.0**14, np.float32))
    small = _constant(model, "mutant.small", np.array(2.0**-14, np.float32))
    most = _constant(model, "mutant.most", np.array(65504, np.float32))
    least = _constant(model, "mutant.least", np.array(-65504, np.float32))
    for index, node in enumerate(seams.attention_nodes(model)):
        names = [f"mutant.q{step}.{index}" for step in range(5)]
        chain = [
            helper.make_node("Mul", [node.input[0], large], [names[0]]),
            helper.make_node("Clip", [names[0], least, most], [names[1]]),
            helper.make_node("Cast", [names[1]], [names[2]], to=onnx.TensorProto.FLOAT16),
            helper.make_node("Cast", [names[2]], [names[3]], to=onnx.TensorProto.FLOAT),
            helper.make_node("Mul", [names[3], small], [names[4]]),
        ]
        _put_before(model, node, chain)
        node.input[0] = names[4]


def _zero_for_values(scale: seams.Array) -> seams.Array:
    return scale * 0 + np.float32(1e-30)


def _coarse_chunks(held: seams.Held) -> None:
    """Rows that came in a chunk have codes half as fine as rows that came alone."""
    count = held.after - held.before
    if count > 1:
        for now, _ in held.parts:
            rows = slice(max(0, held.alive - count), held.alive)
            now[:, :, rows] = now[:, :, rows] // 2 * 2


def _truncated(held: seams.Held) -> None:
    """Codes are rounded towards minus infinity: on average half a step too low, here every second one."""
    count = held.after - held.before
    rows = slice(max(0, held.alive - count), held.alive)
    for now, _ in held.parts:
        part = now[:, :, rows, ::2]
        now[:, :, rows, ::2] = np.maximum(part, -127) - 1


def _newest_before_init(run: Callable[..., Any], decoder: Decoder, *arguments: Any, **named: Any) -> Any:
    """The first greedy step reads the buffer that no step has written yet."""
    logits = run(decoder, *arguments, **named)
    if named.get("keep_token"):
        decoder._newest = 1
    return logits


def _stale_counts(seen: seams.Fed) -> None:
    """query_seqlens is filled in after the step: each step reads the one before."""
    kept = seen.decoder.__dict__.setdefault("mutant_counts", np.zeros_like(seen.new))
    current = seen.new.copy()
    seen.new[:] = np.minimum(kept, seen.count)
    kept[:] = current


MUTANTS = (
    Mutant(
        "K overflows float16",
        47,
        "ORT#28195, HF#36832",
        "K is 2^15 as large and Q as small, which float32 would not notice",
        (seams.graph(_large_keys),),
        recipe="hybrid-fp16kv,slack=2",
    ),
    Mutant(
        "scale floored at 1",
        48,
        "mlxcel#717",
        "no cache scale is below 1",
        (seams.scales(lambda scale: np.maximum(scale, 1)),),
        recipe="hybrid-int8kv,slack=2",
    ),
    Mutant(
        "scale four times too coarse",
        48,
        "mlxcel#717",
        "every cache scale is four times too large, so that two bits are never used",
        (seams.scales(lambda scale: 4 * scale),),
        recipe="hybrid-int8kv,slack=2",
        model="w3",
    ),
    Mutant(
        "scale never set",
        49,
        "InfiniLM#553",
        "cache scales are as good as zero",
        (seams.scales(_zero_for_values),),
        recipe="static,cache-dtype=int8",
    ),
    Mutant(
        "descale skipped",
        49,
        "vllm#42580",
        "attention returns V's codes and not V",
        (seams.graph(_descale_skipped),),
        recipe="hybrid-int8kv,slack=2",
        model="w4",
    ),
    Mutant(
        "calibration reads neighbour columns",
        50,
        "imp#91",
        "each channel has the scale of the one beside it",
        (seams.scales(lambda scale: np.roll(scale, 1, axis=-1)),),
        recipe="hybrid-int8kv,slack=2",
    ),
    Mutant(
        "codes by flush group",
        51,
        "VeloxQuant-MLX#163",
        "rows that come in a chunk are quantized more coarsely than rows that come alone",
        (seams.after_step(_coarse_chunks), seams.after_step(_coarse_chunks, windowed=False)),
        recipe="hybrid-int8kv,slack=2",
        model="w3",
    ),
    Mutant(
        "codes a step too low",
        51,
        "VeloxQuant-MLX#163, rounding",
        "every second channel's code is one too low",
        (seams.after_step(_truncated), seams.after_step(_truncated, windowed=False)),
        recipe="static,cache-dtype=int8",
        model="w4",
    ),
    Mutant(
        "Q saturates in float16",
        52,
        "ORT#32520",
        "a scale is folded into Q, which float16 then cuts off",
        (seams.graph(_queries_saturate),),
        recipe="hybrid-int8kv,slack=2",
    ),
    Mutant(
        "KV heads tiled",
        54,
        "onnx#7274",
        "query head h reads KV head h % n, not h // (heads / n)",
        (seams.graph(_tiled),),
    ),
    Mutant(
        "every query head on the first KV head",
        54,
        "ONNXim#34",
        "all query heads read V of KV head 0",
        (seams.graph(_gathered(2, [0, 0], lambda index: True)),),
        recipe="naive",
        model="w4",
    ),
    Mutant(
        "one KV head for all, under int4",
        55,
        "genai#2214",
        "in the last layer K of KV head 1 is that of head 0, where an int4 cache hides it from the logits",
        (seams.graph(_gathered(1, [0, 0], lambda index: index == 3)),),
        recipe="hybrid-int4kv,slack=2",
    ),
    Mutant(
        "greedy token read before it is there",
        56,
        "ORT#27108",
        "the first fed-back step reads a buffer that nobody has written",
        (seams.method(Decoder, "_run", _newest_before_init),),
    ),
    Mutant(
        "counts filled in after the step",
        56,
        "ORT#27108",
        "query_seqlens is that of the step before",
        (seams.fed(_stale_counts),),
        recipe="static",
    ),
)

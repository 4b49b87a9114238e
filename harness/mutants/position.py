"""Catalogue 20-26: positions and RoPE."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import onnx

import kvengine.decoder
from harness.mutants import seams
from harness.mutants.mutant import Mutant, Patch
from kvengine.spec import RopeSpec

_COS = 7  # input of GroupQueryAttention; sin follows


def _ropes(choose: Callable[[list[str]], list[str]]) -> Callable[[onnx.ModelProto], None]:
    """Layers take the tables that ``choose`` makes of theirs, by name ("0", "1")."""

    def alter(model: onnx.ModelProto) -> None:
        nodes = seams.attention_nodes(model)
        own = [node.input[_COS].rsplit(".", 1)[1] for node in nodes]
        for node, rope in zip(nodes, choose(own), strict=True):
            node.input[_COS], node.input[_COS + 1] = f"cos_cache.{rope}", f"sin_cache.{rope}"

    return alter


def _local(rope: RopeSpec) -> bool:
    """The tiny models' local layers have theta 100."""
    return rope.theta < 1000


def _offset_read_late(seen: seams.Fed, run: seams.Run) -> None:
    """The rotary offset is read after the cache has advanced: local layers rotate by position + count."""
    tables = [buffer.read() for name, buffer in seen.decoder._tables if name.endswith(".0")]
    right = [table.copy() for table in tables]
    for table, copy in zip(tables, right, strict=True):
        table[: len(table) - seen.count] = copy[seen.count :]
        table[len(table) - seen.count :] = copy[-1]
    try:
        run()
    finally:
        for table, copy in zip(tables, right, strict=True):
            table[:] = copy


def _modulo(table: seams.Array, rope: RopeSpec) -> seams.Array:
    return table[np.arange(len(table)) % 7] if _local(rope) else table


def _clamped(table: seams.Array, rope: RopeSpec) -> seams.Array:
    return table[np.minimum(np.arange(len(table)), 7)]


def _halved(table: seams.Array, rope: RopeSpec) -> seams.Array:
    at = np.arange(len(table))
    return table[np.where(at % 2, 0, at // 2)]


def _switching(make: Callable[..., tuple[seams.Array, seams.Array]]) -> Callable[..., object]:
    """From position 8 on another factor, while what is cached stays rotated by the old one."""

    def broken(rope: RopeSpec, positions: int, head_dim: int) -> tuple[seams.Array, ...]:
        short = make(rope, positions, head_dim)
        long = make(replace(rope, factor=2 * rope.factor), positions, head_dim)
        return tuple(np.concatenate([a[:8], b[8:]]) for a, b in zip(short, long, strict=True))

    return broken


MUTANTS = (
    Mutant(
        "local layers on the global theta",
        21,
        "vllm#29111, ollama#13452, mlx-vlm#1709",
        "every layer rotates by the global table",
        (seams.graph(_ropes(lambda own: ["1"] * len(own))),),
    ),
    Mutant(
        "global layer on the local theta",
        21,
        "vllm#29111, ollama#13452, mlx-vlm#1709",
        "every layer rotates by the local table",
        (seams.graph(_ropes(lambda own: ["0"] * len(own))),),
        recipe="static",
        model="w4",
    ),
    Mutant(
        "last layer on the wrong theta under int4",
        21,
        "mlx-vlm#1709",
        "the last local layer rotates by the global table, where an int4 cache hides it from the logits",
        (seams.graph(_ropes(lambda own: [*own[:-1], "1"])),),
        recipe="hybrid-int4kv,slack=2",
    ),
    Mutant(
        "linear scaling ignored",
        21,
        "ollama#13452",
        "the factor of the global layers is taken for 1",
        (seams.other_rope(lambda rope: replace(rope, factor=1.0)),),
        model="scaled",
    ),
    Mutant(
        "linear scaling of local layers too",
        21,
        "mlx-vlm#1709",
        "the factor of the global layers is used in all",
        (seams.other_rope(lambda rope: replace(rope, factor=4.0)),),
        model="scaled",
    ),
    Mutant(
        "rotary offset read late",
        22,
        "mlx#1805",
        "local layers rotate by the position after the step",
        (seams.around_run(_offset_read_late),),
        model="w4",
    ),
    Mutant(
        "slot taken for position",
        23,
        "mlx#999",
        "local layers rotate by the slot in a buffer of 7, not by the position",
        (seams.tables(_modulo),),
        model="w5",
    ),
    Mutant(
        "position clamped to the buffer",
        23,
        "mlx#999",
        "positions past 7 rotate like 7",
        (seams.tables(_clamped),),
        recipe="static",
        model="w5",
    ),
    Mutant(
        "factor switches in mid sequence",
        24,
        "genai#1161",
        "from position 8 on RoPE has another factor, and the cache is not computed anew",
        (Patch(kvengine.decoder, "rope_tables", _switching),),
        recipe="static",
    ),
    Mutant(
        "int64 positions filled from int32",
        25,
        "genai#187",
        "every second position is 0, the others are half of what they should be",
        (seams.tables(_halved),),
        recipe="naive",
        model="w3",
    ),
)

"""From a checkpoint to the data file: every matrix once, in the precision of the recipe."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx

from kvengine.errors import CheckpointError
from kvengine.export.config import Architecture
from kvengine.export.datafile import DataFile, external_tensor
from kvengine.export.families import HEAD_NAMES, WEIGHT_PREFIXES
from kvengine.export.quantize import WEIGHT_BITS, UInt8, blocks_of, quantize_rows
from kvengine.export.weights import Checkpoint, Float32, Matrix, Part
from kvengine.recipe import ExportRecipe

# Older checkpoints store what follows from the config.
_COMPUTED = "rotary_emb.inv_freq"
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Stored:
    """A matrix [rows, columns] in the data file.

    tensors: its initializers. Float: one, [columns, rows] if transposed else [rows, columns].
        Quantized: codes uint8 [rows, blocks, bytes] and scales [rows, blocks].
    bits: 0 for float.
    """

    rows: int
    columns: int
    tensors: tuple[onnx.TensorProto, ...]
    bits: int = 0
    bias: Float32 | None = None


@dataclass(frozen=True)
class StoredModel:
    """All weights by the graph's names; ``vectors`` (norms) are small and stay in the graph.

    ``table`` shares the bytes of ``matrices["head"]`` when the head is tied.
    """

    matrices: dict[str, Stored]
    vectors: dict[str, Float32]
    table: Stored


class WeightWriter:
    """Streams matrices from ``checkpoint`` to ``data``."""

    def __init__(
        self, checkpoint: Checkpoint, data: DataFile, recipe: ExportRecipe, progress: Progress
    ) -> None:
        self._checkpoint = checkpoint
        self._data = data
        self._recipe = recipe
        self._progress = progress

    def write(self, architecture: Architecture) -> StoredModel:
        """Raises CheckpointError: a tensor is missing, misshapen, not finite, too large for float16 or
        none that this family has.
        """
        spec, checkpoint = architecture.spec, self._checkpoint
        prefix = checkpoint.find(tuple(p + "embed_tokens.weight" for p in WEIGHT_PREFIXES))
        prefix = prefix.removesuffix("embed_tokens.weight")
        matrices: dict[str, Stored] = {}
        vectors: dict[str, Float32] = {}
        layout = layer_layout(architecture, prefix)
        self._refuse_unknown(architecture, prefix, layout)
        total = len(layout) + (1 if spec.tied_head else 2)
        for done, (name, matrix) in enumerate(layout.items()):
            self._progress("weights", done, total)
            bias = self._bias(matrix) if architecture.family.qkv_bias and name.endswith(".qkv") else None
            matrices[name] = self._matrix(name, matrix, transposed=True, bias=bias)
        for name, (tensor, size) in vector_layout(architecture, prefix).items():
            vectors[name] = checkpoint.vector(tensor, size) + np.float32(architecture.family.norm_offset)
        self._progress("weights", len(layout), total)
        embedding = Matrix((Part(prefix + "embed_tokens.weight", spec.vocab_size),), spec.hidden_size)
        table = self._matrix("embedding", embedding, transposed=False)
        if spec.tied_head:
            matrices["head"] = table
        else:
            self._progress("weights", total - 1, total)
            head = Matrix((Part(checkpoint.find(HEAD_NAMES), spec.vocab_size),), spec.hidden_size)
            matrices["head"] = self._matrix("head", head, transposed=False)
        self._progress("weights", total, total)
        return StoredModel(matrices, vectors, table)

    def _refuse_unknown(self, architecture: Architecture, prefix: str, layout: dict[str, Matrix]) -> None:
        """A tensor that no part of the graph comes from means that the checkpoint is another model."""
        known = {part.name for matrix in layout.values() for part in matrix.parts}
        if architecture.family.qkv_bias:
            known |= {
                part.name.removesuffix("weight") + "bias"
                for name, matrix in layout.items()
                if name.endswith(".qkv")
                for part in matrix.parts
            }
        known |= {tensor for tensor, _ in vector_layout(architecture, prefix).values()}
        known.add(prefix + "embed_tokens.weight")
        unknown = [
            name
            for name in self._checkpoint.names()
            if name.startswith(prefix) and name not in known and not name.endswith(_COMPUTED)
        ]
        if unknown:
            raise CheckpointError(
                f"tensor {unknown[0]}: no {architecture.spec.family} of this config.json has it (nor "
                f"{len(unknown) - 1} others here); config.json and weights do not belong together"
            )

    def _bias(self, matrix: Matrix) -> Float32:
        parts = [
            self._checkpoint.vector(part.name.removesuffix("weight") + "bias", part.rows)
            for part in matrix.parts
        ]
        return np.concatenate(parts)

    def _matrix(self, name: str, matrix: Matrix, *, transposed: bool, bias: Float32 | None = None) -> Stored:
        if self._recipe.weights in WEIGHT_BITS:
            return self._quantized(name, matrix, WEIGHT_BITS[self._recipe.weights], bias)
        dtype = np.dtype(self._recipe.weights)
        shape = (matrix.columns, matrix.rows) if transposed else (matrix.rows, matrix.columns)
        read = self._checkpoint.column_pieces if transposed else self._checkpoint.row_pieces
        length = matrix.rows * matrix.columns * dtype.itemsize
        region = self._data.append(length, _cast(matrix.name, read(matrix), dtype))
        tensor = external_tensor(name, dtype, shape, region)
        return Stored(matrix.rows, matrix.columns, (tensor,), bias=bias)

    def _quantized(self, name: str, matrix: Matrix, bits: int, bias: Float32 | None) -> Stored:
        block = self._recipe.block_size
        blocks = blocks_of(matrix.columns, block)
        shape = (matrix.rows, blocks, block * bits // 8)
        scale_dtype = np.dtype(self._recipe.activations)
        scales: list[Float32] = []

        def codes() -> Iterator[UInt8]:
            for piece in self._checkpoint.row_pieces(matrix):
                quantized = quantize_rows(piece, bits, block, scale_dtype)
                scales.append(quantized.scales)
                yield quantized.codes

        code_region = self._data.append(int(np.prod(shape)), codes())
        scale_length = matrix.rows * blocks * scale_dtype.itemsize
        scale_region = self._data.append(scale_length, _cast(matrix.name, iter(scales), scale_dtype))
        tensors = (
            external_tensor(name + ".codes", np.uint8, shape, code_region),
            external_tensor(name + ".scales", scale_dtype, (matrix.rows, blocks), scale_region),
        )
        return Stored(matrix.rows, matrix.columns, tensors, bits, bias)


def layer_layout(architecture: Architecture, prefix: str) -> dict[str, Matrix]:
    """Which tensors make up each matrix of the layers: Q, K, V are one, gate and up are one."""
    spec = architecture.spec
    layout: dict[str, Matrix] = {}
    for i, layer in enumerate(spec.layers):
        at = f"{prefix}layers.{i}."
        queries, keys = spec.num_heads * layer.head_dim, layer.kv_heads * layer.head_dim
        qkv = {"q_proj": queries, "k_proj": keys, "v_proj": keys}
        gate_up = {"gate_proj": spec.intermediate_size, "up_proj": spec.intermediate_size}
        if architecture.family.fused:
            qkv, gate_up = {"qkv_proj": sum(qkv.values())}, {"gate_up_proj": sum(gate_up.values())}
        layout[f"layers.{i}.qkv"] = Matrix(
            tuple(Part(f"{at}self_attn.{name}.weight", rows) for name, rows in qkv.items()), spec.hidden_size
        )
        layout[f"layers.{i}.out"] = Matrix((Part(f"{at}self_attn.o_proj.weight", spec.hidden_size),), queries)
        layout[f"layers.{i}.gate_up"] = Matrix(
            tuple(Part(f"{at}mlp.{name}.weight", rows) for name, rows in gate_up.items()), spec.hidden_size
        )
        layout[f"layers.{i}.down"] = Matrix(
            (Part(f"{at}mlp.down_proj.weight", spec.hidden_size),), spec.intermediate_size
        )
    return layout


def vector_layout(architecture: Architecture, prefix: str) -> dict[str, tuple[str, int]]:
    """Tensor name and size of every norm, by the graph's names."""
    spec, family = architecture.spec, architecture.family
    # Gemma calls the norm after attention what Llama calls the norm before the MLP.
    names = {"attention_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm"}
    if family.sandwich:
        names["mlp_norm"] = "pre_feedforward_layernorm"
        names["post_attention_norm"] = "post_attention_layernorm"
        names["post_mlp_norm"] = "post_feedforward_layernorm"
    layout: dict[str, tuple[str, int]] = {"norm": (prefix + "norm.weight", spec.hidden_size)}
    for i, layer in enumerate(spec.layers):
        for name, tensor in names.items():
            layout[f"layers.{i}.{name}"] = (f"{prefix}layers.{i}.{tensor}.weight", spec.hidden_size)
        if family.qk_norm:
            for name in ("q_norm", "k_norm"):
                tensor = f"{prefix}layers.{i}.self_attn.{name}.weight"
                layout[f"layers.{i}.{name}"] = (tensor, layer.head_dim)
    return layout


def _cast(name: str, pieces: Iterator[Float32], dtype: np.dtype[Any]) -> Iterator[npt.NDArray[Any]]:
    for piece in pieces:
        if dtype == np.float16 and np.abs(piece).max(initial=0) > np.finfo(np.float16).max:
            raise CheckpointError(
                f"tensor {name}: sought weights up to {np.finfo(np.float16).max:.0f} for float16, found "
                f"{np.abs(piece).max():g}; export with weights float32, int8 or int4"
            )
        yield piece.astype(dtype, copy=False)

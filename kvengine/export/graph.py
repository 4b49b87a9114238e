"""The ONNX graph of a decoder step. Weights are referred to, never read.

Inputs (B batch, S new tokens, R logits rows, C cache rows of that layer, P positions):
    input_ids int64 [B, S]; logits_index int64 [R], rows of the flattened [B * S] tokens;
    seqlens_k int32 [B], tokens cached after this step minus 1; total_sequence_length int32 [1];
    query_seqlens int32 [B], valid new tokens of each row (the rest of S is right padding);
    cos_cache.{r}, sin_cache.{r} [P, rotary_dim / 2] for each rotary table of the spec;
    past_key_values.{i}.key and .value [B, kv_heads, C, head_dim] (int4: uint8, head_dim / 2).
Outputs: logits float32 [R, vocab_size]; next_token int64 [R, 1]; present.{i}.key and .value.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper, numpy_helper

from kvengine.export.config import Architecture
from kvengine.export.store import Stored, StoredModel
from kvengine.plan import BITS, CacheDtype
from kvengine.recipe import ExportRecipe
from kvengine.sanity import IDENTITY, identity_of
from kvengine.spec import LayerSpec

# Per layer: scales of K and V, float32 [1, kv_heads, 1, head_dim].
CacheScales = Sequence[tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]]

MICROSOFT = "com.microsoft"
_GREEDY_BLOCK = 512
_GREEDY_BLOCK_MIN = 16
_OPSETS = (("", 21), (MICROSOFT, 1))
_IR_VERSION = 10
_CACHE_TYPES: dict[CacheDtype, int] = {
    "float32": TensorProto.FLOAT,
    "float16": TensorProto.FLOAT16,
    "int8": TensorProto.INT8,
    "int4": TensorProto.UINT8,
}


def build_graph(
    architecture: Architecture, recipe: ExportRecipe, weights: StoredModel, scales: CacheScales | None
) -> onnx.ModelProto:
    """The graph of one step; ``scales`` are needed for int8 and int4 caches only."""
    return GraphBuilder(architecture, recipe, weights, scales).build()


class GraphBuilder:
    """Builds the graph whose signature this module's docstring gives.

    What another signature changes is in the methods that a subclass (kvengine.export.genai) overrides:
    ``_lengths``, ``_rotary``, ``_new_tokens``, ``_asked_rows``, ``_product``, ``_outcome``, ``_inputs``
    and ``_outputs``.
    """

    def __init__(
        self,
        architecture: Architecture,
        recipe: ExportRecipe,
        weights: StoredModel,
        scales: CacheScales | None,
    ) -> None:
        self._architecture = architecture
        self._spec = architecture.spec
        self._family = architecture.family
        self._activation = architecture.activation
        self._recipe = recipe
        self._weights = weights
        self._scales = scales
        self._float = np.dtype(recipe.activations)
        self._float_type = helper.np_dtype_to_tensor_dtype(self._float)
        self._nodes: list[onnx.NodeProto] = []
        self._tensors: dict[str, onnx.TensorProto] = {}
        self._numbers = itertools.count()
        self._made: set[str] = set()  # values that several layers share
        self._scope = ""  # prefix of node names, so that a profile tells the layer

    def build(self) -> onnx.ModelProto:
        residual = self._embed()
        hidden = self._norm(residual, "layers.0.attention_norm")
        for i in range(len(self._spec.layers)):
            hidden, residual = self._layer(i, hidden, residual)
        self._head(hidden)
        graph = helper.make_graph(
            self._nodes, self._spec.family, self._inputs(), self._outputs(), list(self._tensors.values())
        )
        opsets = [helper.make_opsetid(domain, version) for domain, version in _OPSETS]
        model = helper.make_model(graph, opset_imports=opsets, ir_version=_IR_VERSION, producer_name="kvfarm")
        helper.set_model_props(model, {IDENTITY: identity_of(self._spec, self._recipe)})
        return model

    # Parts of the network.

    def _embed(self) -> str:
        table, columns = self._weights.table, self._spec.hidden_size
        if table.bits:
            rows = self._gather_quantized(table)
        else:
            rows = self._op("Gather", [self._tensor(table.tensors[0]), "input_ids"])
            rows = self._cast(rows, table.tensors[0].data_type, self._float_type)
        if self._family.scaled_embedding:
            rows = self._op("Mul", [rows, self._scalar("embedding.scale", math.sqrt(columns))])
        return rows

    def _gather_quantized(self, table: Stored) -> str:
        """Rows of the table; its codes are the head's bytes under a second, two-dimensional name."""
        codes, scales = table.tensors
        flat = onnx.TensorProto()
        flat.CopyFrom(codes)
        flat.name = "embedding.rows"
        del flat.dims[:]
        flat.dims.extend([codes.dims[0], codes.dims[1] * codes.dims[2]])
        rows = self._op(
            "GatherBlockQuantized",
            [self._tensor(flat), "input_ids", self._tensor(scales)],
            domain=MICROSOFT,
            bits=table.bits,
            block_size=self._recipe.block_size,
            gather_axis=0,
            quantize_axis=1,
        )
        if codes.dims[1] * self._recipe.block_size == table.columns:
            return rows
        bounds = [
            self._constant(name, np.array([value], np.int64))
            for name, value in (("zero", 0), ("hidden_size", table.columns), ("last_axis", -1))
        ]
        return self._op("Slice", [rows, *bounds])

    def _layer(self, i: int, hidden: str, residual: str) -> tuple[str, str]:
        """Normed and raw output of layer ``i``; the norm is the next layer's first."""
        at, last = f"layers.{i}.", i == len(self._spec.layers) - 1
        self._scope = at
        attended = self._attention(i, hidden)
        if last:
            # Nothing behind the last attention looks at other rows than those asked for.
            attended = self._asked_rows(attended, self._spec.num_heads * self._spec.layers[i].head_dim)
            residual = self._asked_rows(residual, self._spec.hidden_size)
        attended = self._linear(attended, at + "out")
        if self._family.sandwich:
            attended = self._norm(attended, at + "post_attention_norm")
        hidden, residual = self._add_and_norm(attended, residual, at + "mlp_norm")
        hidden = self._mlp(i, hidden)
        if self._family.sandwich:
            hidden = self._norm(hidden, at + "post_mlp_norm")
        following = "norm" if last else f"layers.{i + 1}.attention_norm"
        return self._add_and_norm(hidden, residual, following)

    def _attention(self, i: int, hidden: str) -> str:
        layer = self._spec.layers[i]
        queries, keys = self._spec.num_heads * layer.head_dim, layer.kv_heads * layer.head_dim
        qkv = self._linear(hidden, f"layers.{i}.qkv")
        inputs = [qkv, "", ""]
        if self._family.qk_norm:
            # Not GroupQueryAttention's own q_norm_weight: its CPU kernel does not honour it.
            query, key, value = self._split(qkv, [queries, keys, keys])
            query = self._head_norm(query, f"layers.{i}.q_norm", layer.head_dim)
            key = self._head_norm(key, f"layers.{i}.k_norm", layer.head_dim)
            inputs = [query, key, value]
        inputs += [f"past_key_values.{i}.key", f"past_key_values.{i}.value"]
        inputs += self._lengths()
        inputs += ["", ""] if layer.rope is None else self._rotary(layer.rope)
        inputs += ["", "", ""]  # position_ids, attention_bias, head_sink
        inputs += self._cache_scales(i)
        inputs += ["", "", self._new_tokens()]  # q_norm_weight, k_norm_weight
        output = f"layers.{i}.attention"
        self._nodes.append(
            helper.make_node(
                "GroupQueryAttention",
                inputs,
                [output, f"present.{i}.key", f"present.{i}.value"],
                name=output,
                domain=MICROSOFT,
                **self._attention_attributes(layer),
            )
        )
        return output

    def _attention_attributes(self, layer: LayerSpec) -> dict[str, Any]:
        cache = self._recipe.cache
        attributes: dict[str, Any] = {
            "num_heads": self._spec.num_heads,
            "kv_num_heads": layer.kv_heads,
            "do_rotary": int(layer.rope is not None),
            "scale": self._spec.attention_scale,
        }
        if self._architecture.softcap:
            attributes["softcap"] = self._architecture.softcap
        if layer.window is not None:
            attributes["local_window_size"] = layer.window
        if cache.is_windowed(layer):
            attributes["sliding_window_cache"] = 1
        if cache.dtype in ("int8", "int4"):
            attributes["k_quant_type"] = attributes["v_quant_type"] = "PER_CHANNEL"
            attributes["kv_cache_bit_width"] = BITS[cache.dtype]
        return attributes

    def _cache_scales(self, i: int) -> list[str]:
        if self._recipe.cache.dtype not in ("int8", "int4"):
            return ["", ""]
        assert self._scales is not None, "a quantized cache needs calibrated scales"
        names = (f"layers.{i}.key_scale", f"layers.{i}.value_scale")
        return [self._constant(name, scale) for name, scale in zip(names, self._scales[i], strict=True)]

    def _mlp(self, i: int, hidden: str) -> str:
        width = self._spec.intermediate_size
        gate, up = self._split(self._linear(hidden, f"layers.{i}.gate_up"), [width, width])
        return self._linear(self._op("Mul", [self._activate(gate), up]), f"layers.{i}.down")

    def _activate(self, gate: str) -> str:
        if self._activation == "silu":
            return self._op("Mul", [gate, self._op("Sigmoid", [gate])])
        approximate = "tanh" if self._activation == "gelu_tanh" else "none"
        return self._op("Gelu", [gate], approximate=approximate)

    def _head(self, hidden: str) -> None:
        self._scope = "head."
        head = self._weights.matrices["head"]
        if head.bits:
            logits = self._linear(hidden, "head")
        else:
            table = self._tensor(head.tensors[0])
            logits = self._product(hidden, self._cast(table, head.tensors[0].data_type, self._float_type))
        if self._architecture.logit_softcap:
            logits = self._softcapped(logits, self._architecture.logit_softcap)
        self._outcome(logits)

    def _product(self, hidden: str, table: str) -> str:
        """Logits by a table [vocab, hidden] as it lies: the embedding and a tied head share it."""
        return self._op("Gemm", [hidden, table], transB=1)

    def _outcome(self, logits: str) -> None:
        """From the head's logits to the graph's outputs."""
        if self._float == np.float32:
            self._nodes[-1].output[0] = "logits"
        else:
            self._op("Cast", [logits], to=TensorProto.FLOAT, output="logits")
        self._greedy()

    def _softcapped(self, x: str, cap: float) -> str:
        limit = self._scalar("logit_softcap", cap)
        return self._op("Mul", [self._op("Tanh", [self._op("Div", [x, limit])]), limit])

    def _greedy(self) -> None:
        """next_token: the first of the largest logits, as ArgMax has it.

        onnxruntime's ArgMax takes 0.28 ms for 262,144 logits, its ReduceMax a tenth of that: so
        find the block with the largest logit first, then look inside it.
        """
        vocabulary = self._spec.vocab_size
        width = min(vocabulary & -vocabulary, _GREEDY_BLOCK)  # largest power of two that divides it
        if width < _GREEDY_BLOCK_MIN:
            self._op("ArgMax", ["logits"], axis=-1, keepdims=1, output="next_token")
            return
        shape = self._constant("greedy_blocks", np.array([0, vocabulary // width, width], np.int64))
        blocks = self._op("Reshape", ["logits", shape])
        best = self._op(
            "ReduceMax", [blocks, self._constant("last_axis", np.array([-1], np.int64))], keepdims=0
        )
        block = self._op("ArgMax", [best], axis=-1, keepdims=1)
        inside = self._op("GatherND", [blocks, block], batch_dims=1)
        offset = self._op("ArgMax", [inside], axis=-1, keepdims=1)
        start = self._op("Mul", [block, self._constant("greedy_block", np.array(width, np.int64))])
        self._op("Add", [start, offset], output="next_token")

    # Building blocks.

    def _linear(self, x: str, name: str) -> str:
        matrix = self._weights.matrices[name]
        bias = (
            [] if matrix.bias is None else [self._constant(name + ".bias", matrix.bias.astype(self._float))]
        )
        tensors = [self._tensor(tensor) for tensor in matrix.tensors]
        if matrix.bits:
            return self._op(
                "MatMulNBits",
                [x, *tensors, *(["", "", *bias] if bias else [])],
                domain=MICROSOFT,
                K=matrix.columns,
                N=matrix.rows,
                bits=matrix.bits,
                block_size=self._recipe.block_size,
                accuracy_level=4,
            )
        weight = self._cast(tensors[0], matrix.tensors[0].data_type, self._float_type)
        product = self._op("MatMul", [x, weight])
        return self._op("Add", [product, *bias]) if bias else product

    def _norm(self, x: str, name: str) -> str:
        scale = self._constant(name, self._weights.vectors[name].astype(self._float))
        # An operator of onnxruntime that lives, for history's sake, in ONNX's own domain.
        return self._op(
            "SimplifiedLayerNormalization", [x, scale], axis=-1, epsilon=self._spec.norm_eps, stash_type=1
        )

    def _head_norm(self, x: str, name: str, head_dim: int) -> str:
        """RMS norm of each head of [B, S, heads * head_dim]."""
        split = self._constant(f"heads_of_{head_dim}", np.array([0, 0, -1, head_dim], np.int64))
        joined = self._constant("joined_heads", np.array([0, 0, -1], np.int64))
        return self._op("Reshape", [self._norm(self._op("Reshape", [x, split]), name), joined])

    def _add_and_norm(self, x: str, residual: str, name: str) -> tuple[str, str]:
        """(norm(x + residual), x + residual)."""
        scale = self._constant(name, self._weights.vectors[name].astype(self._float))
        normed, total = self._name("SkipNorm"), self._name("residual")
        self._nodes.append(
            helper.make_node(
                "SkipSimplifiedLayerNormalization",
                [x, residual, scale],
                [normed, "", "", total],
                name=normed,
                domain=MICROSOFT,
                epsilon=self._spec.norm_eps,
            )
        )
        return normed, total

    def _asked_rows(self, x: str, width: int) -> str:
        """[B, S, width] to the rows [R, width] that logits_index asks for."""
        flat = self._constant(f"rows_of_{width}", np.array([-1, width], np.int64))
        return self._op("Gather", [self._op("Reshape", [x, flat]), "logits_index"])

    def _split(self, x: str, widths: list[int]) -> list[str]:
        sizes = self._constant("split_" + "_".join(map(str, widths)), np.array(widths, np.int64))
        names = [self._name("Split") for _ in widths]
        self._nodes.append(helper.make_node("Split", [x, sizes], names, name=names[0], axis=-1))
        return names

    def _cast(self, x: str, found: int, wanted: int) -> str:
        return x if found == wanted else self._op("Cast", [x], to=wanted)

    def _op(
        self, kind: str, inputs: list[str], *, domain: str = "", output: str = "", **attributes: Any
    ) -> str:
        output = output or self._name(kind)
        self._nodes.append(helper.make_node(kind, inputs, [output], name=output, domain=domain, **attributes))
        return output

    def _name(self, kind: str) -> str:
        return f"{self._scope}{kind}.{next(self._numbers)}"

    def _tensor(self, tensor: onnx.TensorProto) -> str:
        self._tensors[tensor.name] = tensor
        return str(tensor.name)

    def _constant(self, name: str, value: npt.NDArray[Any]) -> str:
        if name not in self._tensors:
            self._tensors[name] = numpy_helper.from_array(value, name)
        return name

    def _scalar(self, name: str, value: float) -> str:
        return self._constant(name, np.array(value, self._float))

    # The graph's signature.

    def _lengths(self) -> list[str]:
        """GroupQueryAttention's seqlens_k and total_sequence_length."""
        return ["seqlens_k", "total_sequence_length"]

    def _rotary(self, rope: int) -> list[str]:
        """cos and sin of the rotary table ``rope``."""
        return [f"cos_cache.{rope}", f"sin_cache.{rope}"]

    def _new_tokens(self) -> str:
        return "query_seqlens"

    def _inputs(self) -> list[onnx.ValueInfoProto]:
        info = helper.make_tensor_value_info
        inputs = [
            info("input_ids", TensorProto.INT64, ["batch", "sequence"]),
            info("logits_index", TensorProto.INT64, ["logits_rows"]),
            info("seqlens_k", TensorProto.INT32, ["batch"]),
            info("total_sequence_length", TensorProto.INT32, [1]),
            info("query_seqlens", TensorProto.INT32, ["batch"]),
        ]
        for r in range(len(self._spec.ropes)):
            shape = ["positions", self._spec.rotary_dim(r) // 2]
            inputs += [info(f"{name}.{r}", self._float_type, shape) for name in ("cos_cache", "sin_cache")]
        return inputs + self._cache_infos("past_key_values.{}.{}", "past_rows.{}")

    def _outputs(self) -> list[onnx.ValueInfoProto]:
        info = helper.make_tensor_value_info
        return [
            info("logits", TensorProto.FLOAT, ["logits_rows", self._spec.vocab_size]),
            info("next_token", TensorProto.INT64, ["logits_rows", 1]),
            *self._cache_infos("present.{}.{}", "present_rows.{}"),
        ]

    def _cache_infos(self, name: str, rows: str) -> list[onnx.ValueInfoProto]:
        dtype = self._recipe.cache.dtype
        packing = 2 if dtype == "int4" else 1
        return [
            helper.make_tensor_value_info(
                name.format(i, part),
                _CACHE_TYPES[dtype],
                ["batch", layer.kv_heads, rows.format(i), layer.head_dim // packing],
            )
            for i, layer in enumerate(self._spec.layers)
            for part in ("key", "value")
        ]

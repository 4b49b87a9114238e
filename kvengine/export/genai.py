"""The same model for onnxruntime-genai: a second graph over the same weights, and genai_config.json.

Our graph cannot be fed by onnxruntime-genai: it takes rotary tables, the rows whose logits are wanted
and the lengths as inputs, and genai's decoders feed ``input_ids``, ``attention_mask`` and the cache.
So the artifact carries a second graph with that signature, some kilobytes of nodes; the weights are the
same bytes of the same file. The rotary tables are computed from constants: onnxruntime folds them when
it loads the graph, so neither the file nor a step grows.

Inputs: input_ids int64 [B, S]; attention_mask int64 [B, T]; past_key_values.{i}.key and .value.
Outputs: logits float32 [B, S, vocab_size]; present.{i}.key and .value.
"""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper

from kvengine.export.config import Architecture
from kvengine.export.graph import CacheScales, GraphBuilder
from kvengine.export.store import StoredModel
from kvengine.plan import CachePlan
from kvengine.recipe import ExportRecipe
from kvengine.rope import inverse_frequencies
from kvengine.spec import ModelSpec

GRAPH = "genai.onnx"
CONFIG = "genai_config.json"


def build_genai_graph(
    architecture: Architecture, recipe: ExportRecipe, weights: StoredModel, scales: CacheScales | None
) -> onnx.ModelProto:
    """As ``kvengine.export.graph.build_graph``, with onnxruntime-genai's signature."""
    return _GenaiBuilder(architecture, recipe, weights, scales).build()


def genai_config(spec: ModelSpec, cache: CachePlan) -> str:
    """genai_config.json for GRAPH.

    The model's type is genai's plain ``decoder``: its ``phi3`` would recompute the cache at 4,097 tokens.
    Greedy by default, as kvfarm is.
    """
    layer = spec.layers[0]
    decoder: dict[str, Any] = {
        "filename": GRAPH,
        "head_size": layer.head_dim,
        "hidden_size": spec.hidden_size,
        "num_attention_heads": spec.num_heads,
        "num_hidden_layers": len(spec.layers),
        "num_key_value_heads": layer.kv_heads,
        "session_options": {"log_id": "onnxruntime-genai", "provider_options": []},
        "inputs": {
            "input_ids": "input_ids",
            "attention_mask": "attention_mask",
            "past_key_names": "past_key_values.%d.key",
            "past_value_names": "past_key_values.%d.value",
        },
        "outputs": {
            "logits": "logits",
            "present_key_names": "present.%d.key",
            "present_value_names": "present.%d.value",
        },
    }
    windowed = [i for i, each in enumerate(spec.layers) if cache.is_windowed(each)]
    if windowed:
        decoder["sliding_window"] = {
            "window_size": spec.layers[windowed[0]].window,
            "cache_slack": cache.slack,
            "layers": windowed,
            "slide_inputs": False,
            "slide_key_value_cache": False,
        }
    ends = list(spec.eos_tokens)
    config = {
        "model": {
            "type": "decoder",
            "context_length": spec.max_position,
            "vocab_size": spec.vocab_size,
            "bos_token_id": 0,
            "eos_token_id": ends,
            "pad_token_id": ends[0] if ends else 0,
            "decoder": decoder,
        },
        "search": {
            "do_sample": False,
            "max_length": spec.max_position,
            "past_present_share_buffer": cache.kind != "growing",
        },
    }
    return json.dumps(config, indent=1, sort_keys=True) + "\n"


class _GenaiBuilder(GraphBuilder):
    def _lengths(self) -> list[str]:
        """From the attention mask: its ones less one, and its width."""
        if "genai.total" not in self._made:
            axis = self._constant("genai.axis", np.array([1], np.int64))
            one = self._constant("genai.one", np.array(1, np.int64))
            ones = self._op("ReduceSum", ["attention_mask", axis], keepdims=0)
            self._op("Cast", [self._op("Sub", [ones, one])], to=TensorProto.INT32, output="genai.lengths")
            width = self._op("Gather", [self._op("Shape", ["attention_mask"]), axis])
            self._op("Cast", [width], to=TensorProto.INT32, output="genai.total")
            self._made.add("genai.total")
        return ["genai.lengths", "genai.total"]

    def _rotary(self, rope: int) -> list[str]:
        """cos and sin [max_position, rotary_dim / 2] from constants alone."""
        names = [f"cos_cache.{rope}", f"sin_cache.{rope}"]
        if names[0] not in self._made:
            spec = self._spec
            zero = self._constant("genai.first", np.array(0, np.float32))
            one = self._constant("genai.step", np.array(1, np.float32))
            end = self._constant("genai.positions", np.array(spec.max_position, np.float32))
            column = self._constant("genai.column", np.array([-1, 1], np.int64))
            each = inverse_frequencies(spec.ropes[rope], spec.head_dim_of(rope))
            frequencies = self._constant(f"genai.frequencies.{rope}", each[None])
            magnitude = self._constant(
                f"genai.magnitude.{rope}", np.array(spec.ropes[rope].magnitude, np.float32)
            )
            positions = self._op("Reshape", [self._op("Range", [zero, end, one]), column])
            angles = self._op("Mul", [positions, frequencies])
            for name, kind in zip(names, ("Cos", "Sin"), strict=True):
                table = self._op("Mul", [self._op(kind, [angles]), magnitude])
                self._op("Cast", [table], to=self._float_type, output=name)
            self._made.add(names[0])
        return names

    def _new_tokens(self) -> str:
        return ""

    def _asked_rows(self, x: str, width: int) -> str:
        return x  # genai takes the last row itself

    def _product(self, hidden: str, table: str) -> str:
        """Gemm takes matrices only, and here are [B, S, hidden]."""
        width = self._constant("genai.width", np.array([-1, self._spec.hidden_size], np.int64))
        flat = super()._product(self._op("Reshape", [hidden, width]), table)
        lead = self._op("Shape", ["input_ids"])
        size = self._constant("genai.vocabulary", np.array([self._spec.vocab_size], np.int64))
        return self._op("Reshape", [flat, self._op("Concat", [lead, size], axis=0)])

    def _outcome(self, logits: str) -> None:
        self._op("Cast", [logits], to=TensorProto.FLOAT, output="logits")

    def _inputs(self) -> list[onnx.ValueInfoProto]:
        info = helper.make_tensor_value_info
        return [
            info("input_ids", TensorProto.INT64, ["batch", "sequence"]),
            info("attention_mask", TensorProto.INT64, ["batch", "total"]),
            *self._cache_infos("past_key_values.{}.{}", "past_rows.{}"),
        ]

    def _outputs(self) -> list[onnx.ValueInfoProto]:
        shape = ["batch", "sequence", self._spec.vocab_size]
        return [
            helper.make_tensor_value_info("logits", TensorProto.FLOAT, shape),
            *self._cache_infos("present.{}.{}", "present_rows.{}"),
        ]

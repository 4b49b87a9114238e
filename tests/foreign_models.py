"""Small decoders in the conventions of other people's exporters, of a checkpoint made here.

``checkpoint`` writes a Mistral (a Llama with an optional sliding window); ``decomposed`` exports it as
optimum does, ``scattering`` with opset 24's TensorScatter and Attention. ``Twist`` names what is to be
exported wrongly.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper, numpy_helper
from safetensors.numpy import load_file, save_file

from kvengine.plan import BITS, CacheDtype

Twist = Literal["", "window", "positions", "heads", "theta"]
LAYERS, HEADS, KV_HEADS, HEAD_DIM, HIDDEN, VOCABULARY, THETA = 2, 4, 2, 16, 48, 67, 100.0
WINDOW = 5


def checkpoint(folder: Path, window: int | None = None) -> Path:
    """A Hugging Face folder: float32 weights with peaked attention (scores of std 3)."""
    folder.mkdir(parents=True)
    config = {
        "architectures": ["MistralForCausalLM"],
        "model_type": "mistral",
        "dtype": "float32",
        "vocab_size": VOCABULARY,
        "hidden_size": HIDDEN,
        "intermediate_size": 64,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": HEAD_DIM,
        "hidden_act": "silu",
        "max_position_embeddings": 128,
        "sliding_window": window,
        "rms_norm_eps": 1e-6,
        "rope_parameters": {"rope_type": "default", "rope_theta": THETA},
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    (folder / "config.json").write_text(json.dumps(config))
    rng = np.random.default_rng(7)

    def draw(rows: int, columns: int, gain: float = 1.0) -> npt.NDArray[np.float32]:
        found: npt.NDArray[np.float32] = rng.standard_normal((rows, columns)).astype(np.float32)
        return found * np.float32(gain / columns**0.5)

    tensors = {"model.embed_tokens.weight": draw(VOCABULARY, HIDDEN, HIDDEN**0.5)}
    for layer in range(LAYERS):
        at = f"model.layers.{layer}."
        tensors |= {
            at + "self_attn.q_proj.weight": draw(HEADS * HEAD_DIM, HIDDEN, 3**0.5),
            at + "self_attn.k_proj.weight": draw(KV_HEADS * HEAD_DIM, HIDDEN, 3**0.5),
            at + "self_attn.v_proj.weight": draw(KV_HEADS * HEAD_DIM, HIDDEN, 2),
            at + "self_attn.o_proj.weight": draw(HIDDEN, HEADS * HEAD_DIM),
            at + "mlp.gate_proj.weight": draw(64, HIDDEN),
            at + "mlp.up_proj.weight": draw(64, HIDDEN),
            at + "mlp.down_proj.weight": draw(HIDDEN, 64),
            at + "input_layernorm.weight": np.ones(HIDDEN, np.float32),
            at + "post_attention_layernorm.weight": np.ones(HIDDEN, np.float32),
        }
    tensors |= {"model.norm.weight": np.ones(HIDDEN, np.float32), "lm_head.weight": draw(VOCABULARY, HIDDEN)}
    save_file(tensors, str(folder / "model.safetensors"), metadata={"format": "pt"})
    return folder


@dataclass
class Graph:
    """Nodes and initializers as they are added; values go by their names."""

    nodes: list[onnx.NodeProto] = field(default_factory=list)
    tensors: dict[str, onnx.TensorProto] = field(default_factory=dict)
    inputs: list[onnx.ValueInfoProto] = field(default_factory=list)
    outputs: list[onnx.ValueInfoProto] = field(default_factory=list)

    def op(self, kind: str, *inputs: str, name: str = "", **attributes: Any) -> str:
        output = name or f"{kind.lower()}_{len(self.nodes)}"
        self.nodes.append(helper.make_node(kind, list(inputs), [output], **attributes))
        return output

    def const(self, value: Any, dtype: Any = np.int64, name: str = "") -> str:
        name = name or f"const_{len(self.tensors)}"
        self.tensors[name] = numpy_helper.from_array(np.asarray(value, dtype), name)
        return name

    def input(self, name: str, shape: list[int | str], dtype: int = TensorProto.INT64) -> str:
        self.inputs.append(helper.make_tensor_value_info(name, dtype, shape))
        return name

    def output(self, name: str, shape: list[int | str], dtype: int = TensorProto.FLOAT) -> None:
        self.outputs.append(helper.make_tensor_value_info(name, dtype, shape))

    def size(self, value: str, axis: int) -> str:
        """int64 [1]"""
        return self.op("Shape", value, start=axis, end=axis + 1)

    def arange(self, start: str, count: str) -> str:
        """int64 [count], both given as [1]"""
        first, many = (self.op("Squeeze", v, self.const([0])) for v in (start, count))
        return self.op("Range", first, self.op("Add", first, many), self.const(1))

    def save(self, path: Path, producer: str, opset: int) -> Path:
        graph = helper.make_graph(
            self.nodes, "main_graph", self.inputs, self.outputs, list(self.tensors.values())
        )
        model = helper.make_model(
            graph, producer_name=producer, opset_imports=[helper.make_opsetid("", opset)], ir_version=10
        )
        path.parent.mkdir(parents=True, exist_ok=True)
        onnx.save(model, path)
        return path


# (graph, layer, q [b, heads, s, d], k, v [b, kv, s, d]) -> attended [b, heads, s, d]
_Attend = Callable[[Graph, int, str, str, str], str]


def by_operator(path: Path, cache: CacheDtype = "float32") -> Path:
    """The interface of a decoder of onnxruntime-genai's builder: GroupQueryAttention, head_dim not said.

    Where ``cache`` is quantized K has a scale for each channel (1, 2, ...) and V one for all (0.5).
    """
    graph = Graph()
    graph.input("input_ids", ["batch", "sequence"])
    x = graph.const([[[0.0] * HEAD_DIM]], "float32")
    graph.input("lengths", ["batch"], TensorProto.INT32)
    graph.input("total", [], TensorProto.INT32)
    quantized = cache in ("int8", "int4")
    width: int | str = (HEAD_DIM // 2 if cache == "int4" else HEAD_DIM) if quantized else "kv_cache_dim"
    element = {"int8": TensorProto.INT8, "int4": TensorProto.UINT8}.get(cache, TensorProto.FLOAT)
    shape: list[int | str] = ["batch", KV_HEADS, "past_sequence_length", width]
    pasts = [graph.input(f"past_key_values.0.{half}", shape, element) for half in ("key", "value")]
    inputs, more = [x, x, x, *pasts, "lengths", "total"], {}
    if quantized:
        channels = np.arange(1, 1 + KV_HEADS * HEAD_DIM).reshape(1, KV_HEADS, 1, HEAD_DIM)
        inputs += [""] * 5
        inputs += [
            graph.const(channels, np.float32, "key_scale"),
            graph.const([0.5], np.float32, "value_scale"),
        ]
        more = {
            "k_quant_type": "PER_CHANNEL",
            "v_quant_type": "PER_TENSOR",
            "kv_cache_bit_width": BITS[cache],
        }
    outputs = ["attended", "present.0.key", "present.0.value"]
    node = helper.make_node(
        "GroupQueryAttention",
        inputs,
        outputs,
        domain="com.microsoft",
        num_heads=4,
        kv_num_heads=KV_HEADS,
        local_window_size=WINDOW,
        **more,
    )
    graph.nodes.append(node)
    graph.op("Identity", "attended", name="logits")
    for name in outputs[1:]:
        graph.output(name, shape, element)
    graph.output("logits", ["batch", "sequence", VOCABULARY])
    return graph.save(path, "onnxruntime-genai", 21)


def decomposed(
    source: Path,
    path: Path,
    *,
    position_ids: bool = True,
    twist: Twist = "",
    rename: Callable[[str], str] = str,
    last_row: bool = False,
    layout: str = "bnsh",
) -> Path:
    """As optimum exports for text-generation-with-past: growing cache, attention in small operators.

    Without ``position_ids`` positions are counted along attention_mask. last_row: logits of the last
    token only. layout: axes of the cache tensors (batch, KV heads, sequence, head_dim).
    """
    graph, window = Graph(), _window(source, twist)
    ids = graph.input("input_ids", ["batch_size", "sequence_length"])
    mask = graph.input("attention_mask", ["batch_size", "past_sequence_length + sequence_length"])
    new, total = graph.size(ids, 1), graph.size(mask, 1)
    past = graph.op("Sub", total, new)
    if position_ids:
        positions = graph.input("position_ids", ["batch_size", "sequence_length"])
    else:
        counted = graph.op("Sub", graph.op("CumSum", mask, graph.const(1)), graph.const(1))
        positions = graph.op("Slice", counted, past, total, graph.const([1]))
    queries = graph.op("Unsqueeze", graph.arange(past, new), graph.const([1]))
    keys = graph.arange(graph.const([0]), total)
    seen = _visible(graph, queries, keys, window)
    bias = graph.op("Where", seen, graph.const(0.0, np.float32), graph.const(-np.inf, np.float32))

    def attend(g: Graph, layer: int, q: str, k: str, v: str) -> str:
        merged = []
        for half, fresh in (("key", k), ("value", v)):
            sizes: dict[str, int | str] = {"b": "batch_size", "n": KV_HEADS, "h": HEAD_DIM}
            past, present = (
                [(sizes | {"s": rows})[axis] for axis in layout]
                for rows in ("past_sequence_length", "past_sequence_length + sequence_length")
            )
            name = g.input(rename(f"past_key_values.{layer}.{half}"), past, TensorProto.FLOAT)
            g.output(rename(f"present.{layer}.{half}"), present)
            own = g.op("Transpose", fresh, perm=["bnsh".index(axis) for axis in layout])
            axis = layout.index("s") - 4
            whole = g.op("Concat", name, own, name=rename(f"present.{layer}.{half}"), axis=axis)
            merged.append(g.op("Transpose", whole, perm=[layout.index(axis) for axis in "bnsh"]))
        wide = [_repeat(g, half, twist) for half in merged]
        scores = g.op("MatMul", q, g.op("Transpose", wide[0], perm=[0, 1, 3, 2]))
        scaled = g.op("Add", g.op("Mul", scores, g.const(HEAD_DIM**-0.5, np.float32)), bias)
        return g.op("MatMul", g.op("Softmax", scaled, axis=-1), wide[1])

    _decoder(graph, source, ids, positions, attend, twist, last_row)
    return graph.save(path, "pytorch", 18)


def scattering(
    source: Path, path: Path, *, rows: int | None = None, circular: bool | None = None, twist: Twist = ""
) -> Path:
    """TensorScatter and Attention of opset 24: a static cache, or with ``rows`` a ring of so many.

    The static one leaves causality to Attention (is_causal, nonpad_kv_seqlen), the ring masks by itself.
    circular: False for a static cache with ``rows``.
    """
    circular = rows is not None if circular is None else circular
    graph, window = Graph(), _window(source, twist)
    ids = graph.input("input_ids", ["batch", "sequence"])
    start = graph.input("write_indices", ["batch"])
    new = graph.size(ids, 1)
    steps = graph.arange(graph.const([0]), new)
    positions = graph.op("Add", graph.op("Unsqueeze", start, graph.const([1])), steps)
    queries = graph.op("Unsqueeze", positions, graph.const([2]))  # [b, s, 1]
    valid = seen = ""
    if not circular or rows is None:
        valid = graph.input("nonpad_kv_seqlen", ["batch"])
    else:
        # Slot j holds the newest position that is j modulo rows: last - (last - j) mod rows.
        last = graph.op("Sub", graph.op("Add", start, new), graph.const(1))
        column = graph.op("Unsqueeze", last, graph.const([1]))
        back = graph.op("Mod", graph.op("Sub", column, graph.const(np.arange(rows))), graph.const(rows))
        held = graph.op("Sub", column, back)  # [b, rows]; negative: nothing yet
        keys = graph.op("Unsqueeze", held, graph.const([1]))
        known = graph.op("GreaterOrEqual", keys, graph.const(0))
        seen = graph.op("And", known, _visible(graph, queries, keys, window))
        seen = graph.op("Unsqueeze", seen, graph.const([1]))  # [b, 1, s, rows]

    def attend(g: Graph, layer: int, q: str, k: str, v: str) -> str:
        merged = []
        for half, fresh in (("key", k), ("value", v)):
            shape: list[int | str] = ["batch", KV_HEADS, rows or "max_sequence_length", HEAD_DIM]
            past = g.input(f"past_key_values.{layer}.{half}", shape, TensorProto.FLOAT)
            g.output(f"present.{layer}.{half}", shape)
            mode = "circular" if circular else "linear"
            name = f"present.{layer}.{half}"
            merged.append(g.op("TensorScatter", past, fresh, start, name=name, axis=-2, mode=mode))
        extra = ["", "", "", valid] if valid else [seen]
        return g.op("Attention", q, *merged, *extra, is_causal=int(bool(valid)))

    _decoder(graph, source, ids, positions, attend, twist)
    return graph.save(path, "", 24)


def _window(source: Path, twist: Twist) -> int | None:
    window: int | None = json.loads((source / "config.json").read_text())["sliding_window"]
    return window + 1 if twist == "window" and window is not None else window


def _visible(graph: Graph, queries: str, keys: str, window: int | None) -> str:
    """Causal, and within the window: bool, broadcast of both."""
    seen = graph.op("LessOrEqual", keys, queries)
    if window is None:
        return seen
    near = graph.op("Greater", keys, graph.op("Sub", queries, graph.const(window)))
    return graph.op("And", seen, near)


def _repeat(graph: Graph, half: str, twist: Twist) -> str:
    """[b, kv, t, d] to [b, heads, t, d]: each KV head for a group of neighbours (repeat_interleave)."""
    groups = HEADS // KV_HEADS
    order = [i % KV_HEADS for i in range(HEADS)] if twist == "heads" else [i // groups for i in range(HEADS)]
    return graph.op("Gather", half, graph.const(order), axis=1)


def _decoder(
    graph: Graph,
    source: Path,
    ids: str,
    positions: str,
    attend: _Attend,
    twist: Twist,
    last_row: bool = False,
) -> None:
    """Everything around the attention; adds the output ``logits``."""
    weights = load_file(str(source / "model.safetensors"))

    def linear(x: str, name: str) -> str:
        return graph.op("MatMul", x, graph.const(weights[name].T, np.float32, name))

    def norm(x: str, name: str) -> str:
        mean = graph.op("ReduceMean", graph.op("Mul", x, x), graph.const([-1]))
        root = graph.op("Sqrt", graph.op("Add", mean, graph.const(1e-6, np.float32)))
        return graph.op("Mul", graph.op("Div", x, root), graph.const(weights[name], np.float32, name))

    theta = THETA * 3 if twist == "theta" else THETA
    frequency = theta ** (-np.arange(0, HEAD_DIM, 2, dtype=np.float32) / HEAD_DIM)
    if twist == "positions":  # from the second step on one too few
        positions = graph.op("Max", graph.op("Sub", positions, graph.const(1)), graph.const(0))
    angles = graph.op(
        "Mul",
        graph.op("Unsqueeze", graph.op("Cast", positions, to=TensorProto.FLOAT), graph.const([1, 3])),
        graph.const(frequency, np.float32),
    )
    cos, sin = graph.op("Cos", angles), graph.op("Sin", angles)

    def rotate(x: str) -> str:
        left, right = (
            graph.op("Slice", x, graph.const([a]), graph.const([b]), graph.const([3]))
            for a, b in ((0, HEAD_DIM // 2), (HEAD_DIM // 2, HEAD_DIM))
        )
        first = graph.op("Sub", graph.op("Mul", left, cos), graph.op("Mul", right, sin))
        second = graph.op("Add", graph.op("Mul", right, cos), graph.op("Mul", left, sin))
        return graph.op("Concat", first, second, axis=3)

    def heads(x: str, count: int) -> str:
        split = graph.op("Reshape", x, graph.const([0, 0, count, HEAD_DIM]))
        return graph.op("Transpose", split, perm=[0, 2, 1, 3])

    x = graph.op("Gather", graph.const(weights["model.embed_tokens.weight"], np.float32, "embedding"), ids)
    for layer in range(LAYERS):
        at = f"model.layers.{layer}."
        h = norm(x, at + "input_layernorm.weight")
        q = rotate(heads(linear(h, at + "self_attn.q_proj.weight"), HEADS))
        k = rotate(heads(linear(h, at + "self_attn.k_proj.weight"), KV_HEADS))
        v = heads(linear(h, at + "self_attn.v_proj.weight"), KV_HEADS)
        attended = graph.op("Transpose", attend(graph, layer, q, k, v), perm=[0, 2, 1, 3])
        flat = graph.op("Reshape", attended, graph.const([0, 0, HEADS * HEAD_DIM]))
        x = graph.op("Add", x, linear(flat, at + "self_attn.o_proj.weight"))
        h = norm(x, at + "post_attention_layernorm.weight")
        gate = linear(h, at + "mlp.gate_proj.weight")
        up = linear(h, at + "mlp.up_proj.weight")
        gated = graph.op("Mul", graph.op("Mul", gate, graph.op("Sigmoid", gate)), up)
        x = graph.op("Add", x, linear(gated, at + "mlp.down_proj.weight"))
    if last_row:
        x = graph.op("Slice", x, graph.const([-1]), graph.const([2**31]), graph.const([1]))
    h = norm(x, "model.norm.weight")
    graph.op("MatMul", h, graph.const(weights["lm_head.weight"].T, np.float32, "lm_head"), name="logits")
    graph.output("logits", ["batch", 1 if last_row else "tokens", VOCABULARY])

"""The cache of a foreign graph: which inputs it is, how it is laid out, and who writes it how."""

from __future__ import annotations

import re
import typing

import onnx

from kvengine.contract import CacheElement, LayerContract, LayerKind, Layout
from kvengine.export.foreign.asking import Asking, listed
from kvengine.export.foreign.wiring import Carried, Value, attribute, text_attribute

_LAYOUT_OF_AXIS: dict[int | None, Layout] = {1: "bsnh", 2: "bnsh", 3: "bnhs"}
_CACHE: dict[int, CacheElement] = {
    onnx.TensorProto.FLOAT: "float32",
    onnx.TensorProto.FLOAT16: "float16",
    onnx.TensorProto.INT8: "int8",
    onnx.TensorProto.UINT8: "int4",  # two elements a byte
}
_PAIR_NAMES = [
    ("past_key_values", "present"),
    ("past_key_values", "present_key_values"),
    ("past_key", "present_key"),
    ("past_value", "present_value"),
    ("past", "present"),
]


class Caches:
    """Infers every layer's contract. ``carried``: the pairs of past and present."""

    def __init__(self, asking: Asking) -> None:
        self._asking = asking
        self.carried = self._carried()
        self._alone = all(one.alone for one in self.carried)
        self.layers = self._layers(self.carried)

    @property
    def batch(self) -> int | None:
        """The batch size, where the graph fixes it."""
        fixed = {
            c.past.dims[0] for c in self.carried if isinstance(c.past.dims[0], int) and c.past.dims[0] > 0
        }
        return fixed.pop() if len(fixed) == 1 else None

    def _carried(self) -> list[Carried]:
        """Every past with its present: by the operator between them, else by what both are called."""
        wiring = self._asking.wiring
        found = {}
        for output in wiring.outputs.values():
            one = wiring.carried(output)
            if one is not None and one.past.name not in found and len(one.past.dims) == len(output.dims) == 4:
                found[one.past.name] = one
        for past in wiring.inputs.values():
            if past.name in found or past.element not in _CACHE or len(past.dims) < 3:
                continue
            named = self._asking.answers.get(f"pair.{past.name}")
            present = wiring.outputs.get(named) if named else self._namesake(past.name)
            if present is None:
                if f"input.{past.name}" not in self._asking.answers and _looks_like_cache(past.name):
                    self._asking.ask(
                        f"pair.{past.name}", f"{past.name} looks like cache; no output carries it on"
                    )
                continue
            if len(past.dims) != 4 or len(present.dims) != 4:
                raise self._asking.unsupported(
                    f"cache {past.name} of {len(past.dims)} axes; kvfarm drives caches of four, "
                    "batch and heads apart"
                )
            node = onnx.NodeProto(op_type=wiring.maker(present.name))
            found[past.name] = Carried(past, present, node, "", None, False)
        if not found and not self._asking.questions:
            raise self._asking.unsupported(
                f"sought inputs that come out again as KV cache, found none among "
                f"{listed(wiring.inputs.values())}; export it with cache (optimum: text-generation-with-past)"
            )
        return list(found.values())

    def _namesake(self, past: str) -> Value | None:
        for prefix, other in _PAIR_NAMES:
            if past.startswith(prefix) and (
                value := self._asking.wiring.outputs.get(other + past[len(prefix) :])
            ):
                return value
        return None

    def _layers(self, carried: list[Carried]) -> list[LayerContract | None]:
        halves: dict[int, dict[str, Carried]] = {}
        for one in carried:
            place = _place(one.past.name, one.half)
            if place is None:
                raise self._asking.unsupported(
                    f"sought a cache input named by one layer number and key or value, as "
                    f"past_key_values.0.key is, found {one.past.name!r}; rename it"
                )
            layer, half = place
            if half in halves.setdefault(layer, {}):
                raise self._asking.unsupported(
                    f"layer {layer} has two {half} caches, {halves[layer][half].past.name} and "
                    f"{one.past.name}; encoder-decoder models are not driven"
                )
            halves[layer][half] = one
        found = []
        for layer, pair in sorted(halves.items()):
            if len(pair) != 2:
                raise self._asking.unsupported(
                    f"layer {layer} has only a {next(iter(pair))} cache; sought key and value"
                )
            found.append(self._layer(pair["key"], pair["value"]))
        return found

    def _layer(self, key: Carried, value: Carried) -> LayerContract | None:
        kinds = self._kind(key), self._kind(value)
        layouts = self._layout(key), self._layout(value)
        shapes = key.past.dims, value.past.dims
        if kinds[0] != kinds[1] or layouts[0] != layouts[1] or key.past.element != value.past.element:
            raise self._asking.unsupported(
                f"{key.past.name} and {value.past.name} differ: {kinds}, {layouts}, element types "
                f"{key.past.element} and {value.past.element}; sought layers whose key and value are alike"
            )
        dtype = self._dtype(key)
        kind, layout = kinds[0], layouts[0]
        if kind is None or layout is None:
            return None
        sizes = [dict(zip(layout, dims, strict=True)) for dims in shapes]
        heads = self._size(key, "past.heads", sizes[0]["n"], self._asking.genai.kv_heads, "n")
        head_dim = self._size(key, "past.head_dim", sizes[0]["h"], self._asking.genai.head_dim, "h")
        rows = sizes[0]["s"] if isinstance(sizes[0]["s"], int) and sizes[0]["s"] > 0 else None
        if kind == "growing":
            rows = None
        window = self._window(key, kind)
        ring = kind == "windowed" and key.node.op_type == "TensorScatter"
        if ring and rows is None:
            rows = self._asking.number(
                "past.rows", f"{key.past.name} is a ring of {sizes[0]['s'] or 'no'} rows"
            )
        if ring and window is None:
            window = self._asking.number(
                "past.window", f"{key.past.name} is a ring; the attention over it masks, which says no number"
            )
        if dtype == "int4" and head_dim and head_dim == sizes[0]["h"]:
            head_dim *= 2  # the graph counts bytes, genai_config.json and --set elements
        if not heads or not head_dim or (ring and not (rows and window)):
            return None
        if ring and rows and window and not window <= rows:
            raise self._asking.unsupported(f"a window of {window} in a ring of {rows} rows; sought no less")
        return LayerContract(
            key.past.name, value.past.name, key.present.name, value.present.name,
            layout, heads, head_dim, dtype, kind, key.node.op_type, rows, window,
            shared=kind != "growing" and key.alone and value.alone,
            skips_dead_rows=key.node.op_type == "GroupQueryAttention",
        )  # fmt: skip

    def _dtype(self, one: Carried) -> CacheElement:
        """Quantized elements only of GroupQueryAttention, where what they stand for is known: see scales."""
        dtype = _CACHE.get(one.past.element)
        if dtype is None:
            name = onnx.TensorProto.DataType.Name(one.past.element)
            raise self._asking.unsupported(f"cache {one.past.name} of {name}; sought {list(_CACHE.values())}")
        if dtype in ("int8", "int4") and one.node.op_type != "GroupQueryAttention":
            raise self._asking.unsupported(
                f"cache {one.past.name} is of {dtype} and written by {one.node.op_type}: its scales are not "
                "known; kvfarm drives quantized caches of GroupQueryAttention only"
            )
        if dtype == "int4" and attribute(one.node, "kv_cache_bit_width", 0) != 4:
            raise self._asking.unsupported(
                f"cache {one.past.name} is of UINT8 and its operator's kv_cache_bit_width is not 4; sought "
                "two int4 elements a byte"
            )
        return dtype

    def _kind(self, one: Carried) -> LayerKind | None:
        answer = self._asking.answers.get("past.kind")
        match one.node.op_type:
            case "Concat" | "Attention":
                return "growing"
            case "TensorScatter":
                return "windowed" if text_attribute(one.node, "mode", "linear") == "circular" else "static"
            case "GroupQueryAttention":
                if attribute(one.node, "sliding_window_cache", 0):
                    return "windowed"
                # The operator takes both; where lengths come from past's shape, only a growing one.
                shared = answer == "static" or (answer is None and self._asking.genai.shared is not False)
                return "static" if shared and self._alone else "growing"
            case "ScatterND" | "ScatterElements" | "Scatter":
                return "static"
        if answer is None:
            self._asking.ask(
                "past.kind", f"{one.present.name} is made by {one.node.op_type}, not by a known cache writer"
            )
        return typing.cast("LayerKind | None", answer)

    def _layout(self, one: Carried) -> Layout | None:
        if one.axis is not None:
            if one.axis not in _LAYOUT_OF_AXIS:
                raise self._asking.unsupported(
                    f"{one.past.name} grows along its batch axis ({one.node.op_type}, axis 0)"
                )
            return _LAYOUT_OF_AXIS[one.axis]
        answer = self._asking.answers.get("past.layout")
        if answer is None:
            self._asking.ask(
                "past.layout", f"{one.node.op_type} writes {one.present.name}; it does not tell the axes"
            )
        return typing.cast("Layout | None", answer)

    def _window(self, one: Carried, kind: LayerKind) -> int | None:
        if one.node.op_type == "GroupQueryAttention":
            window = attribute(one.node, "local_window_size", -1)
            if kind == "windowed" and window < 1:
                raise self._asking.unsupported("sliding_window_cache without a local_window_size")
            return window if window > 0 else None
        answer = self._asking.answers.get("past.window")
        return int(answer) if answer and kind == "windowed" else None

    def _size(self, one: Carried, key: str, dim: int | str, stated: int | None, axis: str) -> int | None:
        """Of one axis: the graph's, else genai_config.json's, else asked for."""
        if isinstance(dim, int) and dim > 0:
            return dim
        if axis == "n" and one.node.op_type == "GroupQueryAttention":
            return attribute(one.node, "kv_num_heads", 0) or None
        if key not in self._asking.answers and stated is not None:
            self._asking.note(f"{key} {stated} is what genai_config.json says")
            return stated
        return self._asking.number(key, f"{one.past.name} says {dim!r} for it, not a number")


def _place(name: str, half: str) -> tuple[int, str] | None:
    """(layer, "key" or "value") as a name tells them."""
    rest = re.sub(r"past_key_values?|past_kv|cache_kv|key_values?", "", name)
    numbers = re.findall(r"\d+", rest)
    if "encoder" in rest and "decoder" not in rest:
        return None
    if not half:
        words = set(re.split(r"[^a-z]+", rest.lower()))
        told = {"key" for w in words if w in ("k", "key", "keys")} | {
            "value" for w in words if w in ("v", "value", "values")
        }
        half = told.pop() if len(told) == 1 else ""
    if len(numbers) != 1 or len(numbers[0]) > 5 or not half:
        return None
    return int(numbers[0]), half


def _looks_like_cache(name: str) -> bool:
    return bool(re.search(r"past|cache|(^|[._])(key|value)s?([._\d]|$)", name))

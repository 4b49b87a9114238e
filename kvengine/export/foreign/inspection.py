"""Infer a foreign graph's cache contract; what the graph does not say becomes a question, not a guess."""

from __future__ import annotations

import re
import typing
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import onnx

from kvengine.contract import (
    CacheElement,
    Contract,
    InputContract,
    InputElement,
    LayerContract,
    LayerKind,
    Layout,
    Role,
)
from kvengine.errors import ContractIncomplete, RecipeError, UnsupportedModel
from kvengine.export.foreign.genai import GenaiConfig, read_genai_config
from kvengine.export.foreign.reading import ModelFile, read_model
from kvengine.export.foreign.wiring import Carried, Use, Value, Wiring, attribute, text_attribute

_LAYOUT_OF_AXIS: dict[int | None, Layout] = {1: "bsnh", 2: "bnsh", 3: "bnhs"}
_CACHE: dict[int, CacheElement] = {
    onnx.TensorProto.FLOAT: "float32",
    onnx.TensorProto.FLOAT16: "float16",
    onnx.TensorProto.INT8: "int8",
}
_INPUT: dict[int, InputElement] = {
    onnx.TensorProto.INT64: "int64",
    onnx.TensorProto.INT32: "int32",
    onnx.TensorProto.BOOL: "bool",
    onnx.TensorProto.FLOAT: "float32",
    onnx.TensorProto.FLOAT16: "float16",
}
# What exporters call these inputs, where the graph itself does not tell.
_NAMES: dict[str, Role] = {
    "input_ids": "input_ids",
    "attention_mask": "attention_mask",
    "position_ids": "position_ids",
    "cache_position": "cache_position",
    "write_indices": "write_indices",
    "past_sequence_length": "past_length",
    "seqlens_k": "seqlens_k",
    "nonpad_kv_seqlen": "valid_lengths",
    "total_sequence_length": "total_length",
    "query_seqlens": "new_lengths",
}
# What the operators' documentation says of these inputs: (operator, slot) -> role.
_SLOTS: dict[tuple[str, int], Role] = {
    ("GroupQueryAttention", 5): "seqlens_k",
    ("GroupQueryAttention", 6): "total_length",
    ("GroupQueryAttention", 9): "position_ids",
    ("TensorScatter", 2): "write_indices",
    ("Attention", 6): "valid_lengths",
}
# Ranks a role can be fed at.
_RANKS: dict[Role, tuple[int, ...]] = {
    "input_ids": (2,),
    "attention_mask": (2,),
    "padded_mask": (2,),
    "position_ids": (2,),
    "cache_position": (1,),
    "write_indices": (1, 2),
    "past_length": (0, 1, 2),
    "seqlens_k": (1, 2),
    "valid_lengths": (1, 2),
    "total_length": (0, 1),
    "new_lengths": (1, 2),
}
_PAIR_NAMES = [
    ("past_key_values", "present"),
    ("past_key_values", "present_key_values"),
    ("past_key", "present_key"),
    ("past_value", "present_value"),
    ("past", "present"),
]
OPTIONS = {
    "past.layout": "axes of the cache: bnsh, bsnh or bnhs (batch, KV heads, sequence, head_dim)",
    "past.kind": "growing or static",
    "past.heads": "KV heads",
    "past.head_dim": "elements of one head",
    "past.rows": "rows of a static cache whose writer is not known",
    "past.window": "tokens a query sees, itself included",
    "logits": "name of the output with the logits",
    "input.NAME": f"what input NAME is: {', '.join(typing.get_args(Role))}",
    "pair.NAME": "name of the output that carries the cache input NAME on",
}


@dataclass(frozen=True)
class Question:
    """What has to be said with ``--set KEY=VALUE``, and why the graph does not say it."""

    key: str
    why: str


@dataclass(frozen=True)
class Inspection:
    """What a model file says. ``contract`` is None as long as there are questions."""

    file: ModelFile
    contract: Contract | None
    questions: tuple[Question, ...]
    found: tuple[LayerContract | None, ...]  # the layers already clear, for people
    weights: Literal["float32", "float16", "int8", "int4"]

    def complete(self) -> Contract:
        """Raises ContractIncomplete, naming every option that is needed."""
        if self.contract is None:
            asked = "\n".join(f"  --set {q.key}=…   {q.why}" for q in self.questions)
            raise ContractIncomplete(f"{self.file.path} does not say all that driving it needs:\n{asked}")
        return self.contract


def inspect_model(path: Path, answers: Mapping[str, str] | None = None) -> Inspection:
    """Read ``path`` and infer its contract. ``answers``: see OPTIONS; they win over what is inferred.

    Raises:
        InvalidModel: the file is damaged or hostile (see read_model).
        UnsupportedModel: a graph of a kind that kvfarm cannot drive.
        RecipeError: an answer to what nobody asks, or of no meaning.
    """
    file = read_model(path)
    genai = read_genai_config(path)
    try:
        return _Inference(file, genai, dict(answers or {})).run()
    except UnicodeDecodeError as error:
        from kvengine.errors import InvalidModel

        raise InvalidModel(f"{path}: a name in it is not UTF-8: {error}") from error


class _Inference:
    def __init__(self, file: ModelFile, genai: GenaiConfig | None, answers: dict[str, str]) -> None:
        self._file = file
        self._graph = file.proto.graph
        self._wiring = Wiring(self._graph)
        self._genai = genai or GenaiConfig()
        self._has_genai = genai is not None
        self._answers = answers
        self._questions: dict[str, str] = {}
        self._notes: list[str] = []
        _check_answers(answers, self._wiring)

    def run(self) -> Inspection:
        carried = self._carried()
        layers = self._layers(carried)
        pasts = {c.past.name for c in carried}
        presents = {c.present.name for c in carried}
        rest = [v for v in self._wiring.inputs.values() if v.name not in pasts]
        inputs = [self._input(value, layers) for value in rest]
        logits = self._logits([v for v in self._wiring.outputs.values() if v.name not in presents])
        if not any(entry and entry.role == "input_ids" for entry in inputs) and not self._questions:
            raise UnsupportedModel(f"{self._file.path}: sought an input of token ids, found {_list(rest)}")
        contract = None
        if not self._questions and logits is not None:
            contract = Contract(
                convention=self._convention(),
                inputs=tuple(entry for entry in inputs if entry is not None),
                layers=tuple(layer for layer in layers if layer is not None),
                logits=logits.name,
                logits_rows="last" if len(logits.dims) == 3 and logits.dims[1] == 1 else "all",
                vocab_size=logits.dims[-1] if logits.dims and isinstance(logits.dims[-1], int) else None,
                batch=self._batch(carried),
                notes=tuple(self._notes),
            )
        questions = tuple(Question(key, why) for key, why in self._questions.items())
        return Inspection(self._file, contract, questions, tuple(layers), _weights(self._graph))

    # -- the cache ----------------------------------------------------------------------------------

    def _carried(self) -> list[Carried]:
        """Every past with its present: by the operator between them, else by what both are called."""
        wiring = self._wiring
        found = {}
        for output in wiring.outputs.values():
            one = wiring.carried(output)
            if one is not None and one.past.name not in found and len(one.past.dims) == len(output.dims) == 4:
                found[one.past.name] = one
        for past in wiring.inputs.values():
            if past.name in found or past.element not in _CACHE or len(past.dims) < 3:
                continue
            named = self._answers.get(f"pair.{past.name}")
            present = wiring.outputs.get(named) if named else self._namesake(past.name)
            if present is None:
                if f"input.{past.name}" not in self._answers and _looks_like_cache(past.name):
                    self._ask(f"pair.{past.name}", f"{past.name} looks like cache; no output carries it on")
                continue
            if len(past.dims) != 4 or len(present.dims) != 4:
                raise UnsupportedModel(
                    f"{self._file.path}: cache {past.name} of {len(past.dims)} axes; kvfarm drives caches of four, "
                    "batch and heads apart"
                )
            node = onnx.NodeProto(op_type=wiring.maker(present.name))
            found[past.name] = Carried(past, present, node, "", None, False)
        if not found and not self._questions:
            raise UnsupportedModel(
                f"{self._file.path}: sought inputs that come out again as KV cache, found none among "
                f"{_list(wiring.inputs.values())}; export it with cache (optimum: --task text-generation-with-past)"
            )
        return list(found.values())

    def _namesake(self, past: str) -> Value | None:
        for prefix, other in _PAIR_NAMES:
            if past.startswith(prefix) and (value := self._wiring.outputs.get(other + past[len(prefix) :])):
                return value
        return None

    def _layers(self, carried: list[Carried]) -> list[LayerContract | None]:
        halves: dict[int, dict[str, Carried]] = {}
        for one in carried:
            place = _place(one.past.name, one.half)
            if place is None:
                raise UnsupportedModel(
                    f"{self._file.path}: sought a cache input named by one layer number and key or value, as "
                    f"past_key_values.0.key is, found {one.past.name!r}; rename it"
                )
            layer, half = place
            if half in halves.setdefault(layer, {}):
                raise UnsupportedModel(
                    f"{self._file.path}: layer {layer} has two {half} caches, {halves[layer][half].past.name} and "
                    f"{one.past.name}; encoder-decoder models are not driven"
                )
            halves[layer][half] = one
        found = []
        for layer, pair in sorted(halves.items()):
            if len(pair) != 2:
                raise UnsupportedModel(
                    f"{self._file.path}: layer {layer} has only a {next(iter(pair))} cache; sought key and value"
                )
            found.append(self._layer(pair["key"], pair["value"]))
        return found

    def _layer(self, key: Carried, value: Carried) -> LayerContract | None:
        kinds = self._kind(key), self._kind(value)
        layouts = self._layout(key), self._layout(value)
        shapes = key.past.dims, value.past.dims
        if kinds[0] != kinds[1] or layouts[0] != layouts[1] or key.past.element != value.past.element:
            raise UnsupportedModel(
                f"{self._file.path}: {key.past.name} and {value.past.name} differ: {kinds}, {layouts}, element types "
                f"{key.past.element} and {value.past.element}; kvfarm drives layers whose key and value are alike"
            )
        if key.past.element not in _CACHE:
            name = onnx.TensorProto.DataType.Name(key.past.element)
            raise UnsupportedModel(
                f"{self._file.path}: cache {key.past.name} of {name}; sought {list(_CACHE.values())}"
            )
        kind, layout = kinds[0], layouts[0]
        if kind is None or layout is None:
            return None
        sizes = [dict(zip(layout, dims, strict=True)) for dims in shapes]
        heads = self._size(key, "past.heads", sizes[0]["n"], self._genai.kv_heads, "n")
        head_dim = self._size(key, "past.head_dim", sizes[0]["h"], self._genai.head_dim, "h")
        rows = sizes[0]["s"] if isinstance(sizes[0]["s"], int) and sizes[0]["s"] > 0 else None
        if kind == "growing":
            rows = None
        window = self._window(key, kind)
        ring = kind == "windowed" and key.node.op_type == "TensorScatter"
        if ring and rows is None:
            rows = self._answered("past.rows", f"{key.past.name} is a ring of {sizes[0]['s'] or 'no'} rows")
        if ring and window is None:
            window = self._answered(
                "past.window", f"{key.past.name} is a ring; the attention over it masks, which says no number"
            )
        if not heads or not head_dim or (ring and not (rows and window)):
            return None
        if ring and rows and window and not window <= rows:
            raise UnsupportedModel(
                f"{self._file.path}: a window of {window} in a ring of {rows} rows; sought no less"
            )
        return LayerContract(
            key.past.name, value.past.name, key.present.name, value.present.name,
            layout, heads, head_dim, _CACHE[key.past.element], kind, key.node.op_type, rows, window,
            shared=kind != "growing" and key.alone and value.alone,
            skips_dead_rows=key.node.op_type == "GroupQueryAttention",
        )  # fmt: skip

    def _kind(self, one: Carried) -> LayerKind | None:
        answer = self._answers.get("past.kind")
        match one.node.op_type:
            case "Concat" | "Attention":
                return "growing"
            case "TensorScatter":
                return "windowed" if text_attribute(one.node, "mode", "linear") == "circular" else "static"
            case "GroupQueryAttention":
                if attribute(one.node, "sliding_window_cache", 0):
                    return "windowed"
                if answer is None and one.alone and self._genai.shared is not False:
                    return "static"
                # The operator takes a growing cache as well; where lengths come from past's shape, only that.
                return "static" if answer == "static" and one.alone else "growing"
            case "ScatterND" | "ScatterElements" | "Scatter":
                return "static"
        if answer is None:
            self._ask(
                "past.kind", f"{one.present.name} is made by {one.node.op_type}, not by a known cache writer"
            )
        return typing.cast("LayerKind | None", answer)

    def _layout(self, one: Carried) -> Layout | None:
        if one.axis is not None:
            if one.axis not in _LAYOUT_OF_AXIS:
                raise UnsupportedModel(
                    f"{self._file.path}: {one.past.name} grows along its batch axis ({one.node.op_type}, axis 0)"
                )
            return _LAYOUT_OF_AXIS[one.axis]
        answer = self._answers.get("past.layout")
        if answer is None:
            self._ask(
                "past.layout", f"{one.node.op_type} writes {one.present.name}; it does not tell the axes"
            )
        return typing.cast("Layout | None", answer)

    def _window(self, one: Carried, kind: LayerKind) -> int | None:
        if one.node.op_type == "GroupQueryAttention":
            window = attribute(one.node, "local_window_size", -1)
            if kind == "windowed" and window < 1:
                raise UnsupportedModel(f"{self._file.path}: sliding_window_cache without a local_window_size")
            return window if window > 0 else None
        answer = self._answers.get("past.window")
        return int(answer) if answer and kind == "windowed" else None

    def _size(self, one: Carried, key: str, dim: int | str, stated: int | None, axis: str) -> int | None:
        """Of one axis: the graph's, else genai_config.json's, else asked for."""
        if isinstance(dim, int) and dim > 0:
            return dim
        if axis == "n" and one.node.op_type == "GroupQueryAttention":
            return attribute(one.node, "kv_num_heads", 0) or None
        if key not in self._answers and stated is not None:
            note = f"{key} {stated} is what genai_config.json says"
            if note not in self._notes:
                self._notes.append(note)
            return stated
        return self._answered(key, f"{one.past.name} says {dim!r} for it, not a number")

    def _answered(self, key: str, why: str) -> int | None:
        if key in self._answers:
            return int(self._answers[key])
        self._ask(key, why)
        return None

    # -- the other inputs and outputs ---------------------------------------------------------------

    def _input(self, value: Value, layers: list[LayerContract | None]) -> InputContract | None:
        role = self._role(value)
        if role is None:
            return None
        if value.element not in _INPUT:
            raise UnsupportedModel(f"{self._file.path}: input {value.name} has element type {value.element}")
        rows: int | None = None
        rank = len(value.dims)
        if role in ("attention_mask", "padded_mask") and rank == 2:
            role, rows = self._mask(value, layers)
        if role == "valid_lengths":
            rows = self._ring_rows(self._wiring.uses(value.name), layers)
        if rank not in _RANKS[role]:
            raise UnsupportedModel(
                f"{self._file.path}: input {value.name} is {role} of {rank} axes {list(value.dims)}; kvfarm feeds it "
                f"with {' or '.join(map(str, _RANKS[role]))}"
            )
        return InputContract(value.name, role, _INPUT[value.element], rank, rows)

    def _role(self, value: Value) -> Role | None:
        answer = self._answers.get(f"input.{value.name}") or self._genai.roles.get(value.name)
        if answer is not None:
            return typing.cast(Role, answer)
        uses = self._wiring.uses(value.name)
        told = {_SLOTS[key] for use in uses if (key := (use.node.op_type, use.slot)) in _SLOTS}
        named = _NAMES.get(value.name)
        if len(told) == 1:
            return told.pop()
        if named is not None and not told:
            return named
        where = ", ".join(sorted({use.node.op_type for use in uses})) or "nothing"
        self._ask(
            f"input.{value.name}", f"input {value.name} {list(value.dims)} is used by {where}; what is it?"
        )
        return None

    def _mask(self, value: Value, layers: list[LayerContract | None]) -> tuple[Role, int | None]:
        """[batch, total] or padded to the cache's rows: told by its declared width."""
        width = value.dims[1]
        if isinstance(width, int) and width > 0:
            return "padded_mask", width
        static = [la for la in layers if la is not None and la.kind == "static"]
        symbols = {
            dim
            for la in static
            for dim in self._wiring.inputs[la.past_key].dims
            if isinstance(dim, str) and dim
        }
        return ("padded_mask" if width in symbols else "attention_mask"), None

    def _ring_rows(self, uses: Iterable[Use], layers: list[LayerContract | None]) -> int | None:
        """Valid rows are counted up to the ring's size where the attention is over rings alone."""
        rings = {la.present_key: la.rows for la in layers if la is not None and la.kind == "windowed"}
        rows = [rings.get(use.node.input[1]) for use in uses if use.node.op_type == "Attention"]
        return rows[0] if rows and None not in rows and len(set(rows)) == 1 else None

    def _logits(self, rest: list[Value]) -> Value | None:
        name = self._answers.get("logits") or self._genai.logits
        named = [v for v in rest if v.name == (name or "logits")]
        if not named:
            self._ask(
                "logits", f"no output is called {name or 'logits'!r}; there are {_list(rest) or 'no others'}"
            )
            return None
        value = named[0]
        if len(value.dims) not in (0, 3) or value.element not in (
            onnx.TensorProto.FLOAT,
            onnx.TensorProto.FLOAT16,
        ):
            raise UnsupportedModel(
                f"{self._file.path}: sought logits as float [batch, tokens, vocabulary], found {value.name} "
                f"{list(value.dims)} of element type {value.element}"
            )
        return value

    def _batch(self, carried: list[Carried]) -> int | None:
        fixed = {c.past.dims[0] for c in carried if isinstance(c.past.dims[0], int) and c.past.dims[0] > 0}
        return fixed.pop() if len(fixed) == 1 else None

    def _convention(self) -> str:
        if self._has_genai:
            return "onnxruntime-genai (genai_config.json)"
        writers = {node.op_type for node in self._graph.node}
        if "TensorScatter" in writers:
            return "TensorScatter (ONNX opset 24)"
        if "GroupQueryAttention" in writers:
            return "GroupQueryAttention"
        producer = self._file.proto.producer_name
        return f"decomposed attention, made by {producer!r}" if producer else "decomposed attention"

    def _ask(self, key: str, why: str) -> None:
        self._questions.setdefault(key, why)


def _check_answers(answers: Mapping[str, str], wiring: Wiring) -> None:
    choices: dict[str, tuple[str, ...]] = {
        "past.layout": typing.get_args(Layout),
        "past.kind": ("growing", "static"),
        "logits": tuple(wiring.outputs),
    }
    for key, value in answers.items():
        group, _, name = key.partition(".")
        if group in ("input", "pair") and name:
            if name not in wiring.inputs:
                raise RecipeError(
                    f"--set {key}: the model has no input {name!r}; it has {_list(wiring.inputs.values())}"
                )
            allowed = typing.get_args(Role) if group == "input" else tuple(wiring.outputs)
        elif key in OPTIONS and key not in choices:
            if not (value.isascii() and value.isdigit() and 0 < int(value) < 1 << 24):
                raise RecipeError(f"--set {key}={value}: sought a whole number of at least 1")
            continue
        elif key in choices:
            allowed = choices[key]
        else:
            raise RecipeError(f"--set {key}: unknown; there are {', '.join(OPTIONS)}")
        if value not in allowed:
            raise RecipeError(f"--set {key}={value}: sought one of {', '.join(allowed)}")


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
    return bool(re.search(r"past|cache|(^|[._])(key|value)s?([._\d]|$)", name)) and name not in _NAMES


def _weights(graph: onnx.GraphProto) -> Literal["float32", "float16", "int8", "int4"]:
    """The coarsest storage among the graph's matrices."""
    bits = {
        attribute(node, "bits", 4)
        for node in graph.node
        if node.op_type in ("MatMulNBits", "GatherBlockQuantized")
    }
    if bits:
        return "int4" if min(bits) <= 4 else "int8"
    if {node.op_type for node in graph.node} & {"DequantizeLinear", "MatMulInteger", "DynamicQuantizeMatMul"}:
        return "int8"
    halves = any(t.data_type == onnx.TensorProto.FLOAT16 and len(t.dims) > 1 for t in graph.initializer)
    return "float16" if halves else "float32"


def _list(values: Iterable[Any]) -> str:
    return ", ".join(value.name for value in values)

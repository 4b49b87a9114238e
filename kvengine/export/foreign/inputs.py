"""What a foreign graph is fed beside its cache, and where its logits are."""

from __future__ import annotations

import typing
from collections.abc import Iterable, Sequence

import onnx

from kvengine.contract import InputContract, InputElement, LayerContract, Role
from kvengine.export.foreign.asking import Asking, listed
from kvengine.export.foreign.wiring import Use, Value

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


class Inputs:
    """Infers what an input that is no cache is fed, and which output the logits are."""

    def __init__(self, asking: Asking, layers: Sequence[LayerContract | None]) -> None:
        self._asking = asking
        self._layers = layers

    def entry(self, value: Value) -> InputContract | None:
        role = self._role(value)
        if role is None:
            return None
        if value.element not in _INPUT:
            raise self._asking.unsupported(f"input {value.name} has element type {value.element}")
        rows: int | None = None
        rank = len(value.dims)
        if role in ("attention_mask", "padded_mask") and rank == 2:
            role, rows = self._mask(value)
        if role == "valid_lengths":
            rows = self._ring_rows(self._asking.wiring.uses(value.name))
        if rank not in _RANKS[role]:
            raise self._asking.unsupported(
                f"input {value.name} is {role} of {rank} axes {list(value.dims)}; kvfarm feeds it "
                f"with {' or '.join(map(str, _RANKS[role]))}"
            )
        return InputContract(value.name, role, _INPUT[value.element], rank, rows)

    def _role(self, value: Value) -> Role | None:
        answer = self._asking.answers.get(f"input.{value.name}") or self._asking.genai.roles.get(value.name)
        if answer is not None:
            return typing.cast(Role, answer)
        uses = self._asking.wiring.uses(value.name)
        told = {_SLOTS[key] for use in uses if (key := (use.node.op_type, use.slot)) in _SLOTS}
        named = _NAMES.get(value.name)
        if len(told) == 1:
            return told.pop()
        if named is not None and not told:
            return named
        where = ", ".join(sorted({use.node.op_type for use in uses})) or "nothing"
        self._asking.ask(
            f"input.{value.name}", f"input {value.name} {list(value.dims)} is used by {where}; what is it?"
        )
        return None

    def _mask(self, value: Value) -> tuple[Role, int | None]:
        """[batch, total] or padded to the cache's rows: told by its declared width."""
        width = value.dims[1]
        if isinstance(width, int) and width > 0:
            return "padded_mask", width
        static = [la for la in self._layers if la is not None and la.kind == "static"]
        symbols = {
            dim
            for la in static
            for dim in self._asking.wiring.inputs[la.past_key].dims
            if isinstance(dim, str) and dim
        }
        return ("padded_mask" if width in symbols else "attention_mask"), None

    def _ring_rows(self, uses: Iterable[Use]) -> int | None:
        """Valid rows are counted up to the ring's size where the attention is over rings alone."""
        rings = {la.present_key: la.rows for la in self._layers if la is not None and la.kind == "windowed"}
        rows = [rings.get(use.node.input[1]) for use in uses if use.node.op_type == "Attention"]
        return rows[0] if rows and None not in rows and len(set(rows)) == 1 else None

    def logits(self, rest: list[Value]) -> Value | None:
        name = self._asking.answers.get("logits") or self._asking.genai.logits
        named = [v for v in rest if v.name == (name or "logits")]
        if not named:
            self._asking.ask(
                "logits", f"no output is called {name or 'logits'!r}; there are {listed(rest) or 'no others'}"
            )
            return None
        value = named[0]
        if len(value.dims) not in (0, 3) or value.element not in (
            onnx.TensorProto.FLOAT,
            onnx.TensorProto.FLOAT16,
        ):
            raise self._asking.unsupported(
                f"sought logits as float [batch, tokens, vocabulary], found {value.name} "
                f"{list(value.dims)} of element type {value.element}"
            )
        return value

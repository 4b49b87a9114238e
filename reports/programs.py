"""A program's JSON as lines that a person reads, operation by operation.

The JSON may come from an older or newer suite, so what is not understood is shown as it is.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from reports.results import Divergence


@dataclass(frozen=True)
class TokenView:
    """One token id; ``differs`` marks the step where the device left the reference."""

    id: str
    differs: bool = False


@dataclass(frozen=True)
class OperationView:
    """One line: number, kind, what it does, the tokens it appends."""

    index: int
    kind: str
    text: str
    tokens: tuple[TokenView, ...]
    differs: bool


@dataclass(frozen=True)
class ProgramView:
    """``operations`` is empty where the program could not be read; ``raw`` is always the JSON."""

    setting: str
    operations: tuple[OperationView, ...]
    raw: str


def program_view(text: str, divergence: Divergence | None) -> ProgramView:
    """Never raises: a program that cannot be read leaves only ``raw``."""
    try:
        program = json.loads(text)
        operations = tuple(
            _operation(index, operation, divergence) for index, operation in enumerate(program["operations"])
        )
        setting = _setting(program)
    except (ValueError, KeyError, TypeError, AttributeError):
        return ProgramView(setting="", operations=(), raw=text)
    return ProgramView(setting=setting, operations=operations, raw=text)


def _setting(program: dict[str, Any]) -> str:
    slack = program.get("slack")
    rows = "the artifact's slack" if slack is None else f"slack {slack}"
    batch = program.get("batch", 1)
    each = "" if batch == 1 else f" for each of {batch} rows"
    return f"A fresh decoder with capacity {program['capacity']} tokens{each}, {rows}"


def _operation(index: int, operation: dict[str, Any], divergence: Divergence | None) -> OperationView:
    differs = divergence is not None and divergence.operation == index
    row = divergence.row if divergence is not None and differs and _one_row_a_token(operation) else -1
    tokens = tuple(TokenView(str(t), i == row) for i, t in enumerate(operation.get("tokens", ())))
    kind = str(operation["kind"])
    text = _describe(kind, operation)
    if operation.get("row"):
        text = f"row {operation['row']}: {text}"
    return OperationView(index, kind, text, tokens, differs)


def _one_row_a_token(operation: dict[str, Any]) -> bool:
    return operation["kind"] == "decode" or operation.get("logits") == "all"


def _describe(kind: str, operation: dict[str, Any]) -> str:
    count = len(operation.get("tokens", ()))
    tokens = f"{count} token" if count == 1 else f"{count} tokens"
    if kind == "prefill":
        chunk = operation.get("chunk")
        steps = f"in chunks of {chunk}" if chunk else "in one shot"
        asked = "logits of every token" if operation.get("logits") == "all" else "logits of the last token"
        return f"append {tokens} {steps}, {asked}"
    if kind == "decode":
        return f"append {tokens}, one step each"
    if kind == "generate":
        return f"append token {operation.get('token')}, then {operation.get('count')} greedy tokens"
    if kind == "rewind":
        return f"drop the newest {operation.get('count')} tokens"
    if kind == "reset" and operation.get("row") is not None:
        return "forget the row, which leaves the batch"
    if kind in _PATTERNS:
        return _PATTERNS[kind].format(**operation)
    if kind in _NAMED:
        return _NAMED[kind].format(operation.get("name"))
    if kind in _PLAIN:
        return _PLAIN[kind]
    return json.dumps({k: v for k, v in operation.items() if k not in ("kind", "tokens")})


_PATTERNS = {
    "speculate": "append token {token}, then {count} greedy tokens by prompt lookup, at most {draft} at once",
    "extend": "append to several rows at once, chunk {chunk} (0: as few steps as can be)",
    "reuse": "hold exactly these tokens: keep the common prefix, run the rest",
    "compact": "drop all but the newest {keep} tokens and the first {sinks}",
    "reorder": "beam reorder: rows become what rows {order} were",
    "damage": "damage the file of slot {name} at byte {at}",
    "read_cache": "read the cache of layer {layer}",
}
_NAMED = {
    "fork": "copy the state under the name {}",
    "switch": "go on in the state {}",
    "save": "write the state to slot {}",
    "load": "replace the state by slot {}",
}
_PLAIN = {
    "reset": "forget everything, keep the buffers",
    "poison": "fill every dead cache row with NaN",
}

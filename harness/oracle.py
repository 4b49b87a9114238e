"""What a correct engine must observe: positions and refusals by rule, logits by the reference."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from harness.reference.protocol import Reference
from kvengine.program import (
    Decode,
    Generate,
    Observation,
    Operation,
    Poison,
    Prefill,
    Program,
    ReadCache,
    Reset,
)
from kvengine.spec import ModelSpec

Float32Array = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Expected:
    """One operation's right answer.

    start: position before the operation. rows: float32 [n, vocab], the reference's logits for the
    rows the engine returns. choices: for Generate, the reference's logits [count, vocab] that each
    greedy token must be an argmax of. refusal: class name in kvengine.errors, "" for none.
    """

    start: int
    position: int
    rows: Float32Array
    choices: Float32Array
    refusal: str = ""


def expectations(
    program: Program, observations: Sequence[Observation], reference: Reference, spec: ModelSpec
) -> list[Expected]:
    """One Expected per operation.

    ``observations`` are needed only for the tokens that Generate chose: those are in the cache
    afterwards, also where two logits tie and the engine picked the other one.
    """
    spans, sequences = _walk(program, observations, spec)
    # Attention is causal: one forward of a whole sequence holds the logits of every operation on it.
    logits = [reference.logits(sequence) if sequence else None for sequence in sequences]
    nothing = np.empty((0, spec.vocab_size), np.float32)
    expected = []
    for operation, span in zip(program.operations, spans, strict=True):
        rows = choices = nothing
        whole = logits[span.sequence]
        if whole is not None and span.end > span.start:
            rows = whole[span.start : span.end]
            if isinstance(operation, Generate):
                rows, choices = nothing, rows
            elif isinstance(operation, Prefill) and operation.logits == "last":
                rows = rows[-1:]
        expected.append(Expected(span.start, span.end, rows, choices, span.refusal))
    return expected


@dataclass(frozen=True)
class _Span:
    """Positions before and after one operation, and in which of the program's sequences they are."""

    start: int
    end: int
    sequence: int
    refusal: str = ""


def _walk(
    program: Program, observations: Sequence[Observation], spec: ModelSpec
) -> tuple[list[_Span], list[tuple[int, ...]]]:
    """Every operation's span, and the token sequences between resets."""
    spans: list[_Span] = []
    sequences: list[tuple[int, ...]] = [()]
    for operation, observation in zip(program.operations, observations, strict=True):
        start = len(sequences[-1])
        refusal = _refusal(operation, start, program.capacity, spec.vocab_size)
        if isinstance(operation, Reset):
            sequences.append(())
            start = 0
        elif not refusal:
            sequences[-1] += _appended(operation, observation)
        spans.append(_Span(start, len(sequences[-1]), len(sequences) - 1, refusal))
    return spans, sequences


def _appended(operation: Operation, observation: Observation) -> tuple[int, ...]:
    match operation:
        case Prefill() | Decode():
            return operation.tokens
        case Generate():
            return (operation.token, *observation.tokens[: operation.count - 1])
        case _:
            return ()


def _refusal(operation: Operation, start: int, capacity: int, vocabulary: int) -> str:
    """The order in which the engine checks: emptiness, token ids, then room."""
    match operation:
        case Prefill() | Decode():
            tokens: tuple[int, ...] = operation.tokens
        case Generate():
            tokens = (operation.token,) * operation.count
        case Reset() | Poison() | ReadCache():
            return ""
        case _:
            return "NotSupported"
    if not tokens:
        return "EmptyPrompt"
    if any(not 0 <= token < vocabulary for token in tokens):
        return "InvalidToken"
    return "ContextOverflow" if start + len(tokens) > capacity else ""

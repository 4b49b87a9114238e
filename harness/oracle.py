"""What a correct engine must observe: positions and refusals by rule, logits by the reference."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from harness.reference.protocol import Reference
from kvengine.program import Decode, Generate, Observation, Operation, Poison, Prefill, Program, Reset
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
) -> Iterator[Expected]:
    """One Expected per operation, in order.

    ``observations`` are needed only for the tokens that Generate chose: those are in the cache
    afterwards, also where two logits tie and the engine picked the other one.
    """
    sequence: tuple[int, ...] = ()
    nothing = np.empty((0, spec.vocab_size), np.float32)
    for operation, observation in zip(program.operations, observations, strict=True):
        start = len(sequence)
        refusal = _refusal(operation, start, program.capacity, spec.vocab_size)
        if refusal:
            yield Expected(start, start, nothing, nothing, refusal)
            continue
        match operation:
            case Prefill() | Decode():
                sequence += operation.tokens
                rows = reference.logits(sequence)[start:]
                if isinstance(operation, Prefill) and operation.logits == "last":
                    rows = rows[-1:]
                yield Expected(start, len(sequence), rows, nothing)
            case Generate():
                sequence += (operation.token, *observation.tokens[: operation.count - 1])
                yield Expected(start, start + operation.count, nothing, reference.logits(sequence)[start:])
            case Reset():
                sequence = ()
                yield Expected(start, 0, nothing, nothing)
            case Poison():
                yield Expected(start, start, nothing, nothing)
            case _:
                yield Expected(start, start, nothing, nothing, "NotSupported")


def _refusal(operation: Operation, start: int, capacity: int, vocabulary: int) -> str:
    """The order in which the engine checks: emptiness, token ids, then room."""
    match operation:
        case Prefill() | Decode():
            tokens: tuple[int, ...] = operation.tokens
        case Generate():
            tokens = (operation.token,) * operation.count
        case _:
            return ""
    if not tokens:
        return "EmptyPrompt"
    if any(not 0 <= token < vocabulary for token in tokens):
        return "InvalidToken"
    return "ContextOverflow" if start + len(tokens) > capacity else ""

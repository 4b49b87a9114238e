"""What a correct engine must observe: positions and refusals by rule, logits by the reference."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from harness.reference.protocol import Hidden, Reference
from harness.rules import Refused, Rules, Span
from kvengine.plan import CachePlan
from kvengine.program import Generate, Observation, Operation, Prefill, Program, ReadCache, Speculate
from kvengine.spec import ModelSpec

Float32Array = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Expected:
    """One operation's right answer.

    positions: tokens in each batch row afterwards. rows: float32 [n, vocab], the reference's logits
    for the rows the engine returns; places: [n], the index of each row's token in its batch row.
    choices: for Generate and Speculate, the reference's logits [count, vocab] that each greedy token
    must be an argmax of. refusal: class name in kvengine.errors, "" for none. cached: for ReadCache,
    the positions it must find.
    """

    positions: tuple[int, ...]
    rows: Float32Array
    places: tuple[int, ...]
    choices: Float32Array
    refusal: str = ""
    cached: tuple[int, ...] = ()


def expectations(
    program: Program,
    observations: Sequence[Observation],
    reference: Reference,
    spec: ModelSpec,
    plan: CachePlan,
) -> list[Expected]:
    """One Expected per operation of ``program`` on a model with cache ``plan``.

    ``observations`` are needed only for the tokens that the engine chose: those are in the cache
    afterwards, also where two logits tie and the engine picked the other one.
    """
    rules = Rules(program, spec, plan)
    followed = [_follow(rules, *pair) for pair in zip(program.operations, observations, strict=True)]
    logits = _Logits(reference, [span for step in followed for span in step.spans], spec.vocab_size)
    return [
        step.expected(operation, logits) for step, operation in zip(followed, program.operations, strict=True)
    ]


@dataclass(frozen=True)
class _Step:
    """What the rules say of one operation."""

    spans: list[Span]
    positions: tuple[int, ...]
    refusal: str
    cached: tuple[int, ...]

    def expected(self, operation: Operation, logits: _Logits) -> Expected:
        rows, choices = logits.of(self.spans), logits.nothing
        places = tuple(place for span in self.spans for place in range(span.start, span.row.held))
        if isinstance(operation, Generate | Speculate):
            rows, choices, places = logits.nothing, rows, ()
        elif isinstance(operation, Prefill) and operation.logits == "last":
            rows, places = rows[-1:], places[-1:]
        return Expected(self.positions, rows, places, choices, self.refusal, self.cached)


def _follow(rules: Rules, operation: Operation, observation: Observation) -> _Step:
    spans: list[Span] = []
    refusal = ""
    cached: tuple[int, ...] = ()
    try:
        spans = rules.do(operation, observation.tokens)
        if isinstance(operation, ReadCache):
            cached = rules.positions(operation)
    except Refused as refused:
        refusal = str(refused)
    return _Step(spans, tuple(row.held for row in rules.state), refusal, cached)


class _Logits:
    """The reference's logits, asked once for each longest sequence.

    Attention is causal: one forward of a whole sequence holds the logits of every operation on it.
    """

    def __init__(self, reference: Reference, spans: Sequence[Span], vocab_size: int) -> None:
        self.nothing = np.empty((0, vocab_size), np.float32)
        self._found: dict[tuple[tuple[int, ...], tuple[Hidden, ...]], Float32Array] = {}
        for tokens, hidden in sorted({_question(span) for span in spans}, key=lambda q: -len(q[0])):
            if self._whole(tokens, hidden) is None:
                self._found[tokens, hidden] = reference.logits(tokens, hidden)

    def of(self, spans: Sequence[Span]) -> Float32Array:
        """The rows of all spans, one span's after the other's."""
        return np.concatenate([self.nothing, *(self._rows(span) for span in spans)])

    def _rows(self, span: Span) -> Float32Array:
        whole = self._whole(*_question(span))
        assert whole is not None
        places = span.row.alive[span.start :]
        return whole[list(places)]

    def _whole(self, tokens: tuple[int, ...], hidden: tuple[Hidden, ...]) -> Float32Array | None:
        for (longer, same), rows in self._found.items():
            if same == hidden and longer[: len(tokens)] == tokens:
                return rows
        return None


def _question(span: Span) -> tuple[tuple[int, ...], tuple[Hidden, ...]]:
    """What to ask the reference for one span."""
    return span.row.tokens, span.row.hidden

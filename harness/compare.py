"""Compare what a device observed with what it must, and say exactly where they part."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from harness.cases import Case
from harness.oracle import Expected, expectations
from harness.reference.protocol import Reference
from harness.tolerances import Tolerance
from kvengine.plan import CachePlan
from kvengine.program import Observation, Program
from kvengine.spec import ModelSpec
from reports.results import Divergence, TopLogits

Float32Array = npt.NDArray[np.float32]


class CheckFailed(AssertionError):
    """The engine was wrong: the message says where in words, ``divergence`` as data.

    case: what has to be checked again to see it again; harness.checking puts it here.
    """

    def __init__(self, message: str, program: Program, divergence: Divergence | None = None) -> None:
        super().__init__(message)
        self.program = program
        self.divergence = divergence
        self.case: Case | None = None


@dataclass(frozen=True)
class Agreement:
    """How close a passing program was.

    error: largest absolute logit difference. kl: summed over rows, nats. hits: rows whose argmax
    is the reference's, or ties with it within twice the logit tolerance. rows: how many were compared.
    """

    error: float
    kl: float
    hits: int
    rows: int


def agree_with_reference(
    program: Program,
    observations: Sequence[Observation],
    reference: Reference,
    spec: ModelSpec,
    plan: CachePlan,
    tolerance: Tolerance,
) -> Agreement:
    """Hold every observation against the cacheless reference. plan: of the artifact that ran.

    Raises:
        CheckFailed: a wrong position, refusal, row count, greedy token, set of cached positions, a
            non-finite logit, or a row outside the tolerance.
    """
    _same_count(program, observations)
    _tokens_exist(program, observations, spec)
    error, kl, hits, rows = 0.0, 0.0, 0, 0
    answers = expectations(program, observations, reference, spec, plan)
    for index, (expected, found) in enumerate(zip(answers, observations, strict=True)):
        _same_outcome(program, index, expected, found)
        _greedy_is_argmax(program, index, expected, found, tolerance)
        for row, (sought, got) in enumerate(zip(expected.rows, found.logits, strict=True)):
            off, row_kl = row_error(sought, got), kl_divergence(sought, got)
            outside = tolerance.logits is not None and off > tolerance.logits
            if outside or not row_kl <= tolerance.row_kl:  # "not <=" also catches NaN
                limit = (
                    f"{tolerance.logits:g} at most" if outside else f"a KL of {tolerance.row_kl:g} at most"
                )
                _diverged(program, index, row, expected.places[row], sought, got, limit)
            error, kl, rows = max(error, off), kl + row_kl, rows + 1
            # What ties within the band may come either way round, as for greedy tokens.
            hits += bool(sought.max() - sought[np.argmax(got)] <= 2 * (tolerance.logits or 0))
    return Agreement(error, kl, hits, rows)


def agree_with_each_other(
    program: Program,
    left: Sequence[Observation],
    right: Sequence[Observation],
    limit: float,
    what: str,
) -> float:
    """Two ways to the same answer differ by at most ``limit`` (0: bit by bit); returns the worst difference.

    Raises:
        CheckFailed: naming ``what`` should have been the same.
    """
    worst = 0.0
    for index, (one, other) in enumerate(zip(left, right, strict=True)):
        if _outcome(one) != _outcome(other):
            raise CheckFailed(f"{what}: operation {index} gave {_brief(one)} and {_brief(other)}", program)
        for row, (a, b) in enumerate(zip(one.logits, other.logits, strict=True)):
            error = row_error(a, b)
            worst = max(worst, error)
            if not error <= limit:
                place = one.position - len(one.logits) + row
                _diverged(program, index, row, place, a, b, f"{limit:g} at most", what)
    return worst


def row_error(sought: Float32Array, found: Float32Array) -> float:
    """Largest absolute difference of two logit rows [vocab]; infinite where one is not finite."""
    difference = np.abs(sought - found).max()
    return float(difference) if np.isfinite(difference) else float("inf")


def kl_divergence(sought: Float32Array, found: Float32Array) -> float:
    """KL(softmax(sought) || softmax(found)) in nats, in float64."""
    p, q = (_log_softmax(row) for row in (sought, found))
    return float(np.sum(np.exp(p) * (p - q)))


def top_logits(row: Float32Array, count: int = 5) -> TopLogits:
    """The largest logits of a row [vocab], largest first; non-finite values as they are."""
    order = np.argsort(-np.nan_to_num(row, nan=np.inf))[:count]
    return TopLogits(tuple(map(int, order)), tuple(_finite(row[i]) for i in order))


def _finite(value: np.float32 | float) -> float | None:
    """JSON has no NaN and no infinity."""
    return float(value) if np.isfinite(value) else None


def _log_softmax(row: Float32Array) -> npt.NDArray[np.float64]:
    shifted = row.astype(np.float64) - row.max()
    result: npt.NDArray[np.float64] = shifted - np.log(np.sum(np.exp(shifted)))
    return result


def _same_count(program: Program, observations: Sequence[Observation]) -> None:
    if len(observations) != len(program.operations):
        raise CheckFailed(
            f"sought {len(program.operations)} observations, found {len(observations)}", program
        )


def _same_outcome(program: Program, index: int, expected: Expected, found: Observation) -> None:
    refusal = found.error.type if found.error else ""
    if refusal != expected.refusal:
        detail = f": {found.error.message}" if found.error else ""
        raise CheckFailed(
            f"operation {index}: sought {expected.refusal or 'no refusal'}, "
            f"found {refusal or 'no refusal'}{detail}",
            program,
        )
    if found.positions != expected.positions:
        raise CheckFailed(
            f"operation {index}: sought {_tokens_in(expected.positions)}, "
            f"found {_tokens_in(found.positions)}",
            program,
        )
    if found.logits.shape != expected.rows.shape:
        raise CheckFailed(
            f"operation {index}: sought logits {list(expected.rows.shape)}, found {list(found.logits.shape)}",
            program,
        )
    if len(found.tokens) != len(expected.choices):
        raise CheckFailed(
            f"operation {index}: sought {len(expected.choices)} tokens, found {len(found.tokens)}", program
        )

    cached = () if found.cache is None else tuple(found.cache.positions.tolist())
    if cached != expected.cached:
        raise CheckFailed(
            f"operation {index}: sought cache rows of positions {list(expected.cached)}, "
            f"found {list(cached)}",
            program,
        )


def _tokens_in(positions: tuple[int, ...]) -> str:
    return f"position {positions[0]}" if len(positions) == 1 else f"positions {list(positions)}"


def _tokens_exist(program: Program, observations: Sequence[Observation], spec: ModelSpec) -> None:
    for index, observation in enumerate(observations):
        wrong = [token for token in observation.tokens if not 0 <= token < spec.vocab_size]
        if wrong:
            raise CheckFailed(
                f"operation {index}: sought tokens below {spec.vocab_size}, found {wrong[0]}", program
            )


def _greedy_is_argmax(
    program: Program, index: int, expected: Expected, found: Observation, tolerance: Tolerance
) -> None:
    """Every greedy token is the reference's argmax, or ties with it within twice the logit tolerance."""
    if tolerance.logits is None:
        return
    for row, (choice, token) in enumerate(zip(expected.choices, found.tokens, strict=True)):
        gap = float(choice.max() - choice[token])
        if gap > 2 * tolerance.logits:
            raise CheckFailed(
                f"operation {index}: greedy token {row} is {token}, "
                f"the reference's argmax is {int(choice.argmax())}, {gap:.3g} above it",
                program,
            )


def _diverged(
    program: Program,
    index: int,
    row: int,
    position: int,
    sought: Float32Array,
    found: Float32Array,
    limit: str,
    what: str = "reference",
) -> None:
    error = row_error(sought, found)
    divergence = Divergence(
        operation=index,
        row=row,
        position=position,
        error=_finite(error),
        expected=top_logits(sought),
        found=top_logits(found),
    )
    raise CheckFailed(
        f"first differing step: operation {index} ({program.operations[index].kind}), row {row}, token "
        f"position {position}: logits differ from the {what} by {error:.3g}, "
        f"KL {kl_divergence(sought, found):.3g} nats; sought {limit}",
        program,
        divergence,
    )


def _outcome(observation: Observation) -> tuple[object, ...]:
    """Everything but the logits' values."""
    refusal = observation.error.type if observation.error else ""
    return observation.positions, refusal, observation.tokens, observation.logits.shape


def _brief(observation: Observation) -> str:
    positions, refusal, tokens, shape = _outcome(observation)
    return f"(positions {positions}, {refusal or 'no refusal'}, tokens {tokens}, logits {shape})"

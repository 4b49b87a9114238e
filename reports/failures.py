"""Failed checks, and checks that infrastructure stopped, each with what is needed to act on it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from reports import text
from reports.correctness import anchors
from reports.devices import DeviceView
from reports.programs import ProgramView, program_view
from reports.results import CheckResult, Divergence, Outcome, RunResults


@dataclass(frozen=True)
class LogitRow:
    """One rank of both top-5 lists."""

    rank: int
    expected_token: str
    expected: str
    found_token: str
    found: str
    differs: bool


@dataclass(frozen=True)
class DivergenceView:
    place: tuple[tuple[str, str], ...]
    logits: tuple[LogitRow, ...]


@dataclass(frozen=True)
class Problem:
    """A failed check, or one that infrastructure stopped."""

    anchor: str
    device: DeviceView
    recipe: str
    check: str
    title: str
    message: str
    program: ProgramView | None
    divergence: DivergenceView | None
    replay: str
    stderr_tail: str


@dataclass(frozen=True)
class Retried:
    """A check or measurement that infrastructure stopped and that was tried again."""

    device: DeviceView
    recipe: str
    what: str
    outcome: str
    reasons: tuple[str, ...]


def retried(results: RunResults, devices: dict[str, DeviceView]) -> list[Retried]:
    checks = [Retried(devices[c.device], c.recipe, c.title, c.outcome, c.retries) for c in results.checks]
    legs = [
        Retried(devices[leg.device], leg.recipe, f"{leg.model}, {leg.workload}", "measured", leg.retries)
        for leg in results.legs
    ]
    return [each for each in [*checks, *legs] if each.reasons]


def problems(results: RunResults, devices: dict[str, DeviceView]) -> list[tuple[Outcome, Problem]]:
    links = anchors(results)
    return [
        (check.outcome, _problem(check, devices[check.device], links[id(check)]))
        for check in results.checks
        if id(check) in links
    ]


def _problem(check: CheckResult, device: DeviceView, anchor: str) -> Problem:
    divergence = check.divergence
    return Problem(
        anchor=anchor,
        device=device,
        recipe=check.recipe,
        check=check.check,
        title=check.title,
        message=check.message,
        program=program_view(check.program, divergence) if check.program else None,
        divergence=_divergence(divergence, check.tolerance) if divergence else None,
        replay=check.replay,
        stderr_tail=check.stderr_tail,
    )


def _divergence(found: Divergence, tolerance: float | None) -> DivergenceView:
    place = [
        ("Operation", str(found.operation)),
        ("Row", str(found.row)),
        ("Token position", str(found.position)),
        ("Largest logit error", text.error_size(found.error)),
        ("Tolerance", text.error_size(tolerance)),
        ("Layer", "not located" if found.layer is None else str(found.layer)),
    ]
    ranks = max(len(found.expected.tokens), len(found.found.tokens))
    return DivergenceView(tuple(place), tuple(_logit_row(found, rank) for rank in range(ranks)))


def _logit_row(found: Divergence, rank: int) -> LogitRow:
    expected_token, expected = _at(found.expected.tokens, found.expected.values, rank)
    found_token, value = _at(found.found.tokens, found.found.values, rank)
    return LogitRow(rank + 1, expected_token, expected, found_token, value, expected_token != found_token)


def _at(tokens: Sequence[int], values: Sequence[float | None], rank: int) -> tuple[str, str]:
    token = str(tokens[rank]) if rank < len(tokens) else text.MISSING
    value = values[rank] if rank < len(values) else None
    if rank < len(values) and (value is None or math.isnan(value)):
        return token, "NaN"  # JSON has no NaN: it comes back as null
    return token, text.MISSING if value is None else f"{value:.4f}"

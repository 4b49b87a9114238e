"""Check a failure again: the property that failed, with what it failed on, on any device."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields
from typing import Any

from hypothesis import strategies as st
from hypothesis.errors import UnsatisfiedAssumption

from harness import suite
from harness.cases import Case, drawn_for
from harness.checking import Cell, Unsupported, stopping
from harness.compare import CheckFailed
from harness.errors import HarnessError
from kvengine.codec import DecodeError, encode
from kvengine.plan import PlanKind
from kvengine.program import Observation, Program
from reports.results import Divergence

# What a program alone can be held to.
REFERENCE = "test_any_program_equals_the_reference"


@dataclass(frozen=True)
class Replayed:
    """title: the property in words. failure: its own words for what is wrong, "" where nothing is.

    error: largest logit difference that was held to ``limit``; None where nothing was compared so.
    runs: every program that ran on the device, with what it observed.
    """

    title: str
    failure: str
    divergence: Divergence | None
    error: float | None
    limit: float | None
    runs: tuple[tuple[Program, Sequence[Observation]], ...]


def read_case(text: str) -> tuple[Case, bool]:
    """A case, and whether it names its check. A program alone, as older versions saved it, does not.

    Raises:
        HarnessError: neither.
    """
    try:
        return Case.from_json(text), True
    except (ValueError, RecursionError) as error:
        no_case = error
    try:
        program = Program.from_json(text)
    except (ValueError, RecursionError) as error:
        wrong = no_case if '"check"' in text else error
        raise HarnessError(f"this is neither a failure's case nor a program: {wrong}") from error
    return Case(REFERENCE, encode(program), seed=0, examples=1, recipe=""), False


def check_of(case: Case) -> Callable[[Any], None]:
    """The suite's check that ``case`` is of.

    Raises:
        HarnessError: it is a user's own.
    """
    for check in suite.checks():
        if check.__name__ == case.check:
            return check
    raise HarnessError(
        f"{case.check!r} is none of kvfarm's own checks; run it again where it is: "
        f"pytest -k {case.check} --kvfarm-seed={case.seed} --examples={case.examples} --devices=… --model=…; "
        "what failed last time is tried first"
    )


def replay(cell: Cell, case: Case) -> Replayed:
    """Check ``case`` again on the device of ``cell``.

    Raises:
        HarnessError: a user's check, a case that the check does not take, or a model that cannot do it.
        InfrastructureError: the device failed.
    """
    check, again = check_of(case), _Again(cell, case)
    failure: AssertionError | None = None
    try:
        check(again)
    except AssertionError as found:  # CheckFailed, or a statistic over all rows
        failure = found
    except DecodeError as error:
        raise HarnessError(f"{case.check} cannot be asked about this: {error}") from error
    except Unsupported as error:
        raise HarnessError(f"{case.check} on {cell.device} with {cell.recipe.name}: {error}") from error
    tally = again.take_tally()
    return Replayed(
        title=suite.title_of(check),
        failure=str(failure) if failure else "",
        divergence=failure.divergence if isinstance(failure, CheckFailed) else None,
        error=None if tally.limit is None and not tally.rows else tally.worst_error,
        limit=tally.limit,
        runs=tuple(again.runs),
    )


class _Again(Cell):
    """A cell whose properties draw nothing: they are asked about one value. runs: what it took.

    Where no single value failed the property is checked whole, with the case's seed.
    """

    def __init__(self, cell: Cell, case: Case) -> None:
        super().__init__(**{each.name: getattr(cell, each.name) for each in fields(Cell)})
        self.seed, self.examples, self.database, self.shrink = case.seed, case.examples, None, False
        self.case = case
        self.runs: list[tuple[Program, Sequence[Observation]]] = []

    def run(self, program: Program, plan: PlanKind | None = None) -> Sequence[Observation]:
        observations = super().run(program, plan)
        self.runs.append((program, observations))
        return observations

    def for_all(
        self,
        drawn: st.SearchStrategy[Any],
        check: Callable[[Any], None],
        together: Callable[[], None] = lambda: None,
    ) -> None:
        if self.case.drawn is None:
            super().for_all(drawn, check, together)
        else:
            self._once(check)

    def for_these(self, values: Iterable[Any], check: Callable[[Any], None]) -> None:
        if self.case.drawn is None:
            super().for_these(values, check)

    def for_all_programs(self, check: Callable[[Program], None]) -> None:
        if self.case.drawn is None:
            super().for_all_programs(check)
        else:
            self._once(check)

    def _once(self, check: Callable[[Any], None]) -> None:
        try:
            with stopping():
                check(drawn_for(check, self.case))
        except UnsatisfiedAssumption:
            raise Unsupported("the program needs more rows than this graph's cache has") from None

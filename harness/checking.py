"""Run one property over many drawn programs on one device, and keep what it found."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar
from unittest import SkipTest

from hypothesis import HealthCheck, Phase, assume, given, seed, settings
from hypothesis import strategies as st
from hypothesis.database import DirectoryBasedExampleDatabase
from hypothesis.errors import FlakyFailure
from hypothesis.stateful import run_state_machine_as_test

from device_agents.errors import InfrastructureError
from harness import compare, shrinking
from harness.cases import Case, as_data
from harness.drawing import same_everywhere
from harness.errors import ReferenceFailed
from harness.examples import MOST_REPLAYED, AsItWas
from harness.machine import ProgramMachine
from harness.programs import Limits
from harness.recipes import Recipe
from harness.reference.protocol import KeysAndValues, Reference
from harness.tolerances import Tolerance, tolerance_for, too_few
from kvengine.errors import NotSupported
from kvengine.plan import CachePlan, PlanKind
from kvengine.program import Observation, Program
from kvengine.session import EngineSession
from kvengine.spec import ModelSpec

Drawn = TypeVar("Drawn")
PROGRAM_STEPS = 20  # most operations of one program


class InfrastructureStop(BaseException):
    """Carries an InfrastructureError through Hypothesis, which would take an Exception for a
    counterexample and shrink it. Raised only inside a property."""

    def __init__(self, error: InfrastructureError) -> None:
        super().__init__(str(error))
        self.error = error


class Unsupported(BaseException):
    """The model under test cannot do what a property needs: neither passed nor failed, and the report says
    so. A BaseException for the reason that InfrastructureStop is one."""


@dataclass
class Tally:
    """What one check has done so far; the report's row is made of it."""

    programs: int = 0
    worst_error: float = 0.0  # logits
    limit: float | None = None  # the widest that worst_error was held to; None: KL judged instead
    rows: int = 0  # compared with the reference
    kl: float = 0.0  # summed over rows, nats
    hits: int = 0  # rows whose argmax is the reference's

    def saw(self, error: float, limit: float | None) -> None:
        """One more comparison; one held to a ``limit`` says more than those that KL judges."""
        if limit is None and self.limit is not None:
            return
        if limit is not None and self.limit is None:
            self.worst_error, self.limit = 0.0, limit
        self.worst_error = max(self.worst_error, error)
        if limit is not None and self.limit is not None:
            self.limit = max(self.limit, limit)


def applies(marks: Collection[str], recipe: Recipe) -> bool:
    """Whether a property with these pytest markers (see harness.plugin) means anything for ``recipe``."""
    cache = recipe.export.cache
    if "hybrid_only" in marks and cache.kind != "hybrid":
        return False
    return "quantized_cache_only" not in marks or cache.dtype in ("int8", "int4")


@dataclass
class Cell:
    """One device with one recipe, as a check sees it.

    open_plan: opens (and remembers) the session for the same recipe with another cache plan kind.
    examples: programs a property draws. most: of these, how many it tries, the first ones; None: all. A
        slow device tries fewer, and not others: Hypothesis draws otherwise when it is asked for fewer.
    shrink: look for the smallest failing one.
    database: folder of failing examples. began: when the run did, seconds since 1970; what is saved later
        is for the next one. model: the checkpoint's folder, for whoever replays a failure.
    on_program: called before each, for the progress line.
    simulated: the device has no engine, so there is nothing to check: the first program, once it has run,
        ends the check as not supported.
    """

    device: str
    recipe: Recipe
    spec: ModelSpec
    reference: Reference
    open_plan: Callable[[PlanKind], EngineSession]
    examples: int
    seed: int
    database: str | None = None
    began: float = field(default_factory=time.time)
    model: str = ""
    shrink: bool = True
    most: int | None = None
    on_program: Callable[[Tally], None] = lambda tally: None
    simulated: bool = False
    tally: Tally = field(default_factory=Tally)

    def take_tally(self) -> Tally:
        """What was done since the last call; the next check starts from zero."""
        taken, self.tally = self.tally, Tally()
        return taken

    @property
    def tolerance(self) -> Tolerance:
        return tolerance_for(self.recipe.export, rounded_reference=self.recipe.foreign is None)

    @property
    def plan(self) -> CachePlan:
        """The cache plan of the recipe's artifact."""
        return self.recipe.export.cache

    @property
    def limits(self) -> Limits:
        limits = Limits.of(self.spec)
        if self.recipe.foreign is None:
            return limits
        # A foreign graph's windowed cache has the rows that it has, and no contract tells how to pad a row.
        return dataclasses.replace(limits, most_slack=self.plan.slack, ragged=False)

    def run(self, program: Program, plan: PlanKind | None = None) -> Sequence[Observation]:
        """One program on the device, in one round trip; ``plan`` for another cache plan kind.

        Raises Unsupported where a foreign model cannot do an operation, or has no other plan.
        """
        if self.recipe.foreign is not None and program.capacity > self.spec.max_position:
            assume(False)  # some graphs fix the rows of their cache; what needs more is drawn again
        self.tally.programs += 1
        self.on_program(self.tally)
        try:
            observations = self.open_plan(plan or self.recipe.export.cache.kind).run_program(program)
        except InfrastructureError as error:
            raise InfrastructureStop(error) from error
        except NotSupported as error:
            raise Unsupported(str(error)) from error
        if self.simulated:
            raise Unsupported(f"{self.device} is simulated: it has no engine whose answers could be checked")
        # One of ours that refuses what the oracle expects is a failure, a foreign one's graph is as it is.
        if self.recipe.foreign is not None:
            for operation, seen in zip(program.operations, observations, strict=True):
                if seen.error is not None and seen.error.type == NotSupported.__name__:
                    raise Unsupported(f"{operation.kind}: {seen.error.message}")
        return observations

    def check_reference(
        self, program: Program, observations: Sequence[Observation], kind: PlanKind | None = None
    ) -> None:
        """Raises CheckFailed unless the observations are the reference's, within the recipe's tolerance.

        kind: of the cache plan they were made with, where it is not the recipe's own.
        """
        plan = dataclasses.replace(self.plan, kind=kind or self.plan.kind)
        try:
            agreement = compare.agree_with_reference(
                program, observations, self.reference, self.spec, plan, self.tolerance
            )
        except InfrastructureError as error:
            raise InfrastructureStop(ReferenceFailed(str(error))) from error
        tally = self.tally
        tally.saw(agreement.error, self.tolerance.logits)
        tally.rows += agreement.rows
        tally.kl += agreement.kl
        tally.hits += agreement.hits

    def reference_cache(self, tokens: tuple[int, ...]) -> tuple[KeysAndValues, ...]:
        """The reference's K and V of each layer at every position of ``tokens``."""
        try:
            return self.reference.cache(tokens)
        except InfrastructureError as error:
            raise InfrastructureStop(error) from error

    def check_statistics(self) -> None:
        """Raises AssertionError where all rows together are too far off, though no single one was."""
        tally, tolerance = self.tally, self.tolerance
        if not tally.rows:
            return
        mean_kl, top1 = tally.kl / tally.rows, tally.hits / tally.rows
        assert mean_kl <= tolerance.mean_kl, (
            f"mean KL divergence from the reference is {mean_kl:.3g} nats over {tally.rows} rows, "
            f"sought at most {tolerance.mean_kl:g}"
        )
        assert not too_few(tally.hits, tally.rows, tolerance.top1), (
            f"the argmax is the reference's in {top1:.0%} of {tally.rows} rows, "
            f"sought at least {tolerance.top1:.0%}"
        )

    def check_same(
        self,
        program: Program,
        left: Sequence[Observation],
        right: Sequence[Observation],
        what: str,
        limit: float,
    ) -> None:
        """Raises CheckFailed unless both differ by at most ``limit``."""
        self.tally.saw(compare.agree_with_each_other(program, left, right, limit, what), limit)

    def for_all(
        self,
        drawn: st.SearchStrategy[Drawn],
        check: Callable[[Drawn], None],
        together: Callable[[], None] = lambda: None,
    ) -> None:
        """Draw ``examples`` values, check each on the device, shrink the first failure on that device.

        What failed in earlier runs comes first, apart from what the seed draws and on top of it. One run of
        Hypothesis for both would not do: after a saved example it draws others, as many fewer. And only
        what was saved when the run began is tried again: so all devices of a run, whether they work at the
        same time or one after the other, run the same programs whatever failed on one of them meanwhile,
        and the seed gives its programs again in the next run.

        together: called when each passed, to judge what only all of them tell.

        Raises:
            CheckFailed: for the smallest failing program found.
            InfrastructureError: the device failed, not the engine; nothing is shrunk.
        """

        def run(chosen: settings, tried: Callable[[Drawn], None]) -> None:
            def property_holds(value: Drawn) -> None:
                tried(value)

            # Outermost: seed() takes the database away from the settings that it finds.
            chosen(seed(self.seed)(given(drawn)(property_holds)))()

        with self._keeping_failures(check):
            self._twice(run, check, shrink=self.shrink)
            together()
        self.check_statistics()

    def for_these(self, values: Iterable[Drawn], check: Callable[[Drawn], None]) -> None:
        """As ``for_all``, with values that need no drawing."""
        with self._keeping_failures(check):
            for value in values:
                with self._telling(check, value):
                    check(value)

    def for_all_programs(self, check: Callable[[Program], None]) -> None:
        """As ``for_all``, with programs that ProgramMachine writes over all operations."""

        def run(chosen: settings, tried: Callable[[Program], None]) -> None:
            machine = ProgramMachine.of(self.limits, self.spec, self.plan, tried)
            stepping = settings(chosen, stateful_step_count=PROGRAM_STEPS)
            run_state_machine_as_test(seed(self.seed)(machine), settings=stepping)

        with self._keeping_failures(check):
            try:
                self._twice(run, check, shrink=False)
            except compare.CheckFailed as failure:
                again = self._first(check, shrinking.MOST_RUNS)
                raise (shrinking.smallest(failure, again) if self.shrink else failure) from None
        self.check_statistics()

    def _twice(
        self,
        run: Callable[[settings, Callable[[Drawn], None]], None],
        check: Callable[[Drawn], None],
        *,
        shrink: bool,
    ) -> None:
        """Run Hypothesis over what failed before and was saved, then over what the seed draws."""
        folder = self._folder(check)
        shrinking_too = [Phase.shrink] if shrink else []
        plain = settings(
            deadline=None,  # a phone is slow; deadlines are the session's
            report_multiple_bugs=False,
            suppress_health_check=list(HealthCheck),
            database=None,
        )
        if folder is not None and folder.is_dir():
            saved = AsItWas(folder, self.began)
            phases = [Phase.reuse, *shrinking_too]
            with suppress(SkipTest):  # Hypothesis' word for: nothing was saved
                chosen = settings(plain, max_examples=MOST_REPLAYED, database=saved, phases=phases)
                run(chosen, self._first(check, MOST_REPLAYED))
        new = None if folder is None else DirectoryBasedExampleDatabase(folder)
        phases = [Phase.generate, *shrinking_too]
        chosen = settings(plain, max_examples=self.examples, database=new, phases=phases)
        run(chosen, self._first(check, self.examples if self.most is None else self.most))

    def _first(self, check: Callable[[Drawn], None], most: int) -> Callable[[Drawn], None]:
        """``check`` for Hypothesis: until a value fails, those after the first ``most`` are left out."""
        passed, failed = 0, False

        def tried(value: Drawn) -> None:
            nonlocal passed, failed
            if passed >= most and not failed:
                return
            try:
                with _exits_interrupt(), self._telling(check, value):
                    check(value)
            except compare.CheckFailed:
                failed = True
                raise
            passed += 1

        return tried

    @contextmanager
    def _telling(self, check: Callable[..., None], value: object) -> Iterator[None]:
        """A failure knows what it is one of."""
        try:
            yield
        except compare.CheckFailed as failure:
            failure.case = self._case(check, value)
            raise

    def _case(self, check: Callable[..., None], value: object) -> Case:
        name = _name(check)
        return Case(name, as_data(value), self.seed, self.examples, self.recipe.name, self.model)

    @contextmanager
    def _keeping_failures(self, check: Callable[..., None]) -> Iterator[None]:
        """A failing case stays as JSON beside Hypothesis' examples, for ``kvfarm replay FILE``."""
        try:
            try:
                with same_everywhere(), stopping():
                    yield
            except FlakyFailure as flaky:
                # An engine that is wrong only now and then is wrong.
                found = next((e for e in flaky.exceptions if isinstance(e, compare.CheckFailed)), None)
                raise found or flaky from flaky
        except compare.CheckFailed as failure:
            failure.case = failure.case or self._case(check, None)
            folder = self._folder(check)
            if folder is not None:
                folder.mkdir(parents=True, exist_ok=True)
                (folder / f"{failure.case.key}.json").write_text(failure.case.to_json() + "\n")
            raise

    def _folder(self, check: Callable[..., None]) -> Path | None:
        """Of one property's failing examples, of any device and recipe; may be copied or committed."""
        return None if self.database is None else Path(self.database) / _name(check)


def _name(check: Callable[..., None]) -> str:
    """Of the property that ``check`` is inside of."""
    return check.__qualname__.partition(".")[0]


@contextmanager
def stopping() -> Iterator[None]:
    """An InfrastructureStop that leaves the body is the error that it carries."""
    try:
        yield
    except InfrastructureStop as stop:
        raise stop.error from stop.error.__cause__


@contextmanager
def _exits_interrupt() -> Iterator[None]:
    """Hypothesis takes a SystemExit for a counterexample; it only means that somebody ends this process."""
    try:
        yield
    except SystemExit as error:
        raise KeyboardInterrupt(f"exit with {error}") from error

"""Run mutants against the suite: which property finds each, after how many programs, and how soon."""

from __future__ import annotations

import contextlib
import re
import tempfile
import time
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from harness import suite
from harness.checking import Cell, applies
from harness.mutants.models import checkpoint
from harness.mutants.mutant import Mutant
from harness.recipes import Recipe, parse_recipe, with_plan
from harness.reference import CachedReference, Reference, TransformersReference
from harness.reference.rounded import is_exact, rounded_checkpoint
from kvengine.engine import LocalEngine
from kvengine.errors import EngineFailure
from kvengine.export import export
from kvengine.export.config import read_architecture
from kvengine.plan import PlanKind
from kvengine.program import Measurement, Observation, Program, Workload
from kvengine.session import EngineSession, SessionInfo

EXAMPLES = 30
SEED = 20260112
# The check that runs programs over everything: what it finds says little about which property is needed.
NET = "any program equals the reference"
Property = Callable[[Cell], None]


def properties() -> dict[str, Property]:
    """The suite's checks by short name, P1 first; where a property has several, P7 and P7b.

    One without a number goes by its full name.
    """
    found: dict[str, Property] = {}
    for function in sorted(suite.checks(), key=lambda f: _number(f.__name__)):  # stable
        number, name = _number(function.__name__), function.__name__.removeprefix("test_").replace("_", " ")
        short = f"P{number}" if number < _UNNUMBERED else name
        found[short if short not in found else f"{short}b"] = function
    return found


_UNNUMBERED = 1000


def _number(name: str) -> int:
    numbered = re.match(r"test_p(\d+)_", name)
    return int(numbered[1]) if numbered else _UNNUMBERED


@dataclass(frozen=True)
class Kill:
    """One property that found a mutant. examples: programs run on the engine until then."""

    property: str
    examples: int
    seconds: float
    message: str


@dataclass(frozen=True)
class Judged:
    """What the suite made of one mutant. crashes: what the engine died of, which is no kill."""

    mutant: str
    kills: tuple[Kill, ...]
    crashes: tuple[str, ...]
    programs: int
    seconds: float


class Workshop:
    """The checkpoints, references and engines of one process, under ``root``."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._references: dict[Path, Reference] = {}

    def reference(self, model: str, recipe: Recipe) -> Reference:
        """The oracle on the weights that ``recipe`` keeps, one for each set of weights."""
        folder = self.checkpoint(model)
        if not is_exact(recipe.export):
            folder = rounded_checkpoint(folder, recipe.export, self._root / "rounded")
        if folder not in self._references:
            self._references[folder] = CachedReference(TransformersReference(folder))
        return self._references[folder]

    def checkpoint(self, model: str) -> Path:
        return checkpoint(model, self._root / "checkpoints")

    @contextlib.contextmanager
    def bench(self, recipe_name: str, model: str, examples: int, seed: int = SEED) -> Iterator[Bench]:
        """A bench with a fresh engine, exported from ``model`` now, so with whatever mutant is applied."""
        recipe = parse_recipe(recipe_name)
        with tempfile.TemporaryDirectory(dir=self._root) as folder:
            yield Bench(self, Path(folder), recipe, model, examples, seed)


class Bench:
    """One engine under the suite. crash: what the engine died of in the newest program, "" if it did not."""

    def __init__(
        self, workshop: Workshop, folder: Path, recipe: Recipe, model: str, examples: int, seed: int
    ) -> None:
        self._workshop, self._folder, self._recipe, self._model = workshop, folder, recipe, model
        self._sessions: dict[PlanKind, Watched] = {}
        self.cell = Cell(
            device="here",
            recipe=recipe,
            spec=read_architecture(workshop.checkpoint(model)).spec,
            reference=workshop.reference(model, recipe),
            open_plan=self._open,
            examples=examples,
            seed=seed,
            shrink=False,
        )

    @property
    def crash(self) -> str:
        return next((session.crash for session in self._sessions.values() if session.crash), "")

    def forget_crashes(self) -> None:
        for session in self._sessions.values():
            session.crash = ""

    def _open(self, plan: PlanKind) -> EngineSession:
        if plan not in self._sessions:
            wanted = with_plan(self._recipe, plan).export
            artifact = export(self._workshop.checkpoint(self._model), self._folder / plan, wanted)
            engine = LocalEngine.open(artifact.folder, replace(self._recipe.session, threads=1), verify=False)
            self._sessions[plan] = Watched(engine)
        return self._sessions[plan]


class Watched:
    """An EngineSession that remembers whether its newest program died of anything but a refusal."""

    def __init__(self, engine: EngineSession) -> None:
        self._engine = engine
        self.crash = ""

    @property
    def info(self) -> SessionInfo:
        return self._engine.info

    def run_program(self, program: Program) -> tuple[Observation, ...]:
        self.crash = ""
        try:
            seen = self._engine.run_program(program)
        except Exception as error:
            self.crash = f"{type(error).__name__}: {error}"
            raise
        failures = [o.error.message for o in seen if o.error and o.error.type == EngineFailure.__name__]
        self.crash = failures[0] if failures else ""
        return seen

    def run_workload(self, workload: Workload) -> Measurement:
        return self._engine.run_workload(workload)

    def close(self) -> None:
        self._engine.close()


def judge(
    workshop: Workshop,
    mutant: Mutant,
    examples: int = EXAMPLES,
    seed: int = SEED,
    only: Collection[str] = (),
    first: bool = False,
) -> Judged:
    """Run every property that applies (of ``only``, if given) against one mutant; with ``first`` until one
    finds it."""
    kills, crashes, programs, began = [], [], 0, time.monotonic()
    with mutant.applied(), workshop.bench(mutant.recipe, mutant.model, examples, seed) as bench:
        for name, check in properties().items():
            if only and name not in only:
                continue
            if not applies({mark.name for mark in getattr(check, "pytestmark", ())}, bench.cell.recipe):
                continue
            started, message, crash = time.monotonic(), "", ""
            bench.forget_crashes()
            try:
                check(bench.cell)
            except AssertionError as failure:  # CheckFailed, or a statistic over all rows
                message, crash = str(failure).splitlines()[0], bench.crash
            except Exception as error:
                crash = f"{type(error).__name__}: {error}"
            done = bench.cell.take_tally().programs
            programs += done
            if crash:
                crashes.append(f"{name}: {crash.splitlines()[0]}")
            elif message:
                kills.append(Kill(name, done, time.monotonic() - started, message))
                if first:
                    break
    return Judged(mutant.name, tuple(kills), tuple(crashes), programs, time.monotonic() - began)

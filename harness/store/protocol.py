"""The seam between a run and what keeps its results."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol

from reports.gate_results import GateVerdict
from reports.results import CheckResult, DeviceInfo, LegResult, RunResults, VitalsInfo

HistoryMetric = Literal["ttft", "decode", "tokens_per_s", "memory", "energy"]
GateKind = Literal["gate", "calibration"]
Validity = Literal["VALID", "NOISY", "INVALID"]

# What is kept of every leg, by the gate's own names: its unit.
UNITS: dict[HistoryMetric, str] = {
    "ttft": "ms",
    "decode": "ms",
    "tokens_per_s": "tokens/s",
    "memory": "bytes",
    "energy": "J/token",
}


@dataclass(frozen=True)
class RunSummary:
    """One line of the list of runs, newest first."""

    run_id: str
    started_at: str  # ISO 8601, UTC
    finished_at: str | None  # None: interrupted or still running
    model: str
    command: str
    devices: int
    checks: int
    failed: int  # checks whose outcome is neither "passed" nor "not_supported"
    legs: int
    verdict: GateVerdict | None = None  # of a gate or a calibration
    drill: str = ""  # what was made wrong on purpose
    tags: tuple[str, ...] = ()


@dataclass(frozen=True)
class Checked:
    """What one run of the correctness suite said of one recipe on one device. commit: of the harness."""

    run_id: str
    at: str  # when the run started, ISO 8601, UTC
    commit: str
    checks: tuple[CheckResult, ...]


@dataclass(frozen=True)
class Durations:
    """How long what some runs did took, s. Of a leg that is what was timed: loading, and each repeat.

    checks: (device, recipe, check, seconds) of those that passed or failed. legs: (device, seconds).
    """

    checks: tuple[tuple[str, str, str, float], ...] = ()
    legs: tuple[tuple[str, float], ...] = ()


class HistoryRow(NamedTuple):  # made five times as fast as a frozen dataclass, and there are many
    """What one run measured of one device, recipe, model, workload and metric: one point of a trend.

    value: median over the cell's legs of the median over a leg's repeats. It is taken over the best
    legs there are: the VALID ones, without any the NOISY ones, else the INVALID ones; ``validity``
    says which, ``legs`` how many. arm: "" of a run; of a gate "baseline" or "candidate", whose memory is
    that of processes weighed by themselves. Drills, what a calibration slowed down, its warm-up and
    canaries are in no row.
    """

    at: str  # when the run started, ISO 8601, UTC
    run_id: str
    device: str
    recipe: str
    model: str
    workload: str  # e.g. "prompt 128 + 64 new"
    metric: HistoryMetric
    value: float
    unit: str
    validity: Validity
    legs: int
    arm: str
    artifact: str  # sha256
    commit: str  # of the harness
    tags: tuple[str, ...]


@dataclass(frozen=True)
class GateSummary:
    """One gate or calibration. baseline, candidate: their recipes. aa: the two are the same.

    drill: what was made wrong on purpose, "" for nothing.
    """

    at: str  # when it started, ISO 8601, UTC
    run_id: str
    finished_at: str | None  # None: killed, or still measuring
    kind: GateKind
    model: str
    baseline: str
    candidate: str
    verdict: GateVerdict
    exit_code: int
    planned_cells: int
    aa: bool
    drill: str
    tags: tuple[str, ...]


@dataclass(frozen=True)
class GateCellRow:
    """One cell of one gate or calibration; see reports.gate_results.GateCell for what numbers mean.

    recipe: the candidate's. aa: baseline and candidate were the same, and nothing was injected.
    ratio, low, high: candidate / baseline - 1, positive is worse. sd: of the block data, log ratios.
    """

    at: str  # when the gate started, ISO 8601, UTC
    run_id: str
    kind: GateKind
    device: str
    recipe: str
    model: str
    workload: str  # the gate's name of it, e.g. "p128+n64"
    metric: str
    comparison: str
    verdict: GateVerdict
    gating: bool
    waived: bool
    aa: bool
    margin: float
    ratio: float | None
    low: float | None
    high: float | None
    sd: float | None
    p: float | None
    blocks: int
    baseline: float | None
    candidate: float | None
    drill: str
    tags: tuple[str, ...]


SpanKind = Literal["check", "leg", "golden", "lease", "quarantine", "rest"]
PartKind = Literal["wait", "deploy", "open", "session", "program", "workload", "retry"]


@dataclass(frozen=True)
class Part:
    """A piece of a span, between two Unix times in s; one that is an instant ends when it begins."""

    kind: PartKind
    name: str
    began: float
    ended: float


@dataclass(frozen=True)
class Span:
    """What a device did for a run, between two Unix times in s on the clock of the machine that ran it.

    ended: None: it goes on, or whoever did it was killed. outcome: of a check as in CheckResult, of a leg its
    validity, "infrastructure" where that stopped it. retries: how often it was begun anew. parts: what
    happened meanwhile, and since the span before it; "rest" is but these.
    """

    device: str
    kind: SpanKind
    name: str
    began: float
    ended: float | None
    outcome: str = ""
    retries: int = 0
    parts: tuple[Part, ...] = ()


@dataclass(frozen=True)
class Flakes:
    """How many of a device's newest results infrastructure stopped, for good or until a retry."""

    results: int
    stopped: int

    @property
    def rate(self) -> float:
        """NaN without results."""
        return self.stopped / self.results if self.results else float("nan")


class Store(Protocol):
    """Every add is durable when it returns, and a result delivered twice is stored once.

    All methods raise harness.errors.StoreError: cannot be opened, other version, no such run; StoreAway,
    which is one: connection lost, locked, disk full. Texts to choose by are whole names; ``*`` in one
    stands for anything.
    since: an ISO 8601 date or time, UTC where it names no zone; what started then or later.
    """

    def begin_run(self, run: RunResults) -> None:
        """Keep the run's header: all of ``run`` but its devices, checks, legs and infrastructure.

        Again for the same run_id replaces the header, gate included: planned counts are known only
        after collection, verdicts only after a look. Tags are added and never taken away.
        """
        ...

    def add_device(self, run_id: str, device: DeviceInfo) -> None:
        """One row a device name; the newest wins."""
        ...

    def add_check(self, run_id: str, check: CheckResult, span: Span | None = None) -> None:
        """One row for (device, recipe, check); the newest wins, so a retry replaces what it repeats.

        span: when it was done, kept with it or not at all; see ``add_span``.
        """
        ...

    def add_leg(self, run_id: str, leg: LegResult, span: Span | None = None) -> None:
        """One row for each ``key``, the first to come; legs without one are told apart by their content.

        span: as in ``add_check``.
        """
        ...

    def add_infrastructure(self, run_id: str, message: str) -> None:
        """One row for each different message."""
        ...

    def add_span(self, run_id: str, span: Span) -> None:
        """One row for (device, kind, name, began); the newest wins."""
        ...

    def finish_run(self, run_id: str, finished_at: str) -> None:
        """``finished_at``: ISO 8601, UTC."""
        ...

    def add_tag(self, run_id: str, tag: str) -> None:
        """A run may have several tags and a tag several runs, of which the newest is meant."""
        ...

    def results(self, run_id: str) -> RunResults:
        """The whole run as stored so far, in the order in which results came."""
        ...

    def headers(
        self,
        *,
        kind: GateKind | None = None,
        aa: bool | None = None,
        plan_key: str | None = None,
        finished: bool | None = None,
        limit: int | None = None,
    ) -> tuple[RunResults, ...]:
        """Runs without their devices, checks, legs and infrastructure, newest first.

        kind, aa, plan_key: only gates or calibrations, only those whose sides are the same (or not), only
        those of this plan.
        """
        ...

    def runs(self) -> tuple[RunSummary, ...]:
        """All runs, newest first."""
        ...

    def find(self, name: str, commit: str = "") -> str | None:
        """The id of the run ``name`` means: its id, else the newest run with this tag, else of ``commit``."""
        ...

    def latest(self) -> str:
        """The newest run's id."""
        ...

    def history(
        self,
        *,
        device: str | None = None,
        recipe: str | None = None,
        model: str | None = None,
        workload: str | None = None,
        metric: HistoryMetric | None = None,
        since: str | None = None,
        until: str | None = None,
        newest: int | None = None,
        limit: int | None = None,
    ) -> tuple[HistoryRow, ...]:
        """What all runs measured, newest first; within a run in the order in which it came.

        until: when a run started; what started later is left out. newest: of each device, recipe, model,
        workload and arm only the newest so many runs that measured it. limit: rows in all.
        """
        ...

    def checks(self, *, device: str, recipe: str, model: str) -> Checked | None:
        """Those of the newest run that checked the recipe there; a drill is no such run. None: never."""
        ...

    def durations(self, model: str, runs: int) -> Durations:
        """Of the newest ``runs`` finished runs of a model."""
        ...

    def canaries(self, device: str | None = None) -> dict[tuple[str, str], float]:
        """By (run_id, device): ms a token of the frozen canary, median over its legs; where there was one."""
        ...

    def devices(self, run_id: str) -> tuple[DeviceInfo, ...]:
        """The run's devices alone; none for a run that is not there."""
        ...

    def gates(
        self, *, kind: GateKind | None = None, since: str | None = None, limit: int | None = None
    ) -> tuple[GateSummary, ...]:
        """Gates and calibrations, newest first."""
        ...

    def gate_cells(
        self,
        *,
        run_id: str | None = None,
        device: str | None = None,
        recipe: str | None = None,
        model: str | None = None,
        workload: str | None = None,
        metric: str | None = None,
        aa: bool | None = None,
        since: str | None = None,
        limit: int | None = None,
    ) -> tuple[GateCellRow, ...]:
        """Cells of gates and calibrations, newest first; within a gate in the gate's order."""
        ...

    def spans(self, run_id: str) -> tuple[Span, ...]:
        """What the run's devices did, in the order in which it was told."""
        ...

    def flakes(self, last: int = 100) -> dict[str, Flakes]:
        """Of each device's ``last`` checks and legs, over all runs but drills (Flutter looks at 100 too)."""
        ...

    def newest_devices(self) -> dict[str, DeviceInfo]:
        """Every device that any run used, by name, as the newest of them found it."""
        ...

    def vitals(self) -> dict[str, VitalsInfo]:
        """Of each device, after its newest leg."""
        ...

    def outcomes(self) -> dict[tuple[str, str], int]:
        """How many checks of all runs there are, by device and outcome."""
        ...

    def close(self) -> None: ...

"""The seam between a run and what keeps its results."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from reports.results import CheckResult, DeviceInfo, LegResult, RunResults


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
    failed: int  # checks whose outcome is not "passed"
    legs: int


class Store(Protocol):
    """Every add is durable when it returns, and a result delivered twice is stored once.

    All methods raise harness.errors.StoreError: cannot be opened, other version, no such run.
    """

    def begin_run(self, run: RunResults) -> None:
        """Keep the run's header: all of ``run`` but its devices, checks, legs and infrastructure.

        Again for the same run_id replaces the header: planned counts are known only after collection.
        """
        ...

    def add_device(self, run_id: str, device: DeviceInfo) -> None:
        """One row a device name; the newest wins."""
        ...

    def add_check(self, run_id: str, check: CheckResult) -> None:
        """One row for (device, recipe, check); the newest wins, so a retry replaces what it repeats."""
        ...

    def add_leg(self, run_id: str, leg: LegResult) -> None:
        """One row for each different leg; many legs of one cell are told apart by their content."""
        ...

    def add_infrastructure(self, run_id: str, message: str) -> None:
        """One row for each different message."""
        ...

    def finish_run(self, run_id: str, finished_at: str) -> None:
        """``finished_at``: ISO 8601, UTC."""
        ...

    def results(self, run_id: str) -> RunResults:
        """The whole run as stored so far, in the order in which results came."""
        ...

    def headers(self) -> tuple[RunResults, ...]:
        """All runs without their devices, checks, legs and infrastructure, newest first."""
        ...

    def runs(self) -> tuple[RunSummary, ...]:
        """All runs, newest first."""
        ...

    def latest(self) -> str:
        """The newest run's id."""
        ...

    def close(self) -> None: ...

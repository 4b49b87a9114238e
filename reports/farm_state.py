"""A farm at one moment, as plain data: what the live page shows and its JSON says."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

State = Literal["free", "leased", "finishing", "quarantined"]
"""finishing: its lease has ended, what that left running is being stopped."""


@dataclass(frozen=True)
class LeaseState:
    """since, until, beat: Unix times, s: granted, over at the latest, last heartbeat. run: "" for none."""

    holder: str
    user: str
    token: int
    run: str
    since: float
    until: float
    beat: float
    ended: str = ""


@dataclass(frozen=True)
class QuarantineState:
    """until: Unix time, s; None: until it is lifted."""

    evidence: str
    by: str
    until: float | None


@dataclass(frozen=True)
class VitalsState:
    """at: Unix time, s, of the reading, which may be old: a device on lease is not asked."""

    at: float
    battery_percent: float | None
    charging: bool | None
    temperatures_c: dict[str, float]
    thermal_status: int | None


@dataclass(frozen=True)
class DeviceState:
    """key: how its lab host's journal names it. results, stopped: of its newest results, how many
    infrastructure stopped. waiting: requests that might get it."""

    name: str
    host: str
    key: str
    state: State
    model: str = ""
    os: str = ""
    simulated: str = ""
    lease: LeaseState | None = None
    quarantine: QuarantineState | None = None
    waiting: int = 0
    vitals: VitalsState | None = None
    results: int = 0
    stopped: int = 0


@dataclass(frozen=True)
class WaitingState:
    """A request in line. since: Unix time, s."""

    holder: str
    devices: tuple[str, ...]
    count: int
    priority: int
    since: float
    run: str


@dataclass(frozen=True)
class RunState:
    """A stored run. done, planned: checks and legs. holders: devices on lease for it now. last: what was
    finished last, and when (Unix time, s)."""

    run_id: str
    started_at: str
    finished_at: str | None
    model: str
    command: str
    devices: int
    checks: int
    failed: int
    legs: int
    planned: int
    verdict: str
    tags: tuple[str, ...]
    drill: str
    holders: tuple[str, ...] = ()
    last: str = ""
    last_at: float | None = None

    @property
    def done(self) -> int:
        return self.checks + self.legs


@dataclass(frozen=True)
class FarmState:
    """at: Unix time, s. sources: where it is from. problems: what could not be read, and why."""

    at: float
    sources: tuple[str, ...]
    problems: tuple[str, ...]
    devices: tuple[DeviceState, ...]
    waiting: tuple[WaitingState, ...]
    runs: tuple[RunState, ...]  # newest first

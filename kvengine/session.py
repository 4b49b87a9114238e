"""The seam between a check and whatever runs it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from kvengine.program import Measurement, Observation, Program, Workload
from kvengine.recipe import SessionRecipe


@dataclass(frozen=True)
class SessionInfo:
    """What was opened: for the report and for sizing programs."""

    artifact_id: str
    session: SessionRecipe  # with threads filled in
    load_ms: float
    onnxruntime: str  # version
    numpy: str
    python: str
    nodes_by_provider: dict[str, int]
    notes: tuple[str, ...] = ()  # e.g. environment variables without effect


class EngineSession(Protocol):
    """One opened artifact. The engine in this process and the runner on a device both satisfy it.

    Both methods raise only infrastructure errors; what the engine refuses is in the Observation.
    """

    @property
    def info(self) -> SessionInfo: ...

    def run_program(self, program: Program) -> tuple[Observation, ...]: ...

    def run_workload(self, workload: Workload) -> Measurement: ...

    def close(self) -> None: ...

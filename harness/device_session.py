"""An open session on a device of the farm, as an EngineSession of this process."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from types import TracebackType
from typing import Any

import numpy as np

from device_agents.errors import InfrastructureError
from device_agents.lab_types import AgentBudgets
from device_agents.recording.record import Plan, Record
from device_agents.remote_session import Budgets
from device_agents.results import Kept, Key
from harness.lab import Lab
from harness.spans import Recorder
from kvengine.program import Measurement, Observation, Program, Workload
from kvengine.session import SessionInfo

# The agent's own deadlines are inside: they know the reason. Ours only catches a dead agent.
GRACE_S = 30.0


class DeviceSession:
    """An EngineSession on a device. Made by ``Farm.open``."""

    def __init__(
        self, lab: Lab, device: str, token: int, session_id: str, info: SessionInfo, recorder: Recorder
    ) -> None:
        self.device = device
        self._recorder = recorder
        self._began = time.time()
        self._lab = lab
        self._token = token
        self._id = session_id
        self._info = info
        self._closed = False

    @property
    def info(self) -> SessionInfo:
        return self._info

    @property
    def closed(self) -> bool:
        """Closed from our side, or broken: after an infrastructure error a session is of no more use."""
        return self._closed

    def run_program(self, program: Program) -> tuple[Observation, ...]:
        """Raises KvEngineError: the program as a whole is refused. InfrastructureError: see Farm."""
        with self._recorder.doing(self.device, "program", f"{len(program.operations)} operations"):
            found = self._call("run_program", Budgets().program_s, program)
        return tuple(_own(observation) for observation in found)

    def run_workload(self, workload: Workload) -> Measurement:
        """Raises as ``run_program``."""
        with self._recorder.doing(self.device, "workload", _words(workload)):
            measured: Measurement = self._call("run_workload", Budgets().workload_s, workload)
        return measured

    def measure(self, workload: Workload, plan: Plan, key: Key | None = None, note: str = "") -> Kept:
        """``run_workload``, recorded by ``plan``; once for all calls with ``key``. See LabAgent.measure."""
        agent = AgentBudgets()
        seconds = Budgets().workload_s + 2 * agent.recording_s + agent.vitals_s
        with self._recorder.doing(self.device, "workload", _words(workload)):
            found: Kept = self._call("measure", seconds, workload, plan, key, note)
        return found

    def start_recording(self, plan: Plan) -> None:
        """Let the device record what it does. A failure leaves the session as it was."""
        budget = AgentBudgets().recording_s + GRACE_S
        self._lab.call("start_recording", budget, self._id, self._token, plan)

    def stop_recording(self) -> Record:
        budget = AgentBudgets().recording_s + GRACE_S
        record: Record = self._lab.call("stop_recording", budget, self._id, self._token)
        return record

    def close(self) -> None:
        """End the runner. Never raises: a runner that cannot be closed ends with its lease."""
        if self._closed:
            return
        self._closed = True
        self._recorder.part(self.device, "session", self._id[-8:], self._began, time.time())
        with contextlib.suppress(InfrastructureError):
            self._lab.call("close_session", Budgets().close_s + GRACE_S, self._id, self._token)

    def __enter__(self) -> DeviceSession:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _call(self, method: str, budget_s: float, *arguments: Any) -> Any:
        if self._closed:
            raise InfrastructureError(f"{self.device}: {method}: this session is closed; open another")
        try:
            return self._lab.call(method, budget_s + GRACE_S, self._id, self._token, *arguments)
        except InfrastructureError:
            self.close()
            raise


def _words(workload: Workload) -> str:
    return f"prompt {len(workload.prompt)} + {workload.new_tokens} new, {workload.repeats} times"


def _own(observation: Observation) -> Observation:
    """Logits out of Ray's object store, which is small and lends its memory read-only."""
    return dataclasses.replace(observation, logits=np.array(observation.logits))

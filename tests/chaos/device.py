"""A device that follows a script, in the agent's own process; it tells on its users.

Every operation leaves a line in the file that CHAOS_LOG names: which device, which agent, from when to when.
"""

from __future__ import annotations

import hashlib
import json
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from device_agents.api import Device, DeviceIdentity, Finding, Vitals
from device_agents.blobs import BlobStore
from device_agents.config import DeviceConfig
from device_agents.deadline import Deadline
from device_agents.errors import RunnerDied
from device_agents.host import HostDevice
from device_agents.local import LocalTransport
from kvengine.program import Measurement, Observation, Program, Sample, Workload
from kvengine.recipe import SessionRecipe
from kvengine.session import EngineSession, SessionInfo
from tests.device_agents.conftest import FAKE_RUNNER

LOG = "CHAOS_LOG"
PROGRAM_S, WORKLOAD_S = 0.004, 0.04
VOCAB = 5


@contextmanager
def told(device: str, what: str, value: float = 0.0) -> Iterator[None]:
    """Also of work that its agent did not outlive: that is a line without an end."""
    _tell(device, what, value, begins=True)
    yield
    _tell(device, what, value, begins=False)


def _tell(device: str, what: str, value: float, *, begins: bool) -> None:
    line = {"device": device, "agent": os.getpid(), "what": what, "value": value}
    line |= {"at": time.monotonic(), "begins": begins}
    with Path(os.environ[LOG]).open("a") as file:
        file.write(json.dumps(line) + "\n")


def answer(program: Program) -> float:
    """What the device returns as every logit of the program: nobody else's answer is the same."""
    return float(int(hashlib.sha256(program.to_json().encode()).hexdigest()[:6], 16))


class Session:
    """In no process of its own; ends with ``close`` as a runner would."""

    def __init__(self, device: str, recipe: SessionRecipe) -> None:
        self._device = device
        self.info = SessionInfo("scripted", recipe, 1.0, "0", "0", "0", {"CPUExecutionProvider": 3})
        self._ended = threading.Event()

    def run_program(self, program: Program) -> tuple[Observation, ...]:
        with told(self._device, "program"):
            self._work(PROGRAM_S)
            logits = np.full((1, VOCAB), answer(program), np.float32)
            return tuple(Observation((1,), logits) for _ in program.operations)

    def run_workload(self, workload: Workload) -> Measurement:
        """The time to first token is of no other measurement, so that its way can be followed."""
        value = float(int.from_bytes(os.urandom(6)))
        with told(self._device, "workload", value):
            self._work(WORKLOAD_S)
            sample = Sample(value, (1.0,) * (workload.new_tokens - 1), tuple(range(workload.new_tokens)))
            counts = {"CPUExecutionProvider": 3}
            return Measurement((sample,) * workload.repeats, 7.0, 1 << 20, 64, counts, 2, 1.0, 2.0)

    def close(self) -> None:
        self._ended.set()

    def _work(self, seconds: float) -> None:
        if self._ended.wait(seconds):
            raise RunnerDied("the session was closed")


class Scripted:
    """A Device. Not a host: nothing is looked at before it is measured, which would take half a second."""

    def __init__(self, name: str) -> None:
        self.name = name

    def identity(self, deadline: Deadline) -> DeviceIdentity:
        return DeviceIdentity(
            self.name, "android", "scripted", "", "x86_64", "", "", 1, 1 << 30, (), {}, "a script"
        )

    def claim(self, deadline: Deadline) -> dict[str, str]:
        return {}

    def release(self, deadline: Deadline) -> None:
        pass

    def vitals(self, deadline: Deadline) -> Vitals:
        return Vitals(1.0)

    def diagnose(self, deadline: Deadline) -> tuple[Finding, ...]:
        return ()

    def deploy(self, folder: Path, deadline: Deadline) -> str:
        return str(folder)

    def open_session(self, remote_folder: str, recipe: SessionRecipe, deadline: Deadline) -> EngineSession:
        return Session(self.name, recipe)

    def close(self) -> None:
        pass


def make(config: DeviceConfig, store: BlobStore) -> Device:
    """By name: ``runner-…`` has real processes around a fake engine, which can be killed."""
    if config.name.startswith("runner"):
        return HostDevice(config.name, store.root, LocalTransport(0.5), store=store, runner_argv=FAKE_RUNNER)
    return Scripted(config.name)

"""A farm without Ray for tests of how a run is spread over processes: ``pytest -p tests.harness.fake_farm``.

Devices are engines in the process that opened them. What they share lives in FAKE_FARM, a folder: a
lease is a file with its holder's PID, and log.jsonl has a line when anything begins and when it ends.
"""

from __future__ import annotations

import contextlib
import json
import os
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from device_agents.api import DeviceIdentity, Vitals
from device_agents.deadline import Deadline
from device_agents.errors import InfrastructureError, LeaseError, LeaseNotGranted
from device_agents.lab_types import Lease
from device_agents.recording.record import Record
from device_agents.results import Kept, Key
from harness import opened
from harness.inventory import Inventory
from kvengine.artifact import Artifact
from kvengine.engine import LocalEngine
from kvengine.program import Measurement, Observation, Program, Workload
from kvengine.recipe import SessionRecipe

WAIT_S = 30.0
FOLDER = Path(os.environ.get("FAKE_FARM", "fake-farm"))


@dataclass(frozen=True)
class Connection:
    address: str = "none"
    joined: bool = False


@contextmanager
def logged(**what: str) -> Iterator[None]:
    _log(began=True, **what)
    try:
        yield
    finally:
        _log(began=False, **what)


def _log(**what: Any) -> None:
    with (FOLDER / "log.jsonl").open("a") as file:
        file.write(json.dumps({"at": time.monotonic(), "pid": os.getpid(), **what}) + "\n")


class FakeSession:
    def __init__(self, device: str, artifact: Artifact, recipe: SessionRecipe) -> None:
        self.device = device
        self._engine = LocalEngine.open(artifact.folder, recipe)
        self.info = self._engine.info
        self.closed = False

    def run_program(self, program: Program) -> tuple[Observation, ...]:
        with logged(device=self.device, what="program", program=program.to_json()):
            return self._engine.run_program(program)

    def run_workload(self, workload: Workload) -> Measurement:
        with logged(device=self.device, what="workload"):
            threading.Event().wait(0.1)
            return self._engine.run_workload(workload)

    def measure(self, workload: Workload, plan: Any, key: Key | None = None, note: str = "") -> Kept:
        return Kept(self.run_workload(workload), Record(note="it cannot record"), note=note)

    def close(self) -> None:
        self.closed = True

    def __enter__(self) -> FakeSession:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class FakeFarm:
    def __init__(self, inventory: Inventory, names: tuple[str, ...], *_: Any, **__: Any) -> None:
        self.names = names
        self.held: set[str] = set()
        self.waited_s = 0.0

    def __enter__(self) -> FakeFarm:
        FOLDER.mkdir(exist_ok=True)
        return self

    def __exit__(self, *_: object) -> None:
        for name in list(self.held):
            self.give_back(name)

    def invite(self) -> Connection:
        return Connection()

    def identity(self, name: str) -> DeviceIdentity:
        return DeviceIdentity(name, "host", "fake", "", "x86_64", "", "", 1, 1 << 30, (), {}, "a fake")

    def get_ready(self, name: str) -> None: ...

    def vitals(self, name: str) -> Vitals:
        return Vitals(time.time())

    def settings(self, name: str) -> dict[str, str]:
        return {}

    def kept(self, name: str, key: Key) -> Kept | None:
        return None

    def acknowledge(self, name: str, leg: str) -> None:
        pass

    def lease(self, name: str) -> None:
        lease = FOLDER / f"{name}.lease"
        if name not in self.held:
            try:
                with lease.open("x") as file:
                    file.write(str(os.getpid()))
            except FileExistsError:
                raise LeaseError(f"{name} is leased to {lease.read_text()}") from None
            self.held.add(name)

    def holding(self, names: Sequence[str]) -> tuple[str, ...]:
        return tuple(name for name in names if name in self.held)

    def hold(self, count: int, names: Sequence[str], wait_s: float | None = None) -> tuple[Lease, ...]:
        """Waits in line, as the real one does."""
        assert count == 1
        patience, pause = Deadline(WAIT_S if wait_s is None else wait_s), threading.Event()
        while True:
            for name in names:
                with contextlib.suppress(LeaseError):
                    self.lease(name)
                    return (Lease(name, "fake", 1),)
            if patience.expired:
                raise LeaseNotGranted(f"all are taken: {', '.join(names)}")
            pause.wait(0.02)

    def open(self, name: str, artifact: Artifact, recipe: SessionRecipe, _: Any) -> FakeSession:
        self.lease(name)
        return FakeSession(name, artifact, recipe)

    def give_back(self, name: str) -> None:
        if name in self.held:
            self.held.discard(name)
            (FOLDER / f"{name}.lease").unlink()

    def give_back_for(self, pid: int) -> None:
        for lease in FOLDER.glob("*.lease"):
            if lease.read_text() == str(pid):
                lease.unlink()


class FakeReference:
    """For tests that ask it nothing."""

    identity = "a fake"

    def logits(self, tokens: tuple[int, ...], *_: Any) -> np.ndarray[Any, np.dtype[np.float32]]:
        raise InfrastructureError("this reference knows nothing")


def pytest_addoption() -> None:
    # Before any pytest_configure: that is where a run begins.
    for name, fake in (
        ("Farm", FakeFarm),
        ("offer_reference", lambda name, checkpoint: None),
        ("share_reference", lambda name, checkpoint: FakeReference()),
        ("begin_reference", lambda checkpoint: FakeReference),
    ):
        setattr(opened, name, fake)

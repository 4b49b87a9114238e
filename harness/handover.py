"""What a run's controller and its workers tell each other, beside what pytest-xdist carries.

The controller hands over one ``Handover``. Everything else goes through a folder of the run: the
plan that each worker finds, answers that all workers must agree on, why a test was begun again, and
a datagram socket for the live line.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import socket
import tempfile
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from device_agents import scratch
from device_agents.deadline import Deadline
from device_agents.locking import locked
from harness.discovery import PassedOver
from harness.inventory import Inventory
from kvengine.codec import decode, encode
from reports.results import NotRun

KEY = "kvfarm"  # in xdist's workerinput
_DATAGRAM_BYTES = 1024
Kind = Literal["check", "measurement", "both", "other"]


@dataclass(frozen=True)
class Handover:
    """The run that a worker is a part of.

    controller: its PID. address: of its Ray. private: that ends with it. folder: of the run. done: what
    need not be run, as (device, recipe, check).
    """

    run_id: str
    started_at: str
    seed: int
    inventory: Inventory
    devices: tuple[str, ...]
    passed_over: tuple[PassedOver, ...]
    impossible: tuple[PassedOver, ...]
    controller: int
    address: str
    private: bool
    folder: str
    done: tuple[tuple[str, ...], ...] = ()

    def to_json(self) -> str:
        return json.dumps(encode(self))

    @classmethod
    def from_json(cls, text: str) -> Handover:
        return decode(cls, json.loads(text))


@dataclass(frozen=True)
class Planned:
    """One test. device, recipe: "" where it is for none. anywhere: it runs on one of these, decided then."""

    nodeid: str
    check: str
    title: str
    label: str
    kind: Kind
    device: str = ""
    recipe: str = ""
    anywhere: tuple[str, ...] = ()


@dataclass(frozen=True)
class Plan:
    """All tests of the run, in order, and those that no device may run."""

    tests: tuple[Planned, ...]
    not_run: tuple[NotRun, ...] = ()

    @property
    def checks(self) -> int:
        return sum(test.kind in ("check", "both") for test in self.tests)

    @property
    def legs(self) -> int:
        return sum(test.kind in ("measurement", "both") for test in self.tests)


class RunFolder:
    """The folder, as workers and the controller use it."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @classmethod
    def new(cls) -> RunFolder:
        # Not under the working directory: a socket's path may have 107 bytes.
        base = Path(tempfile.gettempdir())
        scratch.remove_abandoned(base)
        return cls(Path(tempfile.mkdtemp(prefix=scratch.named(scratch.RUN), dir=base)))

    def remove(self) -> None:
        shutil.rmtree(self.path, ignore_errors=True)

    def write_plan(self, plan: Plan) -> None:
        self._write("plan.json", json.dumps(encode(plan)))

    def plan(self) -> Plan:
        return decode(Plan, json.loads((self.path / "plan.json").read_text()))

    def once(self, name: str, find: Callable[[], str], seconds: float) -> str:
        """``find()`` of whoever asks first, for all; others wait so long for it.

        Raises:
            DeadlineExceeded: it took longer. What ``find`` raises; then the next one tries.
        """
        with locked(self.path / f"{name}.lock", Deadline(seconds)):
            answer = self.path / f"{name}.answer"
            if not answer.exists():
                self._write(answer.name, find())
            return answer.read_text()

    def write_crashes(self, crashes: dict[str, list[str]]) -> None:
        """Why tests are begun again, by node id."""
        self._write("crashes.json", json.dumps(crashes))

    def crashes(self, nodeid: str) -> list[str]:
        try:
            found: dict[str, list[str]] = json.loads((self.path / "crashes.json").read_text())
        except FileNotFoundError:
            return []
        return found.get(nodeid, [])

    def _write(self, name: str, text: str) -> None:
        with tempfile.NamedTemporaryFile("w", dir=self.path, delete=False) as file:
            file.write(text)
        Path(file.name).replace(self.path / name)


class Board:
    """The controller's end of the live line: what each device does now. draw: called with all of it."""

    def __init__(self, folder: Path, draw: Callable[[dict[str, str]], None]) -> None:
        self._now: dict[str, str] = {}
        self._draw = draw
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(str(_board(folder)))
        self._socket.settimeout(0.2)
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._listen, name="board", daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._stopped.set()
        self._thread.join(5)
        self._socket.close()

    def _listen(self) -> None:
        while not self._stopped.is_set():
            with contextlib.suppress(TimeoutError):
                device, _, text = self._socket.recv(_DATAGRAM_BYTES).decode(errors="replace").partition("\n")
                if text:
                    self._now[device] = text
                else:
                    self._now.pop(device, None)
                self._draw(dict(self._now))


class Teller:
    """A worker's end. What cannot be told at once is not told; nor is anything where nobody listens."""

    def __init__(self, folder: Path) -> None:
        self._board = str(_board(folder))
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.setblocking(False)

    def tell(self, device: str, text: str) -> None:
        """text: "" when the device is done."""
        with contextlib.suppress(OSError):
            self._socket.sendto(f"{device}\n{text}".encode()[:_DATAGRAM_BYTES], self._board)


def _board(folder: Path) -> Path:
    return folder / "board"

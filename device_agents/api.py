"""The seams of this room: what a device is, and how bytes get to it and back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Protocol

from device_agents.deadline import Deadline
from kvengine.recipe import SessionRecipe
from kvengine.session import EngineSession


@dataclass(frozen=True)
class Cluster:
    """Cores with the same highest clock."""

    max_khz: int | None  # None: not told
    cores: tuple[int, ...]


@dataclass(frozen=True)
class DeviceIdentity:
    """Who a device is. ``simulated`` is "" for real hardware, else what is simulated ("virtual phone").

    What is not told is "", None or empty, never a guess: a host has no serial and no API level, and a
    kernel without cpufreq tells no clusters.
    """

    name: str
    kind: str  # host, android, simulated
    model: str
    soc: str
    abi: str  # x86_64, arm64-v8a
    os: str
    build: str  # kernel or build fingerprint
    cores: int
    ram_bytes: int
    providers: tuple[str, ...]  # onnxruntime's names, as probed on the device
    runtime: dict[str, str]  # python, numpy, onnxruntime versions on the device
    simulated: str = ""
    serial: str = ""
    api_level: int | None = None  # Android's
    abis: tuple[str, ...] = ()  # all that it runs, the best first
    clusters: tuple[Cluster, ...] = ()  # slowest first
    thermal_sensors: tuple[str, ...] = ()  # names that temperatures come under
    battery: bool | None = None  # whether there is one


@dataclass(frozen=True)
class Vitals:
    """State of a device at one moment; None is "cannot be read here", never a guess."""

    at: float  # Unix time, s
    load_1m: float | None = None
    mem_available_bytes: int | None = None
    clocks_khz: tuple[int, ...] = ()  # current clock of each core
    governor: str | None = None
    temperatures_c: dict[str, float] = field(default_factory=dict)
    thermal_status: int | None = None  # Android's 0..6
    battery_percent: float | None = None
    battery_charging: bool | None = None
    busy_s: float | None = None  # CPU time of all cores since boot that was not idle, s


State = Literal["ok", "note", "fix"]
"""note: it works, but know this. fix: something needs doing."""


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at. do: what to do about it, "" for nothing."""

    what: str
    state: State
    found: str
    do: str = ""


@dataclass(frozen=True)
class RunResult:
    """A finished command on the device."""

    returncode: int
    stdout: bytes
    stderr: bytes


class ByteStream(Protocol):
    """stdin and stdout of one process on the device. Every call takes a deadline."""

    def write(self, data: bytes, deadline: Deadline) -> None: ...

    def read_exactly(self, size: int, deadline: Deadline) -> bytes:
        """Raises RunnerDied at end of file, DeadlineExceeded when late."""
        ...

    def stderr_tail(self) -> str:
        """The last lines the process wrote to stderr."""
        ...

    def close(self) -> None:
        """End the process, by force if it will not go; returns once it is gone."""
        ...


class Transport(Protocol):
    """How a lab host reaches one device."""

    def push(self, source: Path, target: str, deadline: Deadline) -> None: ...

    def pull(self, source: str, target: Path, deadline: Deadline) -> None: ...

    def run(self, argv: Sequence[str], deadline: Deadline) -> RunResult: ...

    def open_stream(self, argv: Sequence[str], environment: dict[str, str]) -> ByteStream: ...


class Device(Protocol):
    """One device that can run the engine. All methods raise InfrastructureError."""

    @property
    def name(self) -> str: ...

    def identity(self, deadline: Deadline) -> DeviceIdentity: ...

    def claim(self, deadline: Deadline) -> dict[str, str]:
        """Before a new user's work: undo what the last one left, then apply the farm file's settings.

        Returns each setting and what it was read back as. Raises SettingFailed besides.
        """
        ...

    def release(self, deadline: Deadline) -> None:
        """After it: put back what ``claim`` changed. What fails is put back at the next claim."""
        ...

    def vitals(self, deadline: Deadline) -> Vitals: ...

    def diagnose(self, deadline: Deadline) -> tuple[Finding, ...]:
        """What is wrong with it, and what to do; one that cannot be reached says just that. Never raises."""
        ...

    def deploy(self, folder: Path, deadline: Deadline) -> str:
        """Bring the artifact in ``folder`` (on the lab host) to the device; only blobs it lacks move.

        Returns the artifact's folder on the device.
        """
        ...

    def open_session(self, remote_folder: str, recipe: SessionRecipe, deadline: Deadline) -> EngineSession:
        """Start a runner and open the artifact in it.

        An engine refusal (kvengine.errors) comes back as itself.
        """
        ...

    def close(self) -> None:
        """Stop what was started to reach the device (a virtual phone, say). Sessions are closed before."""
        ...

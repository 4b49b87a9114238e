"""A Device that is simulated, and says so.

Options of a device of kind "simulated" in farm.toml:

    like           which recorded device it is like: see recorded.json; default "virtual phone"
    seed           of all it draws, with its name; default 0
    time_scale     how long a recorded second takes; default 1
    failure_rate   share of calls that fail, as a runner that dies does; default what was recorded
"""

from __future__ import annotations

import itertools
import random
import threading
import time
from pathlib import Path

from device_agents.api import DeviceIdentity, Finding, Vitals
from device_agents.blobs import parse_manifest
from device_agents.config import DeviceConfig
from device_agents.deadline import Deadline
from device_agents.errors import DeployFailed, NoSuchDevice, RunnerDied
from device_agents.simulated.recorded import recording
from device_agents.simulated.session import Behaviour, SimulatedSession
from kvengine.artifact import MANIFEST, Manifest
from kvengine.recipe import SessionRecipe
from kvengine.session import SessionInfo

KIND = "simulated"
OPTIONS = frozenset({"like", "seed", "time_scale", "failure_rate"})
LIKE = "virtual phone"


def make_simulated(config: DeviceConfig) -> SimulatedDevice:
    """Raises NoSuchDevice: options that make no sense."""
    options = config.options
    if unknown := options.keys() - OPTIONS:
        raise NoSuchDevice(
            f"device {config.name!r}: a simulated device takes {', '.join(sorted(OPTIONS))}, found "
            f"{min(unknown)!r}"
        )
    like = options.get("like", LIKE)
    recorded = recording().of(like)
    behaviour = Behaviour(
        recorded,
        time_scale=_number(config, "time_scale", 1.0, 1e6),
        failure_rate=_number(config, "failure_rate", recorded.failure_rate, 1.0),
    )
    return SimulatedDevice(config.name, like, behaviour, options.get("seed", "0"))


def _number(config: DeviceConfig, option: str, default: float, most: float) -> float:
    text = config.options.get(option, str(default))
    try:
        found = float(text)
    except ValueError:
        found = -1.0
    if not 0 <= found <= most:
        raise NoSuchDevice(
            f"device {config.name!r}: {option}: sought a number from 0 to {most:g}, found {text!r}"
        )
    return found


class SimulatedDevice:
    """See Device. What it draws depends on its seed, its name and how many sessions it had before."""

    def __init__(self, name: str, like: str, behaviour: Behaviour, seed: str) -> None:
        self._name, self._like, self._behaviour, self._seed = name, like, behaviour, seed
        self._sessions = itertools.count()
        self._closed = threading.Event()

    @property
    def name(self) -> str:
        return self._name

    def identity(self, deadline: Deadline) -> DeviceIdentity:
        recorded = self._behaviour.recorded
        return DeviceIdentity(
            name=self._name,
            kind=KIND,
            model=f"simulated {self._like}",
            soc="",
            abi=recorded.abi,
            os="none",
            build="simulated",
            cores=recorded.cores,
            ram_bytes=recorded.ram_bytes,
            providers=(),
            runtime={},
            simulated=f"all of it, no engine; latencies are drawn from those of {recorded.what}",
        )

    def claim(self, deadline: Deadline) -> dict[str, str]:
        """Nothing on it can be changed."""
        return {}

    def release(self, deadline: Deadline) -> None:
        """As ``claim``."""

    def vitals(self, deadline: Deadline) -> Vitals:
        """It has none to read."""
        return Vitals(at=time.time())

    def diagnose(self, deadline: Deadline) -> tuple[Finding, ...]:
        return (Finding("simulated", "note", f"like {self._like}, time × {self._behaviour.time_scale:g}"),)

    def deploy(self, folder: Path, deadline: Deadline) -> str:
        """Nothing is copied; raises DeployFailed where there is no artifact."""
        _manifest(folder)
        return str(folder)

    def open_session(self, remote_folder: str, recipe: SessionRecipe, deadline: Deadline) -> SimulatedSession:
        """Takes as long as to start a runner does. Raises RunnerDied, DeployFailed."""
        manifest = _manifest(Path(remote_folder))
        draws = random.Random(f"{self._seed}/{self._name}/{next(self._sessions)}")
        recorded, scale = self._behaviour.recorded, self._behaviour.time_scale
        fails = draws.random() < self._behaviour.failure_rate
        open_s = recorded.open_s.draw(draws)
        if self._closed.wait(min(deadline.remaining, open_s * scale)) or fails:
            raise RunnerDied(f"{self._name}: open: the simulated runner died, as its failure rate has it")
        info = SessionInfo(
            artifact_id=manifest.id,
            session=recipe,
            load_ms=recorded.load_ms.draw(draws),
            onnxruntime="none",
            numpy="none",
            python="none",
            nodes_by_provider={},
        )
        return SimulatedSession(info, self._behaviour, draws, manifest.spec.vocab_size, open_s)

    def close(self) -> None:
        self._closed.set()


def _manifest(folder: Path) -> Manifest:
    try:
        return parse_manifest((folder / MANIFEST).read_text())
    except OSError as error:
        raise DeployFailed(f"sought {MANIFEST} in {folder}: {error}") from error

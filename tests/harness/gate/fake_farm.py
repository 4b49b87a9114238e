"""A farm of made-up devices: what a leg measures is a formula, so that a whole gate takes a second."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from device_agents.api import DeviceIdentity, Vitals
from device_agents.errors import InfrastructureError
from device_agents.recording.record import Record
from device_agents.results import Kept, Key
from harness.gate.canary import PRESET
from harness.spans import Recorder, recording_nothing
from kvengine.artifact import Artifact
from kvengine.bandwidth import Bandwidth
from kvengine.program import Measurement, Sample, Workload
from kvengine.recipe import SessionRecipe
from kvengine.session import SessionInfo


@dataclass
class FakeDevice:
    """loss: of the candidate (a ratio - 1). noise: SD of a leg. drift: of the canary, each time it runs.

    heavier: the candidate weighs so much more, a ratio - 1. before_leg: called before each timed leg, with
    the number of legs so far; may raise. before_weighing: likewise.
    """

    name: str
    kind: str = "android"
    model: str = "Pixel 8"
    loss: float = 0.0
    noise: float = 0.005
    drift: float = 0.0
    vitals: Callable[[], Vitals] = lambda: Vitals(at=1.0)
    before_leg: Callable[[int], None] = lambda number: None
    before_weighing: Callable[[int], None] = lambda number: None
    silent: bool = False  # does not say who it is
    heavier: float = 0.0
    weight_noise: float = 0.0  # SD of a weighing
    legs: int = 0
    weighings: int = 0
    canaries: int = 0


@dataclass
class FakeFarm:
    """The part of harness.farm.Farm that a gate uses. candidate: the artifact that is slower by ``loss``."""

    devices: dict[str, FakeDevice]
    candidate: str = ""
    tokens: dict[str, int] = field(default_factory=dict)  # by artifact; equal unless said
    seed: int = 7
    results: dict[Key, Kept] = field(default_factory=dict)
    recorder: Recorder = field(default_factory=recording_nothing)

    def __post_init__(self) -> None:
        self.rng = np.random.default_rng(self.seed)
        self.opened: list[tuple[str, str]] = []

    def identity(self, name: str) -> DeviceIdentity:
        device = self.devices[name]
        if device.silent:
            raise InfrastructureError("it does not say who it is")
        return DeviceIdentity(
            name, device.kind, device.model, "soc", "arm64-v8a", "Android 16", "b", 8, 1 << 33, (), {}
        )

    def vitals(self, name: str) -> Vitals:
        return self.devices[name].vitals()

    def settings(self, name: str) -> dict[str, str]:
        return {}

    def kept(self, name: str, key: Key) -> Kept | None:
        return self.results.get(key)

    def acknowledge(self, name: str, leg: str) -> None:
        self.results = {key: kept for key, kept in self.results.items() if key.leg != leg}

    def open(self, name: str, artifact: Artifact, recipe: SessionRecipe, progress: Any = None) -> FakeSession:
        return FakeSession(self, self.devices[name], artifact)


class FakeSession:
    """One session; ``closed`` as harness.device_session.DeviceSession has it."""

    def __init__(self, farm: FakeFarm, device: FakeDevice, artifact: Artifact) -> None:
        self._farm, self._device, self._artifact = farm, device, artifact
        self.closed = False
        self.info = SessionInfo(artifact.id, SessionRecipe(), 1.0, "1", "2", "3", {})

    def run_workload(self, workload: Workload) -> Measurement:
        device = self._device
        if self._is_canary(workload):
            device.canaries += 1
            return self._measured(workload, 1.0 + device.drift * (device.canaries % 2), 1 << 20)
        if not workload.warmup:
            device.weighings += 1
            device.before_weighing(device.weighings)
            loss = device.heavier if self._artifact.id == self._farm.candidate else 0.0
            weight = (100 << 20) * (1 + loss)
            if device.weight_noise:
                rng = np.random.default_rng(self._farm.seed + 1000 * device.weighings)
                weight *= float(np.exp(rng.normal(0, device.weight_noise)))
            return self._measured(workload, 1.0, round(weight) + workload.ballast_bytes)
        device.before_leg(device.legs)
        device.legs += 1
        self._farm.opened.append((device.name, self._artifact.id))
        loss = device.loss if self._artifact.id == self._farm.candidate else 0.0
        noise = float(self._farm.rng.normal(0, device.noise)) if device.noise else 0.0
        factor = (1 + loss) * (1 + workload.slowdown) * float(np.exp(noise))
        return self._measured(workload, factor, 1 << 30)  # of a process that is not weighed

    def measure(self, workload: Workload, plan: Any, key: Key | None = None, note: str = "") -> Kept:
        record = Record(note="a made-up device records nothing")
        kept = Kept(self.run_workload(workload), record, note=note)
        if key is not None:
            self._farm.results[key] = kept
        return kept

    def close(self) -> None:
        self.closed = True

    def __enter__(self) -> FakeSession:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _is_canary(self, workload: Workload) -> bool:
        return self._artifact.manifest.checkpoint == PRESET and workload.repeats == 40

    def _measured(self, workload: Workload, factor: float, rss: int) -> Measurement:
        first = self._farm.tokens.get(self._artifact.id, 1)
        tokens = tuple(itertools.islice(itertools.count(first), workload.new_tokens))
        gaps = (10.0 * factor,) * (workload.new_tokens - 1)
        samples = tuple(Sample(100.0 * factor, gaps, tokens) for _ in range(workload.repeats))
        speed = Bandwidth(20e9, 1 << 29, 8, 0) if workload.bandwidth else None
        nodes = {"CPUExecutionProvider": 9}
        return Measurement(samples, 1.0, rss, 4096, nodes, threads=2, bandwidth=speed)

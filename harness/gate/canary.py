"""The frozen canary: a small model that never changes, run before and after every block.

It knows nothing of baseline and candidate. Where it moved by more than MOST_DRIFT, the device did,
and the block decides nothing.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from device_agents.errors import InfrastructureError
from harness.artifacts import artifact_for
from harness.device_session import DeviceSession
from harness.farm import Farm
from harness.measuring import workload_for
from harness.presets import PRESETS
from harness.recipes import parse_recipe
from harness.synth import synth
from kvengine.artifact import Artifact
from kvengine.program import Measurement, Workload

PRESET, RECIPE, SEED = "tiny-gemma3", "static,threads=1", 0
PROMPT, NEW_TOKENS, REPEATS = 64, 64, 40  # about 0.4 s on a host
MOST_DRIFT = 0.03


def canary_artifact(cache: Path) -> Artifact:
    """The canary's model, made from its seed once; another folder where kvfarm makes it otherwise."""
    checkpoint = synth(PRESET, cache / "canary" / PRESETS[PRESET].fingerprint / PRESET, seed=SEED)
    return artifact_for(checkpoint, parse_recipe(RECIPE).export, cache / "artifacts")


class Canary:
    """On one device, in one session that stays open between blocks. Use ``close``."""

    def __init__(self, farm: Farm, device: str, artifact: Artifact) -> None:
        self._farm = farm
        self._device = device
        self.artifact = artifact
        self.workload: Workload = workload_for(artifact.manifest.spec, PROMPT, NEW_TOKENS, REPEATS, SEED)
        self._session: DeviceSession | None = None

    def run(self) -> Measurement:
        """Raises InfrastructureError; the next call opens another session."""
        if self._session is None or self._session.closed:
            self._session = self._farm.open(self._device, self.artifact, parse_recipe(RECIPE).session)
        try:
            return self._session.run_workload(self.workload)
        except InfrastructureError:
            self.close()
            raise

    def close(self) -> None:
        session, self._session = self._session, None
        if session is not None:
            session.close()


def speed(itl_ms: list[float]) -> float:
    """ms a token: the median, which a single interruption does not move."""
    return float(np.median(itl_ms))


def drift(before_ms: float, after_ms: float) -> float:
    """How far the canary moved, as a share; positive is slower."""
    return after_ms / before_ms - 1

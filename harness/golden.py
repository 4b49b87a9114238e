"""The golden job: a program so small that a sound device is done with it at once, and whose answer is known.

A device may answer adb and be dead all the same (STF #560; LAVA has health-check jobs). So before work begins
on it, after an infrastructure failure, and to lift a quarantine, it prefills and decodes on a tiny model. The
answer is PyTorch's, written down here; a test computes it anew.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from device_agents.deadline import Deadline
from device_agents.locking import locked
from harness.artifacts import artifact_for
from harness.errors import GoldenJobFailed
from harness.quiet import WAIT_S
from harness.synth import synth
from kvengine.artifact import Artifact
from kvengine.plan import CachePlan
from kvengine.program import Decode, Generate, Observation, Prefill, Program
from kvengine.recipe import ExportRecipe, SessionRecipe

PRESET = "tiny-gemma3"
EXPORT = ExportRecipe(cache=CachePlan("hybrid"))
SESSION = SessionRecipe(threads=1)
PROMPT = (2, 17, 230, 5, 91, 44, 180, 7)
# transformers' greedy tokens after the prompt, and its five largest logits after the last of them.
TOKENS = (37, 79, 11, 116, 249, 213, 306, 209, 219, 232, 14, 142, 249, 129, 300, 255)
LOGITS = {327: 2.74379, 209: 2.58251, 274: 2.32746, 10: 2.21962, 11: 2.16977}
TOLERANCE = 1e-3  # float32, whatever the order of sums; the closest two logits on the way are 0.013 apart
PROGRAM = Program(
    64, (Prefill(PROMPT[:-1], 3, "last"), Generate(PROMPT[-1], len(TOKENS)), Decode(TOKENS[-1:]))
)


def artifact(cache: Path, progress: Callable[[str, int, int], None] | None = None) -> Artifact:
    """The tiny model's, made once in ``cache``."""
    folder = cache / "golden"
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder / "making.lock", Deadline(WAIT_S)):
        return artifact_for(synth(PRESET, folder / PRESET), EXPORT, folder / "artifacts", progress)


def judge(device: str, observations: Sequence[Observation]) -> None:
    """Raises GoldenJobFailed: this is not the answer, so nothing that the device says can be relied on."""
    said = f"{device}: golden job: sought tokens {TOKENS}"
    if len(observations) != len(PROGRAM.operations):
        raise GoldenJobFailed(f"{said}, found {len(observations)} observations; see to the device")
    refused = next((each.error for each in observations if each.error is not None), None)
    if refused is not None:
        raise GoldenJobFailed(f"{said}, found a refusal: {refused.message}; see to the device")
    _, generated, last = observations
    if generated.tokens != TOKENS:
        raise GoldenJobFailed(f"{said}, found {generated.tokens}; its memory or its runtime is broken")
    if last.logits.ndim != 2 or last.logits.shape[0] != 1 or last.logits.shape[1] <= max(LOGITS):
        raise GoldenJobFailed(f"{said}, found logits of shape {last.logits.shape}; see to the device")
    row = last.logits[0]
    worst = max(abs(float(row[token]) - value) for token, value in LOGITS.items())
    if not np.all(np.isfinite(row)) or worst > TOLERANCE:
        raise GoldenJobFailed(f"{said}, found them with logits that are {worst:.3g} off; see to the device")

"""One leg: a fresh process, a workload, the device's state around it, and whether to believe it."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Sequence
from typing import Literal

import numpy as np

from device_agents.api import Vitals
from kvengine.codec import decode, encode
from kvengine.program import Measurement, Sample, Workload
from kvengine.spec import ModelSpec
from reports.results import DuringInfo, SampleInfo, VitalsInfo

Validity = Literal["VALID", "NOISY", "INVALID"]

# A median of inter-token latency that moves more than this between the repeats of one leg
# cannot carry a comparison of a few per cent.
NOISY_SPREAD = 0.10
# Runnable processes beyond the engine's own threads that make a host measurement suspect.
BUSY_LOAD = 1.0


def workload_for(spec: ModelSpec, prompt: int, new_tokens: int, repeats: int, seed: int) -> Workload:
    """A random prompt that, with its new tokens, fits the model; the same for every device and recipe."""
    room = spec.max_position - new_tokens
    draw = random.Random(seed)
    tokens = tuple(draw.randrange(spec.vocab_size) for _ in range(max(1, min(prompt, room))))
    return Workload(tokens, new_tokens, repeats)


def judge(
    measurement: Measurement, before: Vitals, after: Vitals, during: DuringInfo | None = None
) -> tuple[Validity, tuple[str, ...]]:
    """VALID, NOISY or INVALID, with every reason."""
    invalid, noisy = [], []
    if not measurement.samples:
        invalid.append("no sample came back")
    tokens = {sample.tokens for sample in measurement.samples}
    if len(tokens) > 1:
        invalid.append("repeats of the same prompt gave different tokens")
    spread = relative_spread([float(np.median(s.itl_ms)) for s in measurement.samples if s.itl_ms])
    if spread > NOISY_SPREAD:
        noisy.append(f"median inter-token latency moved by {spread:.0%} between repeats")
    if before.load_1m is not None and before.load_1m > BUSY_LOAD + measurement.threads:
        noisy.append(f"load average was {before.load_1m:.1f} before the leg")
    for vitals, when in ((before, "before"), (after, "after")):
        if vitals.thermal_status:
            invalid.append(f"thermal status was {vitals.thermal_status} {when} the leg")
    if during is not None and during.thermal_status:
        invalid.append(f"thermal status was {during.thermal_status} during the leg")
    verdict: Validity = "INVALID" if invalid else "NOISY" if noisy else "VALID"
    return verdict, (*invalid, *noisy)


def relative_spread(values: Sequence[float]) -> float:
    """(largest - smallest) / median; 0 for fewer than two values."""
    if len(values) < 2:
        return 0.0
    return float((max(values) - min(values)) / np.median(values))


def sample_info(sample: Sample) -> SampleInfo:
    return SampleInfo(sample.ttft_ms, sample.itl_ms)


def vitals_info(vitals: Vitals) -> VitalsInfo:
    """The report's copy of the device's vitals: same fields, other room."""
    names = {field.name for field in dataclasses.fields(VitalsInfo)}
    return decode(VitalsInfo, {k: v for k, v in encode(vitals).items() if k in names})

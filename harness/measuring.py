"""One leg: a fresh process, a workload, the device's state around it, and whether to believe it."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import random
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from device_agents.api import Vitals
from kvengine.artifact import Artifact
from kvengine.bandwidth import Bandwidth
from kvengine.codec import decode, encode
from kvengine.errors import ArtifactError, InvalidRequest
from kvengine.program import Measurement, Sample, Workload
from kvengine.spec import ModelSpec
from reports.results import BandwidthInfo, DuringInfo, SampleInfo, StepReads, SustainedInfo, VitalsInfo

Validity = Literal["VALID", "NOISY", "INVALID"]

# A median of inter-token latency that moves more than this between the repeats of one leg
# cannot carry a comparison of a few per cent.
NOISY_SPREAD = 0.10
# Cores that a host has at work while nothing of ours runs there, above which it is not fit to measure on.
BUSY_CORES = 0.25
LOOK_S = 0.5  # over which they are counted


@dataclass(frozen=True)
class Shape:
    """How long the parts of a workload are, in tokens.

    depth: tokens in the cache before the prompt comes. sustained_s: generations back to back until the speed
    settles, for at most so long; 0: a burst.
    """

    prompt: int = 128
    new_tokens: int = 64
    depth: int = 0
    sustained_s: float = 0.0

    @property
    def key(self) -> str:
        """For names of tests: ``128+64@1024-sustained``."""
        depth = f"@{self.depth}" if self.depth else ""
        return f"{self.prompt}+{self.new_tokens}{depth}" + ("-sustained" if self.sustained_s else "")

    @property
    def label(self) -> str:
        """``sustained, prompt 128 + 64 new at depth 1,024``."""
        kind = "sustained, " if self.sustained_s else ""
        depth = f" at depth {self.depth:,}" if self.depth else ""
        return f"{kind}prompt {self.prompt} + {self.new_tokens} new{depth}"


def shapes(
    prompts: Sequence[int], new_tokens: Sequence[int], depths: Sequence[int], sustained_s: float = 0.0
) -> tuple[Shape, ...]:
    """Every combination as a burst; then, with ``sustained_s``, the first combination as a sustained run."""
    bursts = tuple(Shape(*each) for each in itertools.product(prompts, new_tokens, depths))
    return bursts + ((dataclasses.replace(bursts[0], sustained_s=sustained_s),) if sustained_s else ())


def lengths(text: str, least: int = 1) -> tuple[int, ...]:
    """``32,128,512`` as numbers of tokens. Raises ValueError."""
    found = [part.strip() for part in text.split(",") if part.strip()]
    if not found or not all(part.isascii() and part.isdigit() and int(part) >= least for part in found):
        raise ValueError(f"sought whole numbers of at least {least} such as 32,128, found {text!r}")
    return tuple(dict.fromkeys(map(int, found)))


def workload_for(
    spec: ModelSpec, prompt: int, new_tokens: int, repeats: int, seed: int, depth: int = 0
) -> Workload:
    """A random prompt that, with its new tokens, fits the model; the same for every device and recipe.

    Raises:
        InvalidRequest: the model holds no context of ``depth`` tokens with anything on top.
    """
    room = spec.max_position - new_tokens - depth
    if depth and room < 1:
        raise InvalidRequest(
            f"sought room for {new_tokens} new tokens at depth {depth:,}, the model holds "
            f"{spec.max_position:,}"
        )
    draw = random.Random(seed)
    tokens = [draw.randrange(spec.vocab_size) for _ in range(max(1, min(prompt, room)) + depth)]
    return Workload(tuple(tokens[depth:]), new_tokens, repeats, context=tuple(tokens[:depth]))


def wait(seconds: float) -> None:
    threading.Event().wait(seconds)


def busy_cores(
    first: Vitals, look: Callable[[], Vitals], pause: Callable[[float], None] = wait
) -> float | None:
    """Cores at work over LOOK_S from ``first`` on, asked while nothing of ours runs there: other processes'.

    None where the CPU time cannot be read. The load average cannot tell it: for minutes it is what we
    ourselves did before. Raises what ``look`` raises.
    """
    if first.busy_s is None:
        return None
    pause(LOOK_S)
    second = look()
    if second.busy_s is None or second.at <= first.at:
        return None
    return max(0.0, (second.busy_s - first.busy_s) / (second.at - first.at))


def busy_with_others(cores: float | None, limit: float = BUSY_CORES) -> str:
    """Why a host with so many ``cores`` at work is not fit to measure on, "" if it is."""
    if cores is None or cores <= limit:
        return ""
    return f"other processes use {cores:.2f} cores, over {limit:.2f}"


def judge(
    measurement: Measurement,
    before: Vitals,
    after: Vitals,
    during: DuringInfo | None = None,
    sustained: SustainedInfo | None = None,
    busy: float | None = None,
) -> tuple[Validity, tuple[str, ...]]:
    """VALID, NOISY or INVALID, with every reason. busy: see ``busy_cores``, from before the leg."""
    invalid, noisy = [], []
    if not measurement.samples:
        invalid.append("no sample came back")
    tokens = {sample.tokens for sample in measurement.samples}
    if len(tokens) > 1:
        invalid.append("repeats of the same prompt gave different tokens")
    # A sustained run is expected to move before it settles.
    spread = (
        0.0
        if sustained
        else relative_spread([float(np.median(s.itl_ms)) for s in measurement.samples if s.itl_ms])
    )
    if spread > NOISY_SPREAD:
        noisy.append(f"median inter-token latency moved by {spread:.0%} between repeats")
    if sustained is not None and not sustained.settled:
        noisy.append("the speed had not settled when time was up")
    if others := busy_with_others(busy):
        noisy.append(f"before the leg {others}")
    for vitals, when in ((before, "before"), (after, "after")):
        if vitals.thermal_status:
            invalid.append(f"thermal status was {vitals.thermal_status} {when} the leg")
    if during is not None and during.thermal_status:
        invalid.append(f"thermal status was {during.thermal_status} during the leg")
    verdict: Validity = "INVALID" if invalid else "NOISY" if noisy else "VALID"
    return verdict, (*invalid, *noisy)


def relative_spread(values: Sequence[float]) -> float:
    """(largest - smallest) / median; 0 for fewer than two values.

    Of every five values the one farthest from the median is left out: what is reported of a leg is a median
    too, which a single interrupted repeat does not move.
    """
    if len(values) < 2:
        return 0.0
    middle = float(np.median(values))
    nearest = sorted(values, key=lambda value: abs(value - middle))
    kept = nearest[: len(values) - len(values) // 5]
    return (max(kept) - min(kept)) / middle


def step_reads(artifact: Artifact, workload: Workload) -> StepReads | None:
    """What a decode step of ``workload`` has to read, by the artifact's graph and cache plan; None where the
    graph cannot be read here."""
    spec, cache = artifact.manifest.spec, artifact.manifest.recipe.cache
    before = len(workload.context) + len(workload.prompt)
    # The first token comes from the prompt, so n tokens are n - 1 steps.
    totals = range(before + 1, before + max(2, workload.new_tokens))
    kv = sum(cache.step_bytes(spec, total) for total in totals) // len(totals)
    try:
        return StepReads(_weight_bytes(artifact.model_path), kv)
    except ArtifactError:
        return None


@functools.cache
def _weight_bytes(model: Path) -> int:
    from kvengine.export.reads import weight_bytes  # onnx takes a moment, and not every command needs it

    return weight_bytes(model)


def bandwidth_info(found: Bandwidth | None) -> BandwidthInfo | None:
    return None if found is None else BandwidthInfo(**dataclasses.asdict(found))


def sample_info(sample: Sample) -> SampleInfo:
    return SampleInfo(sample.ttft_ms, sample.itl_ms)


def vitals_info(vitals: Vitals) -> VitalsInfo:
    """The report's copy of the device's vitals: same fields, other room."""
    names = {field.name for field in dataclasses.fields(VitalsInfo)}
    return decode(VitalsInfo, {k: v for k, v in encode(vitals).items() if k in names})

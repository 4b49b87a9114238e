"""What a gate or a calibration found, as plain data; part of reports.results.RunResults.

Ratios are candidate / baseline - 1, oriented so that positive is worse.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

GateVerdict = Literal["PASS", "REGRESSED", "INCONCLUSIVE", "INVALID"]
Arm = Literal["baseline", "candidate", "canary"]
AA = "A/A"  # the comparison of a calibration that injects nothing
GATE = "gate"  # the only comparison of a gate


@dataclass(frozen=True)
class Place:
    """Where a leg stands. position: 0..3 in its block; the canary has -1 before it and 4 after it. Of a pair
    of weighings (LegResult.memory_pass) ``block`` is the pair, and positions are 5 and 6.

    tokens: sha256 over the tokens of all repeats, "" where none came back. waited_s: for the entry
    condition. given_up: it was not met within the time allowed, and why.
    """

    comparison: str
    workload: str
    block: int
    position: int
    arm: Arm
    tokens: str = ""
    waited_s: float = 0.0
    given_up: str = ""


@dataclass(frozen=True)
class Side:
    """Baseline or candidate. ``ref`` is as it was given; ``recipe`` says what it is.

    session: the kvengine SessionRecipe as JSON.
    """

    ref: str
    recipe: str
    artifact: str  # sha256
    session: str


@dataclass(frozen=True)
class Injection:
    """What a calibration adds to its candidate: a share of each step's time, and of the peak memory."""

    slowdown: float = 0.0
    memory: float = 0.0


@dataclass(frozen=True)
class Comparison:
    """A pair that is measured in blocks. A gate has one; a calibration one for each injection."""

    name: str
    injection: Injection = Injection()


@dataclass(frozen=True)
class BlockInfo:
    """One block, used or void. data: block datum (log ratio) by metric. drift: of the canary, a share."""

    device: str
    comparison: str
    workload: str
    index: int
    order: str  # ABBA or BAAB
    reasons: tuple[str, ...]  # why it is void; () for one that counts
    drift: float | None
    waited_s: float
    data: dict[str, float]


@dataclass(frozen=True)
class WaiverInfo:
    """One entry of waivers.toml and what became of it."""

    cell: str
    allowed: float
    owner: str
    reason: str
    issue: str
    expires: str  # ISO date
    state: Literal["used", "unused", "expired"]


@dataclass(frozen=True)
class GateCell:
    """One device (or all units of one model), model, workload and metric. Values in the metric's unit.

    blocks: valid block data (log ratios) in order. low, high: one-sided bounds at the look's alpha.
    tails: (arm, quantile, value, samples) of repeats pooled; value is None where samples are too few.
    units: 0 for a device; else how many units of the model stand in it.
    """

    id: str
    comparison: str
    device: str
    model: str
    workload: str
    metric: str
    title: str
    unit: str
    exact: bool
    gating: bool
    advisory: str  # why it does not gate, "" if it does
    margin: float
    verdict: GateVerdict
    reason: str
    baseline: float | None = None
    candidate: float | None = None
    blocks: tuple[float, ...] = ()
    void: int = 0
    looks: int = 0
    estimate: float | None = None
    low: float | None = None
    high: float | None = None
    sd: float | None = None
    p: float | None = None
    sign_flip: float | None = None
    tails: tuple[Tail, ...] = ()
    units: int = 0
    waived: str = ""  # the waiver's reason, where one let it through


@dataclass(frozen=True)
class Tail:
    """A quantile of repeats pooled over legs, ms; None where MLPerf's floor of samples is not reached."""

    arm: Arm
    quantile: str  # p50, p90, p99
    value: float | None
    samples: int
    needed: int


@dataclass(frozen=True)
class CalibratedCell:
    """What calibration knows of one cell. found: what the gate said of injected losses.

    detectable_8, _32: smallest loss (ratio - 1) called REGRESSED 95 % of the time with so many blocks.
    estimate, low, high, sd: of the newest A/A blocks.
    """

    device: str
    model: str
    workload: str
    metric: str
    title: str
    margin: float
    trials: int  # A/A verdicts
    false_regressed: int
    estimate: float | None
    low: float | None
    high: float | None
    sd: float | None  # log ratios
    detectable_8: float | None
    detectable_32: float | None
    found: tuple[InjectionFound, ...] = ()
    revoked: str = ""  # why it lost its gating rights
    blocks: int = 0  # A/A blocks in all (of memory, pairs of weighings)
    waiting: int = 0  # those of nights' slots that are in no verdict yet
    size: int = 0  # blocks that are one verdict


@dataclass(frozen=True)
class InjectionFound:
    """One injected loss of one cell: what it truly was, what was measured, what the gate said."""

    comparison: str
    injected: float  # ratio - 1
    estimate: float | None
    verdict: GateVerdict


@dataclass(frozen=True)
class CalibrationInfo:
    """This gate's own error rates, from the calibrations in the store."""

    runs: tuple[str, ...]  # run ids, newest first
    at: str  # of the newest, ISO 8601
    trials: int  # A/A verdicts that were reached, all cells and runs (of slots: over several nights)
    false_regressed: int
    false_low: float  # Clopper-Pearson, 95 %
    false_high: float
    cells: tuple[CalibratedCell, ...]


@dataclass(frozen=True)
class CheckedInfo:
    """What the newest run of the correctness suite said of the candidate's recipe on one device.

    run_id: "" where it was never checked there. failed: titles of what did not pass. worst_share: the largest
    error of all that passed, as a share of its tolerance.
    """

    device: str
    recipe: str
    run_id: str = ""
    at: str = ""  # ISO 8601, UTC
    commit: str = ""  # of kvfarm then
    passed: int = 0
    total: int = 0
    failed: tuple[str, ...] = ()
    worst_share: float | None = None


@dataclass(frozen=True)
class GateInfo:
    """All of a gate or a calibration. ``plan_key`` names what is compared: a killed run goes on under it."""

    kind: Literal["gate", "calibration"]
    plan_key: str
    baseline: Side
    candidate: Side
    comparisons: tuple[Comparison, ...]
    looks: tuple[int, ...]
    alpha: float  # of all looks together
    level: float  # of one look
    planned_cells: int
    settings: str  # where margins come from: a file, or "defaults"
    verdict: GateVerdict = "INVALID"
    exit_code: int = 4
    cells: tuple[GateCell, ...] = ()
    blocks: tuple[BlockInfo, ...] = ()
    waivers: tuple[WaiverInfo, ...] = ()
    calibration: CalibrationInfo | None = None
    notes: tuple[str, ...] = ()
    drill: str = ""  # what was made wrong on purpose
    checked: tuple[CheckedInfo, ...] = ()  # one a device
    slots: int = 0  # of a night's A/A: so many blocks, over nights, are one verdict; 0: this is a whole run

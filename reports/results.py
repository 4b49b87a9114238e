"""What a run found, as plain data: the content of results.json and the input of every page.

Written by the harness from the store; this room only reads it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from reports.ablation_results import AblationInfo
from reports.gate_results import GateInfo, Place

# not_supported: the check needs what the model under test cannot do; it proves nothing and is no failure.
Outcome = Literal["passed", "failed", "infrastructure", "not_run", "not_supported"]


@dataclass(frozen=True)
class ClusterInfo:
    """Cores with the same highest clock."""

    max_khz: int | None  # None: not told
    cores: tuple[int, ...]


@dataclass(frozen=True)
class DeviceInfo:
    """One device of the run. ``simulated`` says what is simulated, "" for real hardware."""

    name: str
    kind: str
    model: str
    soc: str
    abi: str
    os: str
    build: str
    cores: int
    ram_bytes: int
    providers: tuple[str, ...]
    runtime: dict[str, str]
    simulated: str = ""
    serial: str = ""
    api_level: int | None = None
    abis: tuple[str, ...] = ()
    clusters: tuple[ClusterInfo, ...] = ()
    thermal_sensors: tuple[str, ...] = ()
    battery: bool | None = None
    quarantined: str = ""  # the evidence, where the device was set aside during the run
    effort: float = 1.0  # share of the programs and repeats asked for that it got
    results: int = 0  # its newest over all runs, when this one ended, 100 at most
    stopped: int = 0  # how many of them infrastructure stopped, for good or until a retry
    unfit_s: float = 0.0  # waited in this run until it was cool and charged
    unfit: str = ""  # what was wrong with it at first


@dataclass(frozen=True)
class TopLogits:
    """The five largest logits of one step, largest first."""

    tokens: tuple[int, ...]
    values: tuple[float | None, ...]  # None: not finite


@dataclass(frozen=True)
class Divergence:
    """Where a failing program first left the reference."""

    operation: int  # index into the program
    row: int  # row of that operation's logits
    position: int  # token position
    error: float | None  # max abs logit difference at that row; None: not finite
    expected: TopLogits
    found: TopLogits
    layer: int | None = None


@dataclass(frozen=True)
class CheckResult:
    """One check on one device with one recipe."""

    device: str
    recipe: str
    check: str  # test function name
    title: str  # the property, in words
    outcome: Outcome
    seconds: float
    programs: int  # programs run on the device
    worst_error: float | None  # max abs logit difference over all passing programs
    tolerance: float | None  # of worst_error; 0 is bit by bit; None: judged by mean_kl instead
    mean_kl: float | None = None  # KL divergence from the reference, mean over rows, nats
    kl_tolerance: float | None = None  # of mean_kl
    message: str = ""
    program: str = ""  # JSON of the minimal failing program
    replay: str = ""  # one-line command
    divergence: Divergence | None = None
    stderr_tail: str = ""
    retries: tuple[str, ...] = ()  # infrastructure failures after each of which it was tried again


@dataclass(frozen=True)
class VitalsInfo:
    """Device state around a leg; None where it cannot be read."""

    at: float
    load_1m: float | None = None
    mem_available_bytes: int | None = None
    clocks_khz: tuple[int, ...] = ()
    governor: str | None = None
    temperatures_c: dict[str, float] = field(default_factory=dict)
    thermal_status: int | None = None
    battery_percent: float | None = None
    battery_charging: bool | None = None


@dataclass(frozen=True)
class DuringInfo:
    """What the device recorded of itself during a leg; None where it cannot be read.

    clocks: "cores 0-3: lowest–highest MHz" of cores that move together. note: why it is not whole.
    """

    samples: int = 0
    seconds: float = 0.0
    peak_c: float | None = None
    hottest: str = ""  # the sensor of peak_c; those that never move do not count
    thermal_status: int | None = None  # the highest
    clocks: tuple[str, ...] = ()
    governor: str | None = None
    battery_percent: tuple[float, float] | None = None  # first, last
    pss_bytes: int | None = None  # of the runner, the highest
    swap_bytes: int | None = None
    minor_faults: int | None = None
    major_faults: int | None = None
    cgroup: str = ""
    cpuset: str = ""
    note: str = ""


@dataclass(frozen=True)
class EnergyInfo:
    """Energy for each token; without a number ``reason`` says why. See device_agents.energy.Energy."""

    rung: Literal["rails", "gauge", "unsupported"] = "unsupported"
    reason: str = "not asked for (--energy)"
    net_j_per_token: float | None = None
    gross_j_per_token: float | None = None
    uncertainty: float | None = None
    idle_w: float | None = None
    tokens: int = 0
    window_s: float = 0.0
    cross_check: float | None = None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class SampleInfo:
    """One repeat: time to first token and one inter-token latency per further token, ms."""

    ttft_ms: float
    itl_ms: tuple[float, ...]


@dataclass(frozen=True)
class SustainedInfo:
    """Generations back to back until the speed has settled, or time was up.

    seconds: of each point, from the start, at its end. tokens_per_s: decode speed of each point.
    settled: the speed had stopped moving. first, last: median speed of the first and of the last points.
    temperatures_c: (s from the start, °C) of ``sensor``, the hottest that moved.
    clocks_mhz: (s from the start, MHz) of the fastest core then.
    """

    seconds: tuple[float, ...]
    tokens_per_s: tuple[float, ...]
    settled: bool
    first: float
    last: float
    sensor: str = ""
    temperatures_c: tuple[tuple[float, float], ...] = ()
    clocks_mhz: tuple[tuple[float, float], ...] = ()


@dataclass(frozen=True)
class BandwidthInfo:
    """How fast a device reads memory: ``bytes_per_s`` with ``threads`` threads, from ``buffer_bytes``.

    cache_bytes: of its last-level cache, 0 where the system does not tell.
    """

    bytes_per_s: float
    buffer_bytes: int
    threads: int
    cache_bytes: int


@dataclass(frozen=True)
class StepReads:
    """Bytes that one decode step has to read. kv: of the cache, mean over the steps of a generation."""

    weights: int
    kv: int


@dataclass(frozen=True)
class LegResult:
    """One fresh-process measurement."""

    device: str
    recipe: str
    model: str  # checkpoint name
    workload: str  # e.g. "prompt 128 + 64 new"
    prompt_tokens: int
    new_tokens: int
    load_ms: float
    samples: tuple[SampleInfo, ...]
    peak_rss_bytes: int
    kv_bytes: int
    nodes_by_provider: dict[str, int]
    threads: int
    validity: Literal["VALID", "NOISY", "INVALID"]
    reasons: tuple[str, ...]
    vitals_before: VitalsInfo
    vitals_after: VitalsInfo
    provenance: dict[str, str]  # commit, artifact sha256, onnxruntime, build, ...
    notes: tuple[str, ...] = ()
    during: DuringInfo | None = None
    energy: EnergyInfo = EnergyInfo()
    place: Place | None = None  # in the blocks of a gate
    retries: tuple[str, ...] = ()  # as in CheckResult
    depth: int = 0  # tokens in the cache before the prompt
    memory_pass: bool = False  # peak_rss_bytes is of a process of its own, which did one generation
    sustained: SustainedInfo | None = None
    reads: StepReads | None = None
    bandwidth: BandwidthInfo | None = None  # measured beside one leg of each device and run
    key: str = ""  # which leg of its run it is: one row, however often it is delivered


@dataclass(frozen=True)
class RecipeInfo:
    """A named recipe and what it means."""

    name: str
    settings: dict[str, str]


@dataclass(frozen=True)
class MutantInfo:
    """One known bug that was put into the engine. killed_by: the suite's first property that found it."""

    name: str
    number: int  # in the bug catalogue
    source: str
    killed_by: str  # "" if it survived
    also: tuple[str, ...]  # properties that found it as well
    examples: int  # programs until then
    seconds: float  # until then
    recipe: str
    model: str
    crashes: tuple[str, ...] = ()  # what the engine died of under other properties; no kills


@dataclass(frozen=True)
class MutationScore:
    """How many of the known cache bugs, each put into the engine alone, the suite finds."""

    commit: str
    started_at: str  # ISO 8601, UTC
    seconds: float
    seed: int
    examples: int  # programs drawn for each property
    mutants: tuple[MutantInfo, ...]
    cannot_exist: dict[str, str]  # catalogue number: why it cannot be put into this engine
    right_programs: int = 0  # that the engine as it is has passed in the same run

    @property
    def killed(self) -> int:
        return sum(bool(mutant.killed_by) for mutant in self.mutants)


@dataclass(frozen=True)
class NotRun:
    """A planned test for which no device of the run was the right one."""

    check: str  # test function name
    title: str
    kind: Literal["check", "measurement"]
    condition: str  # that devices had to satisfy
    reasons: tuple[str, ...]  # one a device: "host: abi==arm64-v8a is false: x86_64"


@dataclass(frozen=True)
class NotPlanned:
    """A recipe of the run that was never meant to be checked on the device."""

    device: str
    recipe: str
    reason: str


@dataclass(frozen=True)
class RunRequest:
    """What a run was asked to do, to go on with it after a crash.

    arguments: pytest's, without --store, which may hold a password. folder: in which it was started.
    devices: that were chosen. subjects: digests of what is tested, by name.
    """

    arguments: tuple[str, ...]
    folder: str
    devices: tuple[str, ...]
    subjects: dict[str, str]


@dataclass(frozen=True)
class RunResults:
    """One run, whole. ``planned_*`` against what is listed shows what did not happen."""

    run_id: str
    started_at: str  # ISO 8601, UTC
    finished_at: str | None  # None: interrupted or still running
    command: str
    seed: int
    model: str
    reference: str  # e.g. "transformers 5.23.0 Gemma3ForCausalLM, float32, no cache"
    provenance: dict[str, str]
    devices: tuple[DeviceInfo, ...]
    recipes: tuple[RecipeInfo, ...]
    checks: tuple[CheckResult, ...]
    legs: tuple[LegResult, ...]
    planned_checks: int
    planned_legs: int
    infrastructure: tuple[str, ...] = ()  # errors that belong to no single check
    gate: GateInfo | None = None  # of a gate or a calibration
    not_run: tuple[NotRun, ...] = ()  # planned, and no device to run on; they are among planned_*
    not_planned: tuple[NotPlanned, ...] = ()  # and not among planned_*
    ablation: AblationInfo | None = None
    mutation: MutationScore | None = None  # measured by `kvfarm mutants`, maybe at another commit
    tags: tuple[str, ...] = ()  # names people gave the run, such as the release it is of
    request: RunRequest | None = None  # of a run over devices
    format: Literal["kvfarm-results/1"] = "kvfarm-results/1"

"""gate.toml: margins, which cells gate, what is measured and when a device is fit to start.

::

    alpha = 0.01                # of a wrong PASS, and of a wrong REGRESSED
    looks = [8, 16, 32]         # valid blocks

    [metrics.decode]            # ttft, decode, memory, energy, tokens, kv_bytes, nodes
    margin = 0.03               # the largest loss that still passes: a share
    gates = true

    [[cells]]                   # exceptions by glob over DEVICE/MODEL/WORKLOAD/METRIC; the last wins
    cell = "old-phone/*/ttft"
    margin = 0.08
    gates = false

    [[workloads]]               # each is measured in blocks of its own
    prompt = 128
    new_tokens = 64
    repeats = 3
    depth = 0                   # tokens in the cache before the prompt

    [entry]                     # before every leg
    battery_c = 35.0            # start at or below it ...
    resume_c = 33.0             # ... and, once it was above, only at or below this
    charge_low = 30
    charge_resume = 32          # once it was below charge_low, only at or above this
    charge_high = 80
    busy_cores = 0.25           # a host: cores that other processes use
    wait_s = 60                 # for one leg; then it goes on, flagged
    wait_total_s = 600          # for one device
"""

from __future__ import annotations

import tomllib
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from pathlib import Path

from harness import fitness
from harness.fitness import Thresholds
from harness.gate.errors import GateSettingsError
from harness.gate.metrics import METRICS, Metric
from harness.gate.statistics import ALPHA, LOOKS
from harness.measuring import BUSY_CORES
from kvengine.codec import DecodeError, decode

FILE = "gate.toml"


@dataclass(frozen=True)
class MetricSettings:
    """Of one metric on all cells; None is the metric's default."""

    margin: float | None = None
    gates: bool | None = None


@dataclass(frozen=True)
class CellSettings:
    """Of all cells that ``cell``, a glob, matches."""

    cell: str
    margin: float | None = None
    gates: bool | None = None


@dataclass(frozen=True)
class WorkloadSettings:
    """One workload. The first generation of each leg is not counted."""

    prompt: int = 128
    new_tokens: int = 64
    repeats: int = 3
    depth: int = 0  # tokens in the cache before the prompt

    @property
    def name(self) -> str:
        depth = f"@{self.depth}" if self.depth else ""
        return f"p{self.prompt}+n{self.new_tokens}{depth}"


@dataclass(frozen=True)
class EntrySettings(Thresholds):
    """When a leg may start. busy_cores: of a host, that other processes use."""

    busy_cores: float = BUSY_CORES


@dataclass(frozen=True)
class GateSettings:
    """All that gate.toml can say."""

    alpha: float = ALPHA
    looks: tuple[int, ...] = LOOKS
    metrics: dict[str, MetricSettings] = field(default_factory=dict)
    cells: tuple[CellSettings, ...] = ()
    workloads: tuple[WorkloadSettings, ...] = (WorkloadSettings(),)
    entry: EntrySettings = EntrySettings()

    def of_cell(self, cell: str, metric: Metric) -> tuple[float, bool]:
        """(margin, whether it gates) of the cell with this id."""
        general = self.metrics.get(metric.name, MetricSettings())
        rules: list[MetricSettings | CellSettings] = [general]
        rules += [rule for rule in self.cells if fnmatchcase(cell, rule.cell)]
        margin, gates = metric.margin, metric.gates
        for rule in rules:
            margin = margin if rule.margin is None else rule.margin
            gates = gates if rule.gates is None else rule.gates
        return margin, gates


def load(path: Path | None = None) -> tuple[GateSettings, str]:
    """The settings in ``path`` and where they are from; without a path ./gate.toml if there is one.

    Raises:
        GateSettingsError: ``path`` is missing, not TOML, or says something unknown or out of range.
    """
    if path is None:
        path = Path(FILE)
        if not path.is_file():
            return GateSettings(), "defaults"
    try:
        settings = decode(GateSettings, tomllib.loads(path.read_text()), path.name)
    except OSError as error:
        raise GateSettingsError(f"sought gate settings at {path}: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, DecodeError, UnicodeDecodeError) as error:
        raise GateSettingsError(f"{path} is no {FILE}: {error}") from error
    for wrong in _wrong(settings):
        raise GateSettingsError(f"{path}: {wrong}")
    return settings, str(path)


def with_workload(
    settings: GateSettings, prompt: int | None, new_tokens: int | None, repeats: int | None
) -> GateSettings:
    """``settings`` with what the command line says of the workloads."""
    given = {"prompt": prompt, "new_tokens": new_tokens, "repeats": repeats}
    changes = {name: value for name, value in given.items() if value is not None}
    if not changes:
        return settings
    changed = tuple(dict.fromkeys(replace(w, **changes) for w in settings.workloads))
    return replace(settings, workloads=changed)


def _wrong(settings: GateSettings) -> list[str]:
    """What is out of range, in words."""
    found = []
    looks = settings.looks
    if not looks or list(looks) != sorted(set(looks)) or looks[0] < 4:
        found.append(f"looks: sought rising numbers of blocks from 4 up, found {list(looks)}")
    if not 0 < settings.alpha <= 0.1:
        found.append(f"alpha: sought more than 0 and at most 0.1, found {settings.alpha}")
    if unknown := sorted(set(settings.metrics) - set(METRICS)):
        found.append(f"metrics: unknown {unknown[0]!r}; there are {', '.join(METRICS)}")
    margins = [(name, rule.margin) for name, rule in settings.metrics.items()]
    margins += [(rule.cell, rule.margin) for rule in settings.cells]
    found += [
        f"{name}: sought a margin as a share, 0 to 1 (3 % is 0.03), found {margin}"
        for name, margin in margins
        if margin is not None and not 0 < margin <= 1
    ]
    found += [
        f"metrics.{name}: this is compared exactly and has no margin; take it out"
        for name, rule in settings.metrics.items()
        if name in METRICS and METRICS[name].exact and rule.margin is not None
    ]
    found += [
        f"workload {workload.name}: sought prompt and repeats >= 1, new_tokens >= 2, depth >= 0"
        for workload in settings.workloads
        if min(workload.prompt, workload.repeats) < 1 or workload.new_tokens < 2 or workload.depth < 0
    ]
    names = [workload.name for workload in settings.workloads]
    if not names or len(set(names)) != len(names):
        found.append(f"workloads: sought at least one, each once, found {names}")
    found += fitness.wrong(settings.entry)
    if settings.entry.busy_cores < 0:
        found.append("entry: sought busy_cores of at least 0")
    return found

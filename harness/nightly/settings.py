"""nightly.toml: what a night compares, on which devices, and how much of everything; see docs/nightly.md."""

from __future__ import annotations

import tomllib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from harness.nightly.errors import NightError
from kvengine.codec import DecodeError, decode
from kvengine.engine import MOST_SLOWDOWN

PartName = Literal["calibrate", "check", "measure", "gate"]
PARTS: tuple[PartName, ...] = ("calibrate", "check", "measure", "gate")


@dataclass(frozen=True)
class CalibrateSettings:
    """share: of the night's blocks that are A/A. Measured before the gate, so that it counts tonight."""

    share: float = 0.10


@dataclass(frozen=True)
class CheckSettings:
    """recipes: None is the candidate's. examples: programs that each property draws. only: checks that this
    names, as pytest's -k does; "" for all."""

    recipes: str | None = None
    examples: int = 25
    only: str = ""


@dataclass(frozen=True)
class MeasureSettings:
    """What is measured besides the gate's workloads; lengths in tokens, sustained_s in s (0: not)."""

    recipes: str | None = None
    prompts: tuple[int, ...] = (128,)
    new_tokens: tuple[int, ...] = (64,)
    depths: tuple[int, ...] = (0,)
    repeats: int = 5
    energy: bool = False
    sustained_s: float = 0.0


@dataclass(frozen=True)
class GateFiles:
    """settings, waivers: files as for ``kvfarm gate``. blocks: no look beyond so many."""

    settings: str | None = None
    waivers: str | None = None
    blocks: int | None = None
    energy: bool = False


@dataclass(frozen=True)
class DrillSettings:
    """What is made wrong on purpose, to see the night find it; shown everywhere.

    slowdown: share of each step's time that is added to the candidate's. memory: share of the baseline's peak
    that the candidate holds besides. mutant: a bug of ``kvfarm mutants`` in the candidate's export, by name.
    """

    slowdown: float = 0.0
    memory: float = 0.0
    mutant: str = ""


@dataclass(frozen=True)
class NightSettings:
    """All that nightly.toml can say; paths are seen from where the command is started.

    baseline, candidate: REFs as for ``kvfarm gate``. name: nights of one name are one history.
    """

    model: str
    baseline: str
    candidate: str
    name: str = "nightly"
    devices: str = "farm"
    farm: str | None = None
    farm_address: str | None = None
    store: str | None = None
    report: str = "out/nightly"
    tag: str = ""
    parts: tuple[PartName, ...] = PARTS
    calibrate: CalibrateSettings = CalibrateSettings()
    check: CheckSettings = CheckSettings()
    measure: MeasureSettings = MeasureSettings()
    gate: GateFiles = field(default_factory=GateFiles)
    drill: DrillSettings | None = None


def load(path: Path) -> NightSettings:
    """The settings in ``path``.

    Raises:
        NightError: it is missing, not TOML, or says something unknown or out of range.
    """
    try:
        settings = decode(NightSettings, tomllib.loads(path.read_text()), path.name)
    except OSError as error:
        raise NightError(
            f"sought the night's settings at {path}: {error.strerror}; docs/nightly.md has an example"
        ) from error
    except (tomllib.TOMLDecodeError, DecodeError, UnicodeDecodeError) as error:
        raise NightError(f"{path} is no nightly.toml: {error}") from error
    for wrong in _wrong(settings):
        raise NightError(f"{path}: {wrong}")
    return settings


def _wrong(settings: NightSettings) -> list[str]:
    """What is out of range, in words: key, what was sought, what was found."""
    found = [
        f"{key}: sought {sought}, found {value!r}"
        for key, value, right, sought in _ranges(settings)
        if not right
    ]
    drill = settings.drill
    if drill is not None and drill == DrillSettings():
        found.append("drill: sought slowdown, memory or mutant, found none of them; take the table out")
    if drill is not None and settings.tag:
        found.append("tag: a drill's candidate is no release; take the tag out")
    return found


def _ranges(settings: NightSettings) -> list[tuple[str, object, bool, str]]:
    """(key, value, whether it is right, what is sought)."""
    parts, measure, drill = settings.parts, settings.measure, settings.drill or DrillSettings(slowdown=0.05)
    in_order = tuple(part for part in PARTS if part in parts)
    lengths = [
        ("measure.prompts", measure.prompts, 1),
        ("measure.new_tokens", measure.new_tokens, 2),
        ("measure.depths", measure.depths, 0),
    ]
    return [
        ("name", settings.name, bool(settings.name.strip()), "a name"),
        (
            "parts",
            list(parts),
            bool(parts) and parts == in_order,
            f"some of {', '.join(PARTS)}, in this order",
        ),
        (
            "calibrate.share",
            settings.calibrate.share,
            0 <= settings.calibrate.share < 1,
            "a share from 0 up and below 1 (10 % is 0.1)",
        ),
        ("check.examples", settings.check.examples, settings.check.examples >= 1, "at least 1"),
        *(
            (key, list(values), bool(values) and min(values) >= least, f"numbers of tokens from {least} up")
            for key, values, least in lengths
        ),
        ("measure.repeats", measure.repeats, measure.repeats >= 1, "at least 1"),
        ("measure.sustained_s", measure.sustained_s, measure.sustained_s >= 0, "seconds"),
        (
            "drill.slowdown",
            drill.slowdown,
            0 <= drill.slowdown <= MOST_SLOWDOWN,
            f"a share from 0 to {MOST_SLOWDOWN:g} (5 % is 0.05)",
        ),
        ("drill.memory", drill.memory, 0 <= drill.memory <= 1, "a share from 0 to 1 (5 % is 0.05)"),
    ]

"""What a run over devices was asked for."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from harness.leasing import Terms
from harness.measuring import Shape
from harness.recovery import RecoveryPolicy


@dataclass(frozen=True)
class RunOptions:
    """What the command line asked for. Paths are as given; see ``harness.plugin`` for the defaults."""

    devices: str
    model: Path
    recipes: str
    store: str
    report: Path | None = None
    farm: Path | None = None
    farm_address: str | None = None
    cache: Path = Path(".kvfarm")
    examples: int = 25
    seed: int | None = None
    shapes: tuple[Shape, ...] = (Shape(),)  # the workloads that each recipe is measured with
    repeats: int = 3
    # Further (checkpoint, recipes, devices) to measure, not to check; no device is all of them.
    measure: tuple[tuple[Path, str, tuple[str, ...]], ...] = ()
    energy: bool = False  # also measure energy for each token: minutes a leg
    recovery: RecoveryPolicy = field(default_factory=RecoveryPolicy)
    terms: Terms = field(default_factory=Terms)  # of leases
    golden: Literal["phones", "all", "none"] = "phones"  # whose health a golden job tells
    reboots: int = 0  # a day that a device which does not answer may get; a phone may be somebody's own
    command: tuple[str, ...] = ()
    tags: tuple[str, ...] = ()
    arguments: tuple[str, ...] = ()  # pytest's, as the run keeps them for who goes on with it
    resume: str = ""  # the run to go on with

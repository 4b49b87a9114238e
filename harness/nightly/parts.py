"""The seam: what a part of a night is given, and what it says."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from harness.gate.references import Resolved
from harness.gate.session import Watcher
from harness.gate.settings import GateSettings
from harness.gate.waivers import Waiver
from harness.inventory import Inventory
from harness.nightly.settings import NightSettings
from harness.store.protocol import Store
from reports.gate_night import NightWord


@dataclass(frozen=True)
class Night:
    """What all parts share; made once the night's REFs are resolved and its devices found.

    rules, rules_from: of gate.toml. devices: names in ``inventory``. drill: in words, "" for none.
    cache: folder for artifacts and calibrations.
    """

    settings: NightSettings
    rules: GateSettings
    rules_from: str
    waivers: tuple[Waiver, ...]
    baseline: Resolved
    candidate: Resolved
    inventory: Inventory
    devices: tuple[str, ...]
    store: Store
    cache: Path
    command: str
    drill: str
    watcher: Watcher


@dataclass(frozen=True)
class Found:
    """What a part found; see reports.gate_night.NightPart. page: whether it wrote an index.html."""

    word: NightWord
    headline: str
    sentence: str
    remarks: tuple[str, ...] = ()
    run_id: str = ""
    page: bool = True


class Part(Protocol):
    """One part. ``decides``: whether its word is part of the night's."""

    @property
    def name(self) -> str: ...

    @property
    def title(self) -> str: ...

    @property
    def decides(self) -> bool: ...

    def run(self, night: Night, folder: Path) -> Found:
        """Do it, or go on with what was killed; its pages go to ``folder``.

        Raises:
            InfrastructureError: it could not be done; the night goes on with the next part.
            HarnessError: the night cannot go on (a full disk, a store that is gone).
        """
        ...

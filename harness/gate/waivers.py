"""waivers.toml: a loss that somebody answers for, for at most 30 days.

::

    [[waivers]]
    cell = "pixel8/*/ttft"      # a glob over DEVICE/MODEL/WORKLOAD/METRIC
    allowed = 0.08              # the largest loss let through, a share; 0 for an exact metric
    owner = "mara"
    reason = "the larger vocabulary costs a longer prefill"
    issue = "#123"
    expires = 2026-12-20

An expired waiver fails the gate until it is renewed or removed; one that nothing needed is a
warning. What is waived is still measured, judged and shown.
"""

from __future__ import annotations

import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date, timedelta
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from harness.gate.errors import WaiverError
from kvengine.codec import DecodeError, decode
from reports.gate_results import GateCell, WaiverInfo

FILE = "waivers.toml"
LONGEST = timedelta(days=30)


@dataclass(frozen=True)
class Waiver:
    """One entry; see the module. expires: ISO date, the last day on which it holds."""

    cell: str
    allowed: float
    owner: str
    reason: str
    issue: str
    expires: str

    def expired(self, today: date) -> bool:
        return date.fromisoformat(self.expires) < today

    def covers(self, cell: GateCell) -> bool:
        """Whether it lets ``cell`` through as it was judged. What was not measured cannot be waived."""
        if cell.verdict not in ("REGRESSED", "INCONCLUSIVE") or not fnmatchcase(cell.id, self.cell):
            return False
        if cell.exact:
            return cell.estimate is None or cell.estimate <= self.allowed
        return cell.high is not None and cell.high < self.allowed


@dataclass(frozen=True)
class _File:
    waivers: tuple[Waiver, ...] = ()


def load(path: Path | None, today: date) -> tuple[Waiver, ...]:
    """The waivers in ``path``; without a path ./waivers.toml if there is one.

    Raises:
        WaiverError: ``path`` is missing, not TOML, or an entry is incomplete or out of range.
    """
    if path is None:
        path = Path(FILE)
        if not path.is_file():
            return ()
    try:
        found = decode(_File, _dates_as_text(tomllib.loads(path.read_text())), path.name)
    except OSError as error:
        raise WaiverError(f"sought waivers at {path}: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, DecodeError, UnicodeDecodeError) as error:
        raise WaiverError(f"{path} is no {FILE}: {error}") from error
    for waiver in found.waivers:
        if wrong := _wrong(waiver, today):
            raise WaiverError(f"{path}: waiver of {waiver.cell!r}: {wrong}")
    return found.waivers


def covering(cell: GateCell, waivers: Sequence[Waiver], today: date) -> Waiver | None:
    """The first that lets ``cell`` through today."""
    return next((w for w in waivers if not w.expired(today) and w.covers(cell)), None)


def told(waivers: Sequence[Waiver], used: Sequence[Waiver], today: date) -> tuple[WaiverInfo, ...]:
    """Every waiver with what became of it."""
    return tuple(
        WaiverInfo(
            waiver.cell,
            waiver.allowed,
            waiver.owner,
            waiver.reason,
            waiver.issue,
            waiver.expires,
            "expired" if waiver.expired(today) else "used" if waiver in used else "unused",
        )
        for waiver in waivers
    )


def _wrong(waiver: Waiver, today: date) -> str:
    for name in ("cell", "owner", "reason", "issue"):
        if not getattr(waiver, name).strip():
            return f"{name} is empty; say it"
    if not 0 <= waiver.allowed <= 1:
        return f"allowed: sought a share, 0 to 1 (8 % is 0.08), found {waiver.allowed}"
    try:
        expires = date.fromisoformat(waiver.expires)
    except ValueError:
        return f"expires: sought a date like 2026-12-20, found {waiver.expires!r}"
    if expires > today + LONGEST:
        return f"expires: {expires} is more than {LONGEST.days} days away; the latest is {today + LONGEST}"
    return ""


def _dates_as_text(value: Any) -> Any:
    """TOML's own dates as ISO text: both spellings are one."""
    if isinstance(value, dict):
        return {key: _dates_as_text(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_dates_as_text(item) for item in value]
    return value.isoformat() if isinstance(value, date) else value

"""What a night has done, on disk after every part: a killed night goes on, and nights have a history."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path

from harness.reporting import replace_file
from kvengine.codec import DecodeError, decode, encode
from reports.gate_night import NightInfo


@dataclass(frozen=True)
class Entry:
    """key: equal for the same settings, sides and code. chosen: devices that the night began with."""

    key: str
    night: NightInfo
    chosen: tuple[str, ...] = ()


class Journal:
    """All nights in ``folder``, one file each. What cannot be read is no night of ours."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def unfinished(self, key: str) -> Entry | None:
        """The newest night with this key that is not over."""
        found = [e for e in self._entries() if e.key == key and e.night.finished_at is None]
        return max(found, key=lambda entry: entry.night.started_at, default=None)

    def history(self, name: str) -> tuple[NightInfo, ...]:
        """Nights of this name, oldest first."""
        found = (entry.night for entry in self._entries() if entry.night.name == name)
        return tuple(sorted(found, key=lambda night: (night.started_at, night.night)))

    def keep(self, entry: Entry) -> None:
        """Durable when it returns. Raises OSError."""
        self._folder.mkdir(parents=True, exist_ok=True)
        text = json.dumps(encode(entry), indent=1) + "\n"
        replace_file(self._folder / f"{entry.night.night}.json", text)

    def _entries(self) -> list[Entry]:
        found = []
        for file in sorted(self._folder.glob("*.json")):
            try:
                found.append(decode(Entry, json.loads(file.read_text()), file.name))
            except (DecodeError, ValueError, OSError):
                continue
        return found


def again(entry: Entry) -> Entry:
    """``entry`` of a night that is started once more."""
    return replace(entry, night=replace(entry.night, starts=entry.night.starts + 1))

"""A device as the page names it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from reports import text
from reports.results import DeviceInfo

DEVICES_SHOWN_OPEN = 3  # more devices than this: only those with something wrong start open


@dataclass(frozen=True)
class DeviceView:
    """``name`` with what it is; ``simulated`` says what is simulated, "" for real hardware."""

    name: str
    simulated: str
    model: str
    facts: tuple[tuple[str, str], ...]

    @property
    def label(self) -> str:
        """The name for places that hold only text."""
        return f"{self.name} (simulated)" if self.simulated else self.name


def device_view(info: DeviceInfo) -> DeviceView:
    """``info`` as the page shows it."""
    runtime = ", ".join(f"{name} {version}" for name, version in info.runtime.items())
    facts = (
        ("Kind", info.kind),
        ("Model", info.model),
        ("SoC", info.soc),
        ("ABI", info.abi),
        ("System", info.os),
        ("Build", info.build),
        ("Cores", str(info.cores)),
        ("Memory", text.byte_size(info.ram_bytes)),
        ("Providers", ", ".join(info.providers)),
        ("Runtime", runtime),
        ("Simulated", info.simulated or "no, real hardware"),
        ("Quarantined", info.quarantined),
    )
    return DeviceView(info.name, info.simulated, info.model, tuple((k, v) for k, v in facts if v))


def unique(names: Iterable[str]) -> list[str]:
    """``names`` without repeats, first seen first."""
    return list(dict.fromkeys(names))

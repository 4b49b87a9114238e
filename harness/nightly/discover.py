"""Who is there tonight: every device that was asked for, and why one does not answer."""

from __future__ import annotations

from dataclasses import dataclass

from harness.choosing import Selection
from harness.farm import Farm
from harness.inventory import Inventory
from reports.gate_night import NightDevice


@dataclass(frozen=True)
class Discovered:
    """names: what is measured; those that did not answer are among them, for what was planned is reported."""

    inventory: Inventory
    names: tuple[str, ...]
    devices: tuple[NightDevice, ...]

    @property
    def anybody(self) -> bool:
        return any(not device.error for device in self.devices)


def discover(meant: Selection, farm_address: str | None) -> Discovered:
    """Ask them all. Raises InfrastructureError, InventoryError (a condition that nobody satisfies)."""
    with Farm(meant.inventory, meant.names, farm_address) as farm:
        statuses = farm.status()
    names = meant.choose(statuses).names if meant.condition is not None else meant.names
    devices = tuple(
        NightDevice(s.name, s.identity.model or s.identity.os, s.identity.simulated)
        if s.identity is not None
        else NightDevice(s.name, "", "", s.error or "no reason given")
        for s in statuses
        if s.name in names
    )
    return Discovered(meant.inventory, names, devices)


def again(meant: Selection, names: tuple[str, ...], devices: tuple[NightDevice, ...]) -> Discovered:
    """Those a night began with, without asking; what the inventory no longer knows is left out."""
    known = tuple(name for name in names if name in meant.names) or meant.names
    return Discovered(meant.inventory, known, tuple(d for d in devices if d.name in known))

"""What a lab agent knows of its devices without asking any: for whoever only looks."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterable
from dataclasses import dataclass

from device_agents.api import DeviceIdentity
from device_agents.lab_types import DeviceStatus, Lease
from device_agents.leases.ledger import Ledger
from device_agents.leases.model import State
from device_agents.slots import Slot


@dataclass(frozen=True)
class Observed:
    """One lab host. now: on the clock of ``state``, when it was ``at``, Unix time in s. keys: by device, how
    the journal names it. identities: of the devices that were asked since their agent started."""

    host: str
    state: State
    now: float
    at: float
    keys: dict[str, str]
    identities: dict[str, DeviceIdentity]


def observe(slots: Iterable[Slot], ledger: Ledger) -> Observed:
    """As of now; no device is asked anything."""
    slots = tuple(slots)
    state, now = ledger.state()
    return Observed(
        socket.gethostname(),
        state,
        now,
        time.time(),
        {slot.config.name: slot.key for slot in slots},
        {slot.config.name: slot.identity for slot in slots if slot.identity is not None},
    )


def status_of(slot: Slot, error: str, lease: Lease | None, ledger: Ledger) -> DeviceStatus:
    """error: why the device does not say who it is."""
    state, _ = ledger.state()
    bad = state.quarantined.get(slot.key)
    waiting = sum(slot.key in each.request.devices for each in state.waiting.values())
    quarantined = f"by {bad.by}: {bad.evidence}" if bad else ""
    return DeviceStatus(
        slot.config.name,
        slot.config.kind,
        slot.identity,
        error,
        lease,
        quarantined,
        waiting,
        state.drained,
    )

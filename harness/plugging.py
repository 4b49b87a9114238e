"""What is plugged in now, beside what the lab agents know: phones that come and go while one looks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Protocol

from device_agents.adb.connection import AdbServer
from device_agents.adb.plugged import Plugged
from device_agents.lab_types import DeviceStatus
from harness.discovery import free_name, remedy
from harness.inventory import LOCAL_LAB, Inventory

if TYPE_CHECKING:
    from harness.hosting.head import Head

States = Mapping[str, str]
"""State by serial number, as adb names it."""


class Plugs(Protocol):
    """The phones of each lab host, by its name in the inventory; a host that cannot tell is left out."""

    def now(self) -> Mapping[str, States]: ...


class LocalPlugs:
    """Of this machine."""

    def __init__(self, plugged: Plugged) -> None:
        self._plugged = plugged

    def now(self) -> Mapping[str, States]:
        states, error = self._plugged.now()
        return {} if error else {LOCAL_LAB: states}


class LabPlugs:
    """Of the hosts of a cluster, as they last told."""

    def __init__(self, head: Head, inventory: Inventory) -> None:
        self._head = head
        self._labs = inventory.labs

    def now(self) -> Mapping[str, States]:
        from harness.hosting.records import hosts

        by_name = {host.record.name: host.record for host in hosts(self._head) if host.alive}
        found: dict[str, States] = {}
        for lab, entry in self._labs.items():
            record = by_name.get(entry.node) or by_name.get(lab)
            if record is not None and not record.adb:
                found[lab] = {
                    each.entry.options["serial"]: each.plugged
                    for each in record.devices.values()
                    if each.plugged is not None
                }
        return found


@contextmanager
def plugs_of(inventory: Inventory, farm_address: str | None) -> Iterator[Plugs]:
    """Raises InfrastructureError: there is no cluster at ``farm_address``."""
    if farm_address is not None:
        from harness.hosting.head import connect

        yield LabPlugs(connect(farm_address, f"could not ask the cluster at {farm_address}"), inventory)
        return
    plugged = Plugged(AdbServer.default())
    plugged.start()
    try:
        yield LocalPlugs(plugged)
    finally:
        plugged.stop()


def overlay(
    statuses: tuple[DeviceStatus, ...], inventory: Inventory, plugs: Mapping[str, States]
) -> tuple[DeviceStatus, ...]:
    """The devices as they are plugged in now, and after them phones that are not in the inventory."""
    found = []
    for status in statuses:
        entry = inventory.device(status.name)
        serial, states = entry.options.get("serial"), plugs.get(entry.lab)
        if serial is not None and states is not None:
            state = states.get(serial, "")
            if state != "device":
                told = f"{state}; {remedy(state)}" if state else "unplugged; adb does not know it"
                status = replace(status, error=told)
        found.append(status)
    listed = {entry.options.get("serial") for entry in inventory.devices.values()}
    names = set(inventory.devices)
    for lab, states in plugs.items():
        for serial, state in states.items():
            if serial not in listed and state:
                name = free_name(serial, names)
                names.add(name)
                where = "" if lab == LOCAL_LAB else f" at {lab}"
                told = f"new{where}, not in this farm; adb says {state}"
                found.append(DeviceStatus(name, "android", None, told))
    return tuple(found)

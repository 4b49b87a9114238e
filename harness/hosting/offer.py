"""What a lab host offers: its part of farm.toml; without one, itself and the phones that adb knows there."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from device_agents.config import DeviceConfig
from harness.discovery import free_name
from harness.errors import InventoryError
from harness.hosting.records import HostDevice
from harness.inventory import LOCAL_LAB, DeviceEntry, Inventory, Limits, load


class Offer:
    """inventory: just this host's devices. adopts: whether phones that nobody listed are offered as well."""

    def __init__(self, name: str, inventory: Inventory, *, adopts: bool, owner: str = "") -> None:
        self._name = name
        self._inventory = inventory
        self._adopts = adopts
        self._adopted: dict[str, DeviceEntry] = {}
        self.owner = owner

    @classmethod
    def read(cls, name: str, farm: str, devices: bool) -> Offer:
        """Of the lab host ``name``: the devices that ``farm`` says are there; of a file without [labs], all.

        Raises:
            InventoryError: the file cannot be used, or names no device of this host.
        """
        if not devices:
            return cls(name, Inventory(), adopts=False)
        if not farm:
            return cls(name, Inventory({name: DeviceEntry()}), adopts=True)
        whole = load(Path(farm))
        labs = [lab for lab, entry in whole.labs.items() if name in (lab, entry.node)]
        if whole.labs and not labs:
            raise InventoryError(
                f"{farm}: sought a [labs.…] of the name or node {name!r}, found {', '.join(whole.labs)}; "
                "add it, or give --name"
            )
        here = labs[0] if labs else LOCAL_LAB
        ours = {each: entry for each, entry in whole.devices.items() if entry.lab == here}
        if not ours:
            raise InventoryError(f"{farm}: no device has lab = {here!r}; add one, or give --no-devices")
        pools = {pool: tuple(each for each in names if each in ours) for pool, names in whole.pools.items()}
        pools = {pool: names for pool, names in pools.items() if names}
        owner = whole.labs[here].owner if labs else ""
        return cls(name, Inventory(ours, whole.labs, pools, whole.limits), adopts=False, owner=owner)

    @property
    def limits(self) -> Limits:
        return self._inventory.limits

    @property
    def wants_adb(self) -> bool:
        """Whether it has devices that only an adb server reaches."""
        return any("serial" in entry.options for entry in self._inventory.devices.values())

    def names(self) -> tuple[str, ...]:
        return tuple(self._inventory.devices)

    def configs(self) -> tuple[DeviceConfig, ...]:
        """For the lab agent."""
        whole = Inventory(self._inventory.devices | self._adopted, self._inventory.labs, limits=self.limits)
        return tuple(whole.config(name) for name in whole.devices)

    def pools(self) -> dict[str, tuple[str, ...]]:
        return dict(self._inventory.pools)

    def adopt(self, states: Mapping[str, str]) -> tuple[DeviceConfig, ...]:
        """Phones that came, if they are offered unlisted: what the lab agent is to know of them."""
        if not self._adopts:
            return ()
        known = {entry.options["serial"] for entry in self._adopted.values()}
        new: dict[str, DeviceEntry] = {}
        for serial, state in states.items():
            if serial not in known and state == "device":
                name = free_name(serial, {*self._inventory.devices, *self._adopted, *new})
                new[name] = _phone(serial)
        self._adopted |= new
        return tuple(Inventory(new).config(name) for name in new)

    def devices(self, states: Mapping[str, str], holders: Mapping[str, str]) -> dict[str, HostDevice]:
        """All of them as everybody is to see them. states: by serial, of adb. holders: by device."""
        found = {}
        for name, entry in self._inventory.devices.items():
            serial = entry.options.get("serial")
            plugged = None if serial is None else states.get(serial, "")
            found[name] = self._device(entry, plugged, holders.get(name, ""))
        for name, entry in self._adopted.items():
            if plugged := states.get(entry.options["serial"]):
                found[name] = self._device(entry, plugged, holders.get(name, ""))
        known = {each.entry.options.get("serial") for each in found.values()}
        for serial, state in states.items():
            if serial not in known:
                name = free_name(serial, set(found))
                found[name] = self._device(_phone(serial), state, "", listed=False)
        return found

    def _device(
        self, entry: DeviceEntry, plugged: str | None, holder: str, listed: bool = True
    ) -> HostDevice:
        at_home = replace(entry, lab=self._name, owner=entry.owner or self.owner)
        return HostDevice(at_home, plugged, listed, holder)


def _phone(serial: str) -> DeviceEntry:
    return DeviceEntry("android", options={"serial": serial})

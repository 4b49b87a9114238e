"""The phones that the adb server of this machine knows, as devices of an inventory."""

from __future__ import annotations

import re
from dataclasses import dataclass

from device_agents.adb.connection import DEFAULT_PORT, AdbServer
from device_agents.adb.plugged import parse_devices
from device_agents.deadline import Deadline
from device_agents.errors import InfrastructureError
from harness.inventory import LOCAL_LAB, DeviceEntry, Inventory

_ASK_S = 5.0
_START_S = 20.0
# States as the adb server names them: AOSP packages/modules/adb, adb.cpp, to_string(ConnectionState).
_REMEDIES = {
    "unauthorized": "unlock it and accept this computer's key",
    "authorizing": "unlock it and accept this computer's key",
    "offline": "plug it in again, or `kvfarm connect` it again; see that it is awake",
    "connecting": "wait a moment and try again",
    "recovery": "start Android on it",
    "sideload": "start Android on it",
    "rescue": "start Android on it",
    "bootloader": "start Android on it",
    "host": "it is in a state without a shell; plug it in again",
}
_NO_PERMISSIONS = (
    "this user may not use its USB device: add udev rules for Android (Debian: android-udev-rules)"
)


@dataclass(frozen=True)
class PassedOver:
    """A device that was not chosen, and why."""

    name: str
    reason: str


@dataclass(frozen=True)
class Found:
    """phones: by name, those that can be used; unready: those that cannot, by serial."""

    phones: dict[str, DeviceEntry]
    unready: tuple[PassedOver, ...] = ()


def find(known: Inventory, start: bool) -> Found:
    """Every phone in state "device"; one whose serial ``known`` lists keeps the name it has there.

    start: whether to start an adb server when none answers. A server that hangs, or that cannot be
    started, is told in ``unready`` as "adb".
    """
    server = AdbServer.default()
    try:
        lines = AdbServer(server.port, start).query("host:devices", Deadline(_START_S if start else _ASK_S))
    except InfrastructureError as error:
        silent = not start and "no adb server" in str(error)
        return Found({}, () if silent else (PassedOver("adb", str(error)),))
    named = {
        entry.options["serial"]: (name, entry)
        for name, entry in known.devices.items()
        if entry.lab == LOCAL_LAB and "serial" in entry.options
    }
    phones: dict[str, DeviceEntry] = {}
    unready = []
    for serial, state in parse_devices(lines).items():
        if state != "device":
            unready.append(PassedOver(serial, f"{state}; {remedy(state)}"))
            continue
        name, entry = named.get(serial) or (
            free_name(serial, {*known.devices, *known.pools, *phones}),
            DeviceEntry("android", options=_options(serial, server.port)),
        )
        phones[name] = entry
    return Found(phones, tuple(unready))


def remedy(state: str) -> str:
    """What to do about a phone in this state."""
    if state.startswith("no permissions"):
        return _NO_PERMISSIONS
    return _REMEDIES.get(state, "see `adb devices`")


def _options(serial: str, port: int) -> dict[str, str]:
    # The lab agent may have been started with another environment than ours.
    return {"serial": serial} | ({"adb_port": str(port)} if port != DEFAULT_PORT else {})


def free_name(serial: str, taken: set[str]) -> str:
    """The serial without what a name cannot have; 192.0.2.7:5555 is 192.0.2.7-5555."""
    base = name = re.sub(r"[^A-Za-z0-9._-]+", "-", serial).strip("-") or "phone"
    copies = 1
    while name in taken:
        copies += 1
        name = f"{base}-{copies}"
    return name

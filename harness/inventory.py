"""Which devices there are: farm.toml, or this host alone when there is none.

::

    [devices.host]            # this machine; kind "host" is the default
    threads = 2

    [devices.pixel8]
    kind = "android"
    lab = "rack1"             # the lab host whose USB it hangs on; default: this machine
    options = { serial = "39121FDJH000AB" }

    [labs.rack1]
    node = "192.0.2.10"       # the lab host's address in the Ray cluster given by --farm-address

    [pools]
    release = ["host", "pixel8"]
"""

from __future__ import annotations

import tomllib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from harness.errors import InventoryError
from kvengine.codec import DecodeError, decode

FILE = "farm.toml"
ALL = "farm"  # the selection that means every device
LOCAL_LAB = "local"


@dataclass(frozen=True)
class DeviceEntry:
    """One device. threads: for recipes that name none; None lets the agent choose.

    options: what its kind needs, e.g. the serial number of an android device.
    """

    kind: Literal["host", "android"] = "host"
    lab: str = LOCAL_LAB
    threads: int | None = None
    options: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class LabEntry:
    """One lab host: a machine of the Ray cluster that devices are attached to."""

    node: str  # its address in the cluster


@dataclass(frozen=True)
class Inventory:
    """Everything farm.toml can say."""

    devices: dict[str, DeviceEntry] = field(default_factory=dict)
    labs: dict[str, LabEntry] = field(default_factory=dict)
    pools: dict[str, tuple[str, ...]] = field(default_factory=dict)


DEFAULT = Inventory(devices={"host": DeviceEntry()})


def load(path: Path | None = None) -> Inventory:
    """The inventory in ``path``; without a path ./farm.toml if it exists, else this host.

    Raises:
        InventoryError: ``path`` is missing, not TOML, or says something unknown.
    """
    if path is None:
        path = Path(FILE)
        if not path.is_file():
            return DEFAULT
    try:
        inventory = decode(Inventory, tomllib.loads(path.read_text()), path.name)
    except OSError as error:
        raise InventoryError(f"sought an inventory at {path}: {error.strerror}; write a {FILE}") from error
    except (tomllib.TOMLDecodeError, DecodeError, UnicodeDecodeError) as error:
        raise InventoryError(f"{path} is not an inventory: {error}") from error
    _check(path, inventory)
    return inventory


def select(expression: str, inventory: Inventory) -> tuple[str, ...]:
    """Device names for ``farm`` (every device), or names of devices and pools separated by commas.

    In the order given, each once.

    Raises:
        InventoryError: an unknown name; the message lists those there are.
    """
    chosen: dict[str, None] = {}
    for name in filter(None, (part.strip() for part in expression.split(","))):
        if name in inventory.devices:
            chosen[name] = None
        elif name == ALL:
            chosen.update(dict.fromkeys(inventory.devices))
        elif name in inventory.pools:
            chosen.update(dict.fromkeys(inventory.pools[name]))
        else:
            raise InventoryError(f"sought device or pool {name!r}; there are {_known(inventory)}")
    if not chosen:
        raise InventoryError(f"no device in {expression!r}; there are {_known(inventory)}")
    return tuple(chosen)


def _check(path: Path, inventory: Inventory) -> None:
    if not inventory.devices:
        raise InventoryError(f"{path} lists no device; add [devices.NAME] or remove the file")
    if clash := set(inventory.pools) & {*inventory.devices, ALL}:
        raise InventoryError(f"{path}: pool {min(clash)!r} has the name of a device or of {ALL!r}; rename it")
    for name, device in inventory.devices.items():
        if name == ALL or "," in name or not name.strip():
            raise InventoryError(f"{path}: {name!r} cannot name a device; {ALL!r} means every device")
        if device.lab != LOCAL_LAB and device.lab not in inventory.labs:
            labs = ", ".join(inventory.labs) or "none"
            raise InventoryError(f"{path}: device {name!r} is at lab {device.lab!r}; there are: {labs}")
        if device.threads is not None and device.threads < 1:
            raise InventoryError(f"{path}: device {name!r}: threads must be at least 1")
    for name, members in inventory.pools.items():
        if unknown := [m for m in members if m not in inventory.devices]:
            raise InventoryError(
                f"{path}: pool {name!r} names device {unknown[0]!r}; there are {_known(inventory)}"
            )


def _known(inventory: Inventory) -> str:
    return ", ".join([*inventory.devices, *inventory.pools, f"{ALL} (every device)"])

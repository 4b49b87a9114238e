"""Which devices there are: farm.toml, or this host alone when there is none; and virtual phones at will.

::

    [devices.host]            # this machine; kind "host" is the default
    threads = 2

    [devices.pixel8]
    kind = "android"
    lab = "rack1"             # the lab host whose USB it hangs on; default: this machine
    options = { serial = "39121FDJH000AB" }  # all: device_agents.adb.devices
    settings = { fixed_performance = true, brightness = 60 }  # all: device_agents.config

    [devices.old]             # a virtual phone, which the agent of its lab host starts and stops
    kind = "android"
    options = { virtual = "true", profile = "galaxy-s24" }
    effort = 0.5              # it is slow: half the programs and half the repeats of the others
    recipes = ["hybrid*"]     # and of a run's recipes only these; default: all
    owner = "ann"             # whom to ask; shown, and owner==ann chooses by it
    # Tried once before the phone is quarantined: a program of its lab host and its arguments, no shell.
    power_cycle = ["uhubctl", "--location", "1-1.4", "--ports", "2", "--action", "cycle"]

    [labs.rack1]
    node = "rack1"            # its --name at `kvfarm join`, or its address in the cluster of --farm-address
    owner = "ann"             # of the devices there that name none

    [pools]
    release = ["host", "pixel8", "virtual:2"]

    [limits]
    power_cycles_per_day = 3  # of each device
    longest_lease_s = 14400   # whoever has a device for longer loses it; default: a day

    [entry]                   # before a phone's first check and each measurement: harness.fitness
    battery_c = 40.0          # start at or below it ...
    resume_c = 37.0           # ... and, once it was above, only at or below this
    charge_low = 15           # start at or above it ...
    charge_resume = 20        # ... and, once it was below, only at or above this
    charge_high = 100
    wait_s = 900              # for one start; then the phone is set aside
    wait_total_s = 3600       # for one phone

Without a farm.toml, ``farm`` is this host and the phones that a running adb server knows; ``adb`` is
those phones alone (harness.discovery). Devices are also chosen by what they are: harness.selection.
Without being listed, ``virtual:N`` is N virtual phones named virtual-1, virtual-2, ...;
``virtual:N:ABI``, ``virtual:N:PROFILE`` and ``virtual:N:ABI:PROFILE`` say which. ``simulated:N`` is N devices
without an engine, simulated-1 and so on, whose latencies are drawn from recorded ones: for trying the farm
itself, at any scale (device_agents.simulated).
"""

from __future__ import annotations

import tomllib
from collections.abc import Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Literal

from device_agents.bundle.lock import ABIS
from device_agents.config import DeviceConfig, DeviceSettings
from device_agents.virtual.errors import VirtualPhoneUnavailable
from device_agents.virtual.profile import profile_names
from device_agents.virtual.rootfs import native_abi
from harness import fitness
from harness.errors import InventoryError
from harness.fitness import WorkThresholds
from harness.selection import RESERVED
from kvengine.codec import DecodeError, decode

FILE = "farm.toml"
ALL = "farm"  # the selection that means every device
ADB = "adb"  # the selection that means every phone that adb knows
LOCAL_LAB = "local"
VIRTUAL = "virtual"
SIMULATED: Literal["simulated"] = "simulated"
MOST_VIRTUAL = 64  # a slip of the finger should not start a thousand
MOST_SIMULATED = 1000
FOREIGN_EFFORT = 0.12  # arm64 under qemu on x86_64 takes about 15 times as long (measured)


@dataclass(frozen=True)
class DeviceEntry:
    """One device. threads: for recipes that name none; None lets the agent choose.

    options: what its kind needs, e.g. the serial number of an android device. settings: what it is
    put into while it is in use, and back from. effort: share of the programs and repeats asked for that
    it gets; None: all, or FOREIGN_EFFORT where an emulator runs it. See ``effort_of``. recipes: patterns of
    the names of those recipes of a run that are for it; none: all. owner: whom to ask. power_cycle: a
    program of the lab host, with arguments, that takes its power away and gives it back; see
    device_agents.power.
    """

    kind: Literal["host", "android", "simulated"] = "host"
    lab: str = LOCAL_LAB
    threads: int | None = None
    options: dict[str, str] = field(default_factory=dict)
    settings: DeviceSettings = field(default_factory=DeviceSettings)
    effort: float | None = None
    recipes: tuple[str, ...] = ()
    owner: str = ""
    power_cycle: tuple[str, ...] = ()

    @property
    def virtual(self) -> bool:
        return self.options.get("virtual") == "true"

    @property
    def shares_cpu(self) -> bool:
        """Whether it computes on its lab host's own CPU."""
        return self.kind == "host" or self.virtual

    def wants(self, recipe: str) -> bool:
        """Whether the recipe of this name is for it."""
        return not self.recipes or any(fnmatchcase(recipe, pattern) for pattern in self.recipes)

    def config(self, name: str, power_cycles_per_day: int = 3) -> DeviceConfig:
        """For the lab agent that owns it; see ``Inventory.config``."""
        return DeviceConfig(
            name,
            self.kind,
            self.threads,
            self.options,
            self.settings,
            self.power_cycle,
            power_cycles_per_day,
        )


@dataclass(frozen=True)
class LabEntry:
    """One lab host: a machine of the Ray cluster that devices are attached to."""

    node: str  # its name at `kvfarm join`, or its address in the cluster
    owner: str = ""


@dataclass(frozen=True)
class Limits:
    """power_cycles_per_day: of one device. longest_lease_s: see `kvfarm join`, which holds to it."""

    power_cycles_per_day: int = 3
    longest_lease_s: float = 24 * 3600.0


@dataclass(frozen=True)
class Inventory:
    """Everything farm.toml can say."""

    devices: dict[str, DeviceEntry] = field(default_factory=dict)
    labs: dict[str, LabEntry] = field(default_factory=dict)
    pools: dict[str, tuple[str, ...]] = field(default_factory=dict)
    limits: Limits = field(default_factory=Limits)
    entry: WorkThresholds = field(default_factory=WorkThresholds)

    def device(self, name: str) -> DeviceEntry:
        """One that is listed, or the virtual phone of that name. Raises InventoryError."""
        entry = self.devices.get(name) or _virtual_entry(name) or _simulated_entry(name)
        if entry is None:
            raise InventoryError(f"sought device {name!r}; there are {_known(self)}")
        return entry

    def config(self, name: str) -> DeviceConfig:
        """Of the device, for the lab agent that owns it. Raises InventoryError."""
        return self.device(name).config(name, self.limits.power_cycles_per_day)

    def serials(self) -> dict[str, str]:
        """Names of the phones that are listed, by serial number."""
        return {e.options["serial"]: name for name, e in self.devices.items() if "serial" in e.options}

    def owner(self, name: str) -> str:
        """Whom to ask about the device: its own owner, else that of its lab host; "": nobody is named."""
        entry = self.device(name)
        lab = self.labs.get(entry.lab)
        return entry.owner or (lab.owner if lab else "")


def effort_of(entry: DeviceEntry) -> float:
    """Share in (0, 1] of the programs and repeats asked for."""
    if entry.effort is not None:
        return entry.effort
    # Of a lab host elsewhere it is not known what it runs by itself.
    if not entry.virtual or entry.lab != LOCAL_LAB or "abi" not in entry.options:
        return 1.0
    try:
        return 1.0 if entry.options["abi"] == native_abi() else FOREIGN_EFFORT
    except VirtualPhoneUnavailable:  # said when it is started
        return 1.0


def share(count: int, effort: float, least: int) -> int:
    """``effort`` of ``count``; at least ``least``, unless less was asked for."""
    return min(count, max(least, round(count * effort)))


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
    """Device names for ``farm`` (every listed device), or names of devices and pools and ``virtual:N``,
    separated by commas. In the order given, each once; ``Inventory.device`` knows each of them.

    Raises:
        InventoryError: an unknown name; the message lists those there are.
    """
    chosen: dict[str, None] = {}
    for name in filter(None, (part.strip() for part in expression.split(","))):
        if name == ALL:
            chosen.update(dict.fromkeys(inventory.devices))
        elif name in inventory.pools:
            chosen.update(dict.fromkeys(members(name, inventory)))
        else:
            chosen.update(dict.fromkeys(_named(name, inventory)))
    if not chosen:
        raise InventoryError(f"no device in {expression!r}; there are {_known(inventory)}")
    return tuple(chosen)


def members(pool: str, inventory: Inventory) -> tuple[str, ...]:
    """The devices of a pool, each once."""
    return tuple(
        dict.fromkeys(name for member in inventory.pools[pool] for name in _named(member, inventory))
    )


def _named(name: str, inventory: Inventory) -> tuple[str, ...]:
    """The one device of this name, or the virtual phones that it asks for."""
    if name.startswith(f"{VIRTUAL}:"):
        return _virtual_names(name)
    if name.startswith(f"{SIMULATED}:"):
        return _simulated_names(name)
    if name in inventory.devices or _virtual_entry(name) or _simulated_entry(name):
        return (name,)
    raise InventoryError(f"sought device or pool {name!r}; there are {_known(inventory)}")


def _virtual_names(text: str) -> tuple[str, ...]:
    """Of ``virtual:N`` and so on."""
    _, count, *kinds = text.split(":")
    if not count.isdigit() or not 1 <= int(count) <= MOST_VIRTUAL or not _virtual_options(kinds):
        raise InventoryError(
            f"sought virtual:N, N from 1 to {MOST_VIRTUAL}, then :ABI ({', '.join(ABIS)}) or :PROFILE "
            f"({', '.join(profile_names())}) or both; found {text!r}"
        )
    return tuple("-".join([VIRTUAL, *kinds, str(number)]) for number in range(1, int(count) + 1))


def _virtual_options(kinds: Sequence[str]) -> dict[str, str] | None:
    """Options of a virtual phone of [ABI] [PROFILE]; None for anything else."""
    options, rest = {"virtual": "true"}, list(kinds)
    if rest and rest[0] in ABIS:
        options["abi"] = rest.pop(0)
    if rest and rest[0] in profile_names():
        options["profile"] = rest.pop(0)
    return None if rest else options


def _virtual_entry(name: str) -> DeviceEntry | None:
    """What virtual[-ABI][-PROFILE]-NUMBER means; both may have hyphens in them."""
    kind, _, number = name.rpartition("-")
    if not number.isdigit() or kind.split("-")[0] != VIRTUAL:
        return None
    for abi in ("", *ABIS):
        for profile in ("", *profile_names()):
            kinds = [part for part in (abi, profile) if part]
            if kind == "-".join([VIRTUAL, *kinds]):
                options = _virtual_options(kinds)
                return DeviceEntry("android", options=options) if options else None
    return None


def _simulated_names(text: str) -> tuple[str, ...]:
    """Of ``simulated:N``."""
    count = text.partition(":")[2]
    if not count.isdigit() or not 1 <= int(count) <= MOST_SIMULATED:
        raise InventoryError(f"sought {SIMULATED}:N, N from 1 to {MOST_SIMULATED}; found {text!r}")
    return tuple(f"{SIMULATED}-{number}" for number in range(1, int(count) + 1))


def _simulated_entry(name: str) -> DeviceEntry | None:
    kind, _, number = name.rpartition("-")
    return DeviceEntry(SIMULATED) if kind == SIMULATED and number.isdigit() else None


def _check(path: Path, inventory: Inventory) -> None:
    if not inventory.devices:
        raise InventoryError(f"{path} lists no device; add [devices.NAME] or remove the file")
    if clash := set(inventory.pools) & {*inventory.devices, ALL, ADB}:
        raise InventoryError(
            f"{path}: pool {min(clash)!r} has the name of a device, of {ALL!r} or of {ADB!r}; rename it"
        )
    for name, device in inventory.devices.items():
        if name in (ALL, ADB) or {",", ":", *RESERVED} & set(name) or not name.strip():
            raise InventoryError(
                f"{path}: {name!r} cannot name a device; {ALL!r} means all, {ADB!r} those that adb knows"
            )
        if device.lab != LOCAL_LAB and device.lab not in inventory.labs:
            labs = ", ".join(inventory.labs) or "none"
            raise InventoryError(f"{path}: device {name!r} is at lab {device.lab!r}; there are: {labs}")
        if device.threads is not None and device.threads < 1:
            raise InventoryError(f"{path}: device {name!r}: threads must be at least 1")
        if device.settings != DeviceSettings() and device.kind != "android":
            raise InventoryError(f"{path}: device {name!r}: only phones have settings; take them out")
        if device.effort is not None and not 0 < device.effort <= 1:
            raise InventoryError(
                f"{path}: device {name!r}: sought an effort above 0, up to 1, found {device.effort:g}"
            )
        if device.power_cycle and (device.kind == "host" or device.virtual):
            raise InventoryError(f"{path}: device {name!r}: only real phones are power-cycled; take it out")
        if device.power_cycle and not all(word and word.isprintable() for word in device.power_cycle):
            raise InventoryError(
                f"{path}: device {name!r}: sought a program and its arguments in power_cycle, "
                f"found {list(device.power_cycle)}"
            )
        brightness = device.settings.brightness
        if brightness is not None and not 0 <= brightness <= 255:
            raise InventoryError(
                f"{path}: device {name!r}: sought a brightness from 0 to 255, found {brightness}"
            )
    _check_limits(path, inventory)
    for found in fitness.wrong(inventory.entry):
        raise InventoryError(f"{path}: {found}")
    for name, members in inventory.pools.items():
        for member in members:
            try:
                _named(member, inventory)
            except InventoryError as error:
                raise InventoryError(f"{path}: pool {name!r} names device {member!r}: {error}") from error


def _check_limits(path: Path, inventory: Inventory) -> None:
    limits = inventory.limits
    if limits.power_cycles_per_day < 0:
        raise InventoryError(
            f"{path}: sought power_cycles_per_day of 0 or more, found {limits.power_cycles_per_day}"
        )
    if not 60 <= limits.longest_lease_s <= 24 * 3600:
        raise InventoryError(
            f"{path}: sought longest_lease_s from 60 to 86400, found {limits.longest_lease_s:g}"
        )
    phones: dict[tuple[str, str], str] = {}
    for name, device in inventory.devices.items():
        if serial := device.options.get("serial"):
            first = phones.setdefault((device.lab, serial), name)
            if first != name:
                raise InventoryError(f"{path}: {first} and {name} are one phone, serial {serial}; keep one")
    for name, lab in inventory.labs.items():
        if name == LOCAL_LAB or not lab.node.strip():
            raise InventoryError(
                f"{path}: sought a lab host other than {LOCAL_LAB!r} and its node, found {name!r} and "
                f"{lab.node!r}"
            )


def _known(inventory: Inventory) -> str:
    return ", ".join(
        [
            *inventory.devices,
            *inventory.pools,
            f"{ALL} (every device)",
            f"{ADB} (phones that adb knows)",
            f"{VIRTUAL}:N (virtual phones)",
            f"{SIMULATED}:N (devices without an engine)",
        ]
    )

"""What a lab host says of itself to everybody, and what it is asked for: JSON in the head's store."""

from __future__ import annotations

import time
import uuid
from dataclasses import dataclass, field

from harness.errors import InventoryError
from harness.hosting.head import Head, connect
from harness.inventory import DeviceEntry, Inventory, LabEntry

HOSTS, ORDERS = "host/", "order/"  # before a host's name
PUBLISH_S = 1.0
LATE_S = 10.0  # a host that has not published for so long is not well


@dataclass(frozen=True)
class HostDevice:
    """A device of a lab host. entry: as its farm.toml has it, or as it was found on adb.

    plugged: the state that adb gives; "" is absent, None for what adb has nothing to do with. listed: it
    is in the host's farm.toml. holder: who has it.
    """

    entry: DeviceEntry
    plugged: str | None = None
    listed: bool = True
    holder: str = ""

    @property
    def state(self) -> str:
        """In one word or two, for people."""
        if not self.listed:
            return f"not in farm.toml ({self.plugged})"
        if self.plugged == "":
            return "unplugged"
        if self.plugged not in (None, "device"):
            return str(self.plugged)
        return f"leased to {self.holder}" if self.holder else "free"


@dataclass(frozen=True)
class HostRecord:
    """A lab host. address: of its Ray node, whose id is ``node``. since, seen: Unix times, s, by its clock.

    drained: by whom and why; "": it is not. adb: what is wrong with its adb server, if it has to do with one.
    """

    name: str
    address: str
    node: str
    versions: dict[str, str]
    system: str
    since: float
    seen: float
    devices: dict[str, HostDevice] = field(default_factory=dict)
    pools: dict[str, tuple[str, ...]] = field(default_factory=dict)
    owner: str = ""
    drained: str = ""
    adb: str = ""


@dataclass(frozen=True)
class Order:
    """What a host is asked to do, by whom and why. id: each is followed once."""

    drain: bool
    by: str
    why: str
    id: str = field(default_factory=lambda: uuid.uuid4().hex)


@dataclass(frozen=True)
class Host:
    """A record, and whether its node is alive now."""

    record: HostRecord
    alive: bool

    @property
    def state(self) -> str:
        """One word: lost, late, drained or ready."""
        if not self.alive:
            return "lost"
        if time.time() - self.record.seen > LATE_S:
            return "late"
        return "drained" if self.record.drained else "ready"


def hosts(head: Head) -> tuple[Host, ...]:
    """All lab hosts that joined and did not leave, by name; those that were lost as well."""
    alive = head.alive()
    records = head.all(HostRecord, HOSTS)
    return tuple(Host(record, record.node in alive) for _, record in sorted(records.items()))


def inventory_of(found: tuple[Host, ...]) -> Inventory:
    """All that living hosts offer, as one inventory; each host is also a pool of its devices."""
    devices: dict[str, DeviceEntry] = {}
    pools: dict[str, tuple[str, ...]] = {}
    living = [host.record for host in found if host.alive]
    for record in living:
        devices |= {name: each.entry for name, each in record.devices.items() if each.listed}
        for pool, names in record.pools.items():
            pools[pool] = pools.get(pool, ()) + names
        if record.name not in record.devices:
            pools[record.name] = tuple(name for name in record.devices if name in devices)
    return Inventory(devices, {record.name: LabEntry(record.name) for record in living}, pools)


def offered_at(address: str) -> Inventory | None:
    """What the hosts of the cluster offer; None: nobody joined it by `kvfarm join`.

    Raises:
        InventoryError: no host offers a device. InfrastructureError: no cluster.
    """
    found = hosts(connect(address, f"could not ask the cluster at {address} for its devices"))
    offered = inventory_of(found)
    if found and not offered.devices:
        said = ", ".join(f"{host.record.name} is {host.state}" for host in found)
        raise InventoryError(f"sought devices at {address}, found none: {said}; see `kvfarm hosts`")
    return offered if found else None

"""A farm of simulated devices on many lab hosts, all on this machine: real Ray, Farm, LabAgent and leases.

Each lab host is one Ray actor with a LabAgent and a lease journal of its own, as a machine of its own would
have. What is not real is the devices, and that one kernel and one Ray node carry all hosts.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from device_agents.config import DeviceConfig
from harness.farm import Farm
from harness.inventory import SIMULATED, DeviceEntry, Inventory, LabEntry
from harness.lab import Lab, LabActor, Node, here

MOST_OF_A_HOST = 40  # devices; STF's users give up at some 20 phones a PC (openstf #299), hubs allow more


class HostActor(LabActor):
    """A lab agent whose leases are in its own folder."""

    def _start(self, root: Path | None, configs: Sequence[DeviceConfig]) -> None:
        assert root is not None
        os.environ["KVFARM_LEASES"] = str(root / "leases")
        super()._start(root, configs)


class HostLab(Lab):
    """Several on one Ray node."""

    actor = HostActor

    @property
    def _actor_name(self) -> str:
        return f"lab-agent-{self.name}"


class SimulatedFarm(Farm):
    """folder: of the hosts."""

    def __init__(self, inventory: Inventory, names: tuple[str, ...], folder: Path) -> None:
        super().__init__(inventory, names)
        self._folder = folder

    def _lab_of(self, name: str) -> Lab:
        if name not in self._labs:
            self._labs[name] = HostLab(
                name, self._node_of(name), self._folder / name, detached=False, shared=False
            )
        return self._labs[name]

    def _node_of(self, lab: str) -> Node:
        return here()

    def __enter__(self) -> SimulatedFarm:
        super().__enter__()
        return self

    def start(self) -> None:
        """All agents, and nothing else; they load side by side."""
        for lab in self._labs.values():
            self._ready(lab)


def inventory_of(devices: int, options: dict[str, str]) -> Inventory:
    """``devices`` on as few lab hosts as hold them. options: of each, see device_agents.simulated.device."""
    hosts = -(-devices // MOST_OF_A_HOST)
    labs = {f"host-{host:02}": LabEntry(node="") for host in range(1, hosts + 1)}
    return Inventory(
        devices={
            f"{host}-{number:02}": DeviceEntry(SIMULATED, lab=host, options=options)
            for at, host in enumerate(labs)
            for number in range(1, min(MOST_OF_A_HOST, devices - at * MOST_OF_A_HOST) + 1)
        },
        labs=labs,
    )

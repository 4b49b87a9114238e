"""Starting a device anew: what a device may offer besides api.Device. How often, the lease journal says."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

from device_agents.api import Device
from device_agents.deadline import Deadline
from device_agents.errors import InfrastructureError
from device_agents.leases.model import How


@runtime_checkable
class Reboots(Protocol):
    """A device that can be told to start anew while it answers."""

    def reboot(self, deadline: Deadline) -> None:
        """Returns when it was told. Raises InfrastructureError: it does not take it."""
        ...


@runtime_checkable
class PowerCycles(Protocol):
    """A device whose port can be switched off and on."""

    def power_cycle(self, deadline: Deadline) -> None:
        """Returns when the port is on again. Raises InfrastructureError."""
        ...


def check(device: Device, how: How) -> None:
    """Raises InfrastructureError: it cannot be restarted so."""
    if not isinstance(device, Reboots if how == "reboot" else PowerCycles):
        raise InfrastructureError(f"{device.name}: sought a {how}, but there is no way to do one")


def restart(device: Device, how: How, deadline: Deadline) -> None:
    """Raises InfrastructureError: it cannot be, or does not take it."""
    check(device, how)
    if how == "reboot" and isinstance(device, Reboots):
        device.reboot(deadline)
    elif isinstance(device, PowerCycles):
        device.power_cycle(deadline)

"""Starting a device anew: what a device may offer besides api.Device. How often, the lease journal says."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

from device_agents.api import Device
from device_agents.deadline import Deadline
from device_agents.errors import InfrastructureError


@runtime_checkable
class Reboots(Protocol):
    """A device that can be told to start anew while it answers."""

    def reboot(self, deadline: Deadline) -> None:
        """Returns when it was told. Raises InfrastructureError: it does not take it."""
        ...


def check(device: Device) -> Reboots:
    """The device. Raises InfrastructureError: there is no way to reboot it."""
    if not isinstance(device, Reboots):
        raise InfrastructureError(f"{device.name}: sought a reboot, but there is no way to do one")
    return device

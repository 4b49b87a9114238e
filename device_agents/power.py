"""Taking a device's power away and giving it back, by a program of the lab host.

The program is named in farm.toml as a list of words and started as such; there is no shell that a serial
number could talk to. Every cycle is noted in the lease journal before it is tried, so that whatever dies, no
device is cycled more often in a day than its limit says.
"""

from __future__ import annotations

import subprocess
from collections.abc import Sequence

from device_agents.config import DeviceConfig
from device_agents.deadline import Deadline
from device_agents.errors import InfrastructureError, LeaseError
from device_agents.leases import protocol
from device_agents.leases.ledger import Ledger

_MOST_CHARS = 200  # of its output, in an error


class PowerCycleFailed(InfrastructureError):
    """The device was not cycled: its limit is reached, or the program failed or took too long."""


def cycle(config: DeviceConfig, key: str, by: str, reason: str, ledger: Ledger, deadline: Deadline) -> str:
    """Cut the device's power as its farm.toml says; returns what was done, for people.

    key: how the journal names it. by: whose lease it is.

    Raises:
        PowerCycleFailed: see the class.
    """
    limit = config.power_cycles_per_day
    if not config.power_cycle:
        raise PowerCycleFailed(f"{config.name}: farm.toml names no power_cycle for it")
    try:
        ledger.act(protocol.restart(key, "power-cycle", by, reason, limit))
    except LeaseError as error:
        raise PowerCycleFailed(
            f"{key} was power-cycled {limit} times within a day, its limit is {limit}; see to it"
        ) from error
    return _run(config.power_cycle, key, deadline)


def _run(command: Sequence[str], device: str, deadline: Deadline) -> str:
    try:
        done = subprocess.run(
            list(command),
            timeout=max(0.001, deadline.remaining),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise PowerCycleFailed(
            f"{device}: {command[0]} took over {deadline.seconds:g} s and was ended"
        ) from None
    except OSError as error:
        raise PowerCycleFailed(
            f"{device}: sought the program {command[0]} on its lab host: {error.strerror}; install it "
            "there, or correct power_cycle in farm.toml"
        ) from error
    if done.returncode:
        said = " ".join(done.stdout.decode(errors="replace").split())[:_MOST_CHARS]
        raise PowerCycleFailed(f"{device}: {command[0]} gave {done.returncode}: {said or 'it said nothing'}")
    return f"power-cycled with {command[0]}"

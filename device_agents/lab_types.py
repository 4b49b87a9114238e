"""What a lab agent answers with, and the seconds it allows for it: plain, picklable data."""

from __future__ import annotations

from dataclasses import dataclass

from device_agents.api import DeviceIdentity


@dataclass(frozen=True)
class AgentBudgets:
    """Seconds for what the agent asks of a device; programs and workloads have their own, see Budgets."""

    # Long, for the first time an Android device is asked its bundle is made and brought; a device
    # that does not answer has shorter deadlines of its own.
    identity_s: float = 900.0
    deploy_s: float = 1800.0
    open_s: float = 300.0
    vitals_s: float = 10.0
    diagnose_s: float = 300.0  # a virtual phone is started for it, maybe its parts are fetched
    # Both happen while a lease of 30 s is not yet, or no more, renewed.
    claim_s: float = 20.0
    release_s: float = 15.0
    recording_s: float = 30.0
    reboot_s: float = 60.0
    power_s: float = 60.0


@dataclass(frozen=True)
class Lease:
    """Exclusive use of ``device``.

    token: to be shown with every use. id: of the request it came from. since, until, beat: Unix times, s, for
    display only: granted, over at the latest, last heartbeat.
    """

    device: str
    holder: str
    token: int
    id: str = ""
    user: str = ""
    since: float = 0.0
    until: float = 0.0
    beat: float = 0.0


@dataclass(frozen=True)
class Standing:
    """How a request stands. granted: all that it wants, or nothing yet.

    ahead: who is before it in line. why: a line for each device that it might have, while it waits.
    """

    granted: tuple[Lease, ...]
    ahead: tuple[str, ...] = ()
    why: tuple[str, ...] = ()


@dataclass(frozen=True)
class DeviceStatus:
    """One device now: who it is, or why it does not answer; who has it.

    quarantined: by whom and on what evidence. waiting: how many requests might get it. drained: why its whole
    lab host lends nothing.
    """

    name: str
    kind: str
    identity: DeviceIdentity | None
    error: str = ""
    lease: Lease | None = None
    quarantined: str = ""
    waiting: int = 0
    drained: str = ""

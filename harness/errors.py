"""What the harness itself refuses; each message says what was sought, what was found, what to do."""

from device_agents.errors import InfrastructureError


class HarnessError(Exception):
    """Base: a mistake in what the harness was given, neither the engine's nor the lab's."""


class InventoryError(HarnessError):
    """farm.toml cannot be used, or a name is not in it."""


class StoreError(HarnessError):
    """The result store cannot be opened, is of another version, or lacks what was asked for."""


class NotAuthenticated(InfrastructureError):
    """The cluster does not take our token, or we have none; the message says where it is sought."""


class VersionMismatch(InfrastructureError):
    """This machine has another Ray, Python or kvfarm than the cluster's head."""


class TooOpen(InfrastructureError):
    """Ray would listen on networks that nobody named."""


class HostTaken(InfrastructureError):
    """Another machine of the cluster has this name, or this machine has joined already."""


class StoreAway(StoreError):
    """The result store cannot be reached, is busy or full: the same may succeed later."""


class CannotResume(HarnessError):
    """The run cannot be gone on with: it is finished, unknown, or at work, or tests another model now."""


class ClusterLost(InfrastructureError):
    """The Ray beneath the run has died: nothing more can be done in this process."""


class ReferenceFailed(InfrastructureError):
    """The process that computes the reference failed; no device had a part in it."""


class Quarantined(InfrastructureError):
    """The device was set aside for the rest of the run; the message holds the evidence."""


class NotFit(InfrastructureError):
    """The device was too hot or its battery too low to start, for as long as we may wait."""


class GoldenJobFailed(InfrastructureError):
    """The device gave a wrong answer to a program whose answer is known: the device is at fault."""

"""What can be wrong with a virtual phone itself, on top of device_agents.errors."""

from device_agents.errors import InfrastructureError


class VirtualPhoneUnavailable(InfrastructureError):
    """This machine does not allow or cannot make virtual phones; the message says why and what to do."""


class VirtualPhoneFailed(InfrastructureError):
    """A virtual phone that should have run did not start, or died."""

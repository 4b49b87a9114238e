"""Infrastructure errors: the lab failed, not the engine. Never reported as a test failure.

They cross process borders by pickle inside Ray, so each takes exactly one message.
"""


class InfrastructureError(Exception):
    """Base: a device, cable, process or host did not do its part."""


class DeadlineExceeded(InfrastructureError):
    """Something took longer than its deadline."""


class RunnerDied(InfrastructureError):
    """The runner process ended; the message holds its exit code and last stderr lines."""


class ProtocolError(InfrastructureError):
    """The other side sent what is not a frame, or a frame of the wrong kind."""


class DeployFailed(InfrastructureError):
    """An artifact could not be brought to the device whole."""


class BlobsMissing(DeployFailed):
    """The lab host lacks blobs of the artifact: send them, and try again."""


class BundleError(InfrastructureError):
    """The bundle for a device could not be made, or is not whole."""


class LeaseError(InfrastructureError):
    """No lease, an expired one, or a fencing token older than the current one."""


class LeaseNotGranted(LeaseError):
    """The devices were not free in time; the message says of each why."""


class RootTaken(LeaseError):
    """The folder belongs to another lab agent that lives."""


class NoSuchDevice(InfrastructureError):
    """No device of that name; the message lists those there are."""


class AdbFailure(InfrastructureError):
    """adb or the device behind it refused, broke off or answered nonsense; whatever adb raised ends here."""


class DeviceUnreachable(AdbFailure):
    """The device is not there or offline; it may come back."""


class Unauthorized(AdbFailure):
    """The device does not trust this lab host: its owner must accept the key."""


class UnsupportedDevice(InfrastructureError):
    """The device cannot run the engine whatever we do: another ABI, no shell v2, noexec, SELinux."""


class NoSpace(DeployFailed):
    """Too little free space on the device."""


class SettingFailed(InfrastructureError):
    """The device does not take a setting that its farm file asks for, or reads it back otherwise."""

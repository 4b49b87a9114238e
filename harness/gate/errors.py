"""What the gate refuses before it measures anything."""

from harness.errors import HarnessError


class GateSettingsError(HarnessError):
    """gate.toml cannot be used."""


class WaiverError(HarnessError):
    """waivers.toml cannot be used."""


class UnknownReference(HarnessError):
    """A REF names nothing that can be measured."""

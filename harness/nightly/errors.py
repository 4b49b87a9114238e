"""What a night refuses before it starts anything."""

from harness.errors import HarnessError


class NightError(HarnessError):
    """nightly.toml cannot be used, or another night is at work here."""

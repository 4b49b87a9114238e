"""What can stop a benchmark."""

from __future__ import annotations


class BenchError(Exception):
    """Set-up failed, or a contestant died, hung or stopped early; the message says what to do."""

"""Latency and memory of every recipe on every device. Judges no number: the report and gates do."""

from __future__ import annotations

from collections.abc import Callable

from reports.results import LegResult


def test_latency_and_memory(leg: Callable[[], LegResult]) -> None:
    """Load time, TTFT, inter-token latency and memory"""
    result = leg()
    assert result.validity != "INVALID", "; ".join(result.reasons)

"""What a device does while it works: written down by itself, brought here afterwards."""

from device_agents.recording.answers import QUESTIONS, parse_vitals
from device_agents.recording.record import Plan, Record, Recording, RunnerUse, Sample, parse_log

__all__ = [
    "QUESTIONS",
    "Plan",
    "Record",
    "Recording",
    "RunnerUse",
    "Sample",
    "parse_log",
    "parse_vitals",
]

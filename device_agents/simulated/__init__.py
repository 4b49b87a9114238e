"""Devices that are numbers only: recorded latencies, sizes and failures, drawn anew. No adb, no engine."""

from device_agents.simulated.device import SimulatedDevice, make_simulated

__all__ = ["SimulatedDevice", "make_simulated"]

"""Joules for each token, from what a device recorded of itself; or why there are none."""

from device_agents.energy.calibration import CALIBRATION_PLAN, Calibration, calibrate
from device_agents.energy.ladder import MIN_WINDOW_S, Energy, Window, idle_needs, measure, unsupported
from device_agents.energy.series import Unsupported

__all__ = [
    "CALIBRATION_PLAN",
    "MIN_WINDOW_S",
    "Calibration",
    "Energy",
    "Unsupported",
    "Window",
    "calibrate",
    "idle_needs",
    "measure",
    "unsupported",
]

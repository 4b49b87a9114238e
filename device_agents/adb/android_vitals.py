"""Vitals of an Android device by one shell command; see ``device_agents.vitals`` for hosts."""

from __future__ import annotations

import time

from device_agents.adb.shell_text import ask
from device_agents.adb.transport import AdbTransport
from device_agents.api import Vitals
from device_agents.deadline import Deadline
from device_agents.recording.answers import QUESTIONS, parse_vitals


def read_android_vitals(transport: AdbTransport, deadline: Deadline) -> Vitals:
    """Raises DeviceUnreachable, DeadlineExceeded, AdbFailure."""
    return parse_vitals(ask(transport, QUESTIONS, deadline), time.time())

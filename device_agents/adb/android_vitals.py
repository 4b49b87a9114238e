"""Vitals of an Android device by one shell command; see ``device_agents.vitals`` for hosts.

Whatever cannot be read, or is known to lie, is None or absent, never a guess. Sources: AOSP
BatteryService.java and ThermalManagerService.java (their dumps), kernel sysfs-class-thermal.
"""

from __future__ import annotations

import re
import time

from device_agents.adb.shell_text import ask
from device_agents.adb.transport import AdbTransport
from device_agents.api import Vitals
from device_agents.deadline import Deadline

QUESTIONS = {
    "battery": "dumpsys battery",
    "thermal": "dumpsys thermalservice",
    "zones": ('for z in /sys/class/thermal/thermal_zone*; do echo "$(cat "$z/temp") $(cat "$z/type")"; done'),
    "clocks": (
        "for c in /sys/devices/system/cpu/cpu[0-9]*/cpufreq; do "
        'echo "${c#*cpu/cpu} $(cat "$c/scaling_cur_freq") $(cat "$c/scaling_governor")"; done'
    ),
    "memory": "grep MemAvailable /proc/meminfo",
    "load": "cat /proc/loadavg",
}
# Outside of it a zone is unwired, or counts in a unit of its own: tenths or whole degrees, read as
# thousandths, are below 1. Silicon shuts down by about 125 °C.
_PLAUSIBLE_C = (1.0, 127.0)
# BatteryManager.BATTERY_STATUS_*: charging 2, discharging 3, not charging 4, full 5.
_CHARGING = {"2": True, "3": False, "4": False, "5": False}
_FIELD = re.compile(r"^\s*([A-Za-z ]+): (\S+)\s*$", re.MULTILINE)
_STATUS = re.compile(r"^\s*Thermal Status: ([0-6])\s*$", re.MULTILINE)


def read_android_vitals(transport: AdbTransport, deadline: Deadline) -> Vitals:
    """Raises DeviceUnreachable, DeadlineExceeded, AdbFailure."""
    return parse_vitals(ask(transport, QUESTIONS, deadline), time.time())


def parse_vitals(answers: dict[str, str], at: float) -> Vitals:
    """``answers`` to QUESTIONS; at: Unix time, s."""
    percent, charging, battery_c = _battery(answers["battery"])
    clocks, governor = _clocks(answers["clocks"])
    temperatures = _zones(answers["zones"])
    if battery_c is not None:
        temperatures.setdefault("battery", battery_c)
    status = _STATUS.search(answers["thermal"])
    return Vitals(
        at=at,
        load_1m=_float(answers["load"].split()[:1]),
        mem_available_bytes=_kilobytes(answers["memory"]),
        clocks_khz=clocks,
        governor=governor,
        temperatures_c=temperatures,
        thermal_status=int(status[1]) if status else None,
        battery_percent=percent,
        battery_charging=charging,
    )


def _battery(text: str) -> tuple[float | None, bool | None, float | None]:
    """Percent, whether it charges, °C.

    After ``dumpsys battery unplug`` or ``set`` the service prints "UPDATES STOPPED" and goes on
    telling the level and the temperature of that moment for ever: then nothing is believed.
    """
    if "UPDATES STOPPED" in text.upper():
        return None, None, None
    fields = {name.strip().lower(): value for name, value in _FIELD.findall(text)}
    if fields.get("present") == "false":
        return None, None, None
    level, scale = _float([fields.get("level", "")]), _float([fields.get("scale", "100")])
    percent = None if level is None or not scale or level < 0 else 100 * level / scale
    tenths = _float([fields.get("temperature", "")])
    celsius = None if tenths is None else tenths / 10
    return percent, _CHARGING.get(fields.get("status", "")), _plausible(celsius)


def _zones(text: str) -> dict[str, float]:
    """°C by zone type; zones of the same type are told apart as type, type#2, ..."""
    found: dict[str, float] = {}
    for line in text.splitlines():
        raw, _, kind = line.strip().partition(" ")
        value = _float([raw])
        celsius = _plausible(None if value is None else value / 1000)
        if celsius is None or not kind:
            continue
        name, copies = kind, 1
        while name in found:
            copies += 1
            name = f"{kind}#{copies}"
        found[name] = celsius
    return found


def _clocks(text: str) -> tuple[tuple[int, ...], str | None]:
    """Current kHz by core number, and the governor, or several joined by "+"."""
    clocks: dict[int, int] = {}
    governors = set()
    for line in text.splitlines():
        words = line.split()
        core = words[0].removesuffix("/cpufreq") if words else ""
        if len(words) >= 2 and core.isdigit() and words[1].isdigit():
            clocks[int(core)] = int(words[1])
        if len(words) == 3:
            governors.add(words[2])
    return tuple(clocks[core] for core in sorted(clocks)), "+".join(sorted(governors)) or None


def _kilobytes(text: str) -> int | None:
    words = text.split()
    return int(words[1]) * 1024 if len(words) == 3 and words[1].isdigit() else None


def _float(words: list[str]) -> float | None:
    try:
        return float(words[0])
    except (IndexError, ValueError):
        return None


def _plausible(celsius: float | None) -> float | None:
    return celsius if celsius is not None and _PLAUSIBLE_C[0] <= celsius <= _PLAUSIBLE_C[1] else None

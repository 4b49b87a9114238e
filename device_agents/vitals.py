"""Vitals of a Linux or Android device, read from /proc and /sys. Runs in the runner: stdlib only.

Whatever cannot be read is None or absent, never a guess. Sources: Linux
Documentation/ABI/testing/sysfs-class-thermal, sysfs-class-power, cpu-freq.rst, proc(5).
"""

from __future__ import annotations

import os
import time
from pathlib import Path

from device_agents.api import Vitals

# Outside of this a zone is unwired or counts in a unit of its own: -273 °C and 128 °C-plus
# fillers are common on phones. Silicon shuts down by about 125 °C.
_PLAUSIBLE_C = (-40.0, 127.0)


def read_vitals(root: Path = Path("/"), now: float | None = None) -> Vitals:
    """The device's state now. ``root``: where /proc and /sys lie. ``now``: Unix time, s."""
    percent, charging = _battery(root / "sys/class/power_supply")
    clocks, governor = _clocks(root / "sys/devices/system/cpu")
    return Vitals(
        at=time.time() if now is None else now,
        load_1m=_load(root / "proc/loadavg"),
        busy_s=_busy(root / "proc/stat"),
        mem_available_bytes=_mem_available(root / "proc/meminfo"),
        clocks_khz=clocks,
        governor=governor,
        temperatures_c=_temperatures(root / "sys/class/thermal"),
        battery_percent=percent,
        battery_charging=charging,
    )


def _text(path: Path) -> str | None:
    try:
        return path.read_text(errors="replace").strip()
    except OSError:
        return None


def _integer(path: Path) -> int | None:
    text = _text(path)
    try:
        return None if text is None else int(text)
    except ValueError:
        return None


def _numbered(folder: Path, prefix: str) -> list[Path]:
    """``prefix``0, ``prefix``1, ... in numeric order."""
    try:
        found = [p for p in folder.iterdir() if p.name.removeprefix(prefix).isdigit()]
    except OSError:
        return []
    return sorted((p for p in found if p.name.startswith(prefix)), key=lambda p: int(p.name[len(prefix) :]))


def _load(path: Path) -> float | None:
    try:
        return float((_text(path) or "").split()[0])
    except (IndexError, ValueError):
        return None


def _busy(path: Path) -> float | None:
    """user, nice, system, irq, softirq and steal of all CPUs, s (proc_stat(5)); iowait is idle."""
    first = (_text(path) or "").partition("\n")[0].split()
    if len(first) < 9 or first[0] != "cpu" or not all(word.isdigit() for word in first[1:9]):
        return None
    user, nice, system, _idle, _iowait, irq, softirq, steal = map(int, first[1:9])
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")


def _mem_available(path: Path) -> int | None:
    for line in (_text(path) or "").splitlines():
        words = line.split()
        if len(words) == 3 and words[0] == "MemAvailable:" and words[1].isdigit() and words[2] == "kB":
            return int(words[1]) * 1024
    return None


def _clocks(folder: Path) -> tuple[tuple[int, ...], str | None]:
    """Current kHz of every core that tells it; the governor, or several joined by "+"."""
    policies = [core / "cpufreq" for core in _numbered(folder, "cpu")]
    clocks = [clock for policy in policies if (clock := _integer(policy / "scaling_cur_freq")) is not None]
    governors = {name for policy in policies if (name := _text(policy / "scaling_governor"))}
    return tuple(clocks), "+".join(sorted(governors)) or None


def _temperatures(folder: Path) -> dict[str, float]:
    """°C by zone type; zones of the same type are told apart as type, type#2, ..."""
    found: dict[str, float] = {}
    for zone in _numbered(folder, "thermal_zone"):
        millidegrees = _integer(zone / "temp")
        if millidegrees is None:
            continue
        celsius = millidegrees / 1000
        if not _PLAUSIBLE_C[0] <= celsius <= _PLAUSIBLE_C[1]:
            continue
        kind = _text(zone / "type") or zone.name
        name, copies = kind, 1
        while name in found:
            copies += 1
            name = f"{kind}#{copies}"
        found[name] = celsius
    return found


def _battery(folder: Path) -> tuple[float | None, bool | None]:
    """Percent and whether it charges, of the supply that powers the system.

    A wireless mouse is a power supply of type Battery too; its ``scope`` is "Device".
    """
    try:
        supplies = sorted(folder.iterdir())
    except OSError:
        return None, None
    for supply in supplies:
        if _text(supply / "type") != "Battery" or _text(supply / "scope") == "Device":
            continue
        percent = _integer(supply / "capacity")
        status = _text(supply / "status")
        charging = {"Charging": True, "Full": False, "Discharging": False, "Not charging": False}
        return (None if percent is None else float(percent)), charging.get(status or "")
    return None, None

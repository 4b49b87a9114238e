"""What a Linux or Android device is asked, in shell, and what its answers mean.

Whatever cannot be read, or is known to lie, is None or absent, never a guess. Sources: AOSP
BatteryService.java and ThermalManagerService.java (their dumps), kernel sysfs-class-thermal,
sysfs-class-power, proc(5).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from device_agents.api import Vitals

# Read with the shell's own `read` wherever a file has one line: no process is started for it.
QUESTIONS = {
    "battery": "dumpsys battery",
    "thermal": "dumpsys thermalservice",
    "zones": (
        "for z in /sys/class/thermal/thermal_zone*; do "
        'if read -r a <"$z/temp" && read -r b <"$z/type"; then echo "$a $b"; fi; done'
    ),
    "clocks": (
        "for c in /sys/devices/system/cpu/cpu[0-9]*/cpufreq; do "
        'if read -r a <"$c/scaling_cur_freq" && read -r b <"$c/scaling_governor"; '
        'then a="${c#*cpu/cpu} $a $b"; echo "$a"; fi; done'
    ),
    "memory": "grep MemAvailable /proc/meminfo",
    "load": "if read -r a </proc/loadavg; then echo $a; fi",
}
# Outside of it a zone is unwired, or counts in a unit of its own: tenths or whole degrees, read as
# thousandths, are below 1. Silicon shuts down by about 125 °C, and what is not wired parks there.
_PLAUSIBLE_C = (1.0, 124.9)
# A lab's battery. Whole degrees read as tenths are below.
_BATTERY_C = (10.0, 80.0)
# BatteryManager.BATTERY_STATUS_*: charging 2, discharging 3, not charging 4, full 5.
_CHARGING = {"2": True, "3": False, "4": False, "5": False}
_FIELD = re.compile(r"^\s*([A-Za-z ]+): (\S+)\s*$", re.MULTILINE)
_STATUS = re.compile(r"^\s*Thermal Status: ([0-6])\s*$", re.MULTILINE)
_HAL = "Current temperatures from HAL:"
_HAL_END = "Current cooling devices from HAL:"
_TEMPERATURE = re.compile(
    r"Temperature\{mValue=(-?\d+(?:\.\d+)?), mType=(-?\d+), mName=([^,}]+), mStatus=\d\}"
)
# android.os.Temperature: CPU 0, GPU 1, BATTERY 2, SKIN 3, ..., NPU 9. Others count what is no temperature.
_TYPES = frozenset((-1, 0, 1, 2, 3, 4, 5, 9))
_RAIL = re.compile(r"^CH\d+\(T=(\d+)\)\[([^\]]{1,40})\], (\d+)$", re.MULTILINE)


@dataclass(frozen=True)
class Gauge:
    """What the battery tells; None is "not told". Units of ``current`` are the model's own.

    voltage_v: V. counter_uah: charge left, µAh as documented. stopped: "UPDATES STOPPED".
    """

    voltage_v: float | None = None
    counter_uah: int | None = None
    current: int | None = None
    plugged: bool | None = None
    charging: bool | None = None
    percent: float | None = None
    celsius: float | None = None
    stopped: bool = False


def parse_vitals(answers: Mapping[str, str], at: float) -> Vitals:
    """``answers`` to QUESTIONS; at: Unix time, s. A question that was not asked counts as not answered."""
    get = answers.get
    gauge = parse_gauge(get("battery", ""))
    clocks, governor = _clocks(get("clocks", ""))
    temperatures = _zones(get("zones", ""))
    if gauge.celsius is not None:
        temperatures.setdefault("battery", gauge.celsius)
    dump = _whole(get("thermal", ""))
    for name, celsius in _sensors(dump).items():
        temperatures.setdefault(name, celsius)
    status = _STATUS.search(dump)
    return Vitals(
        at=at,
        load_1m=_float(get("load", "").split()[:1]),
        mem_available_bytes=_kilobytes(get("memory", "")),
        clocks_khz=clocks,
        governor=governor,
        temperatures_c=temperatures,
        thermal_status=int(status[1]) if status else None,
        battery_percent=gauge.percent,
        battery_charging=gauge.charging,
    )


def parse_gauge(dump: str, current: str = "", supply: str = "") -> Gauge:
    """dump: of `dumpsys battery`. current: of `cmd battery get -f current_now`. supply: "name value" lines.

    After ``dumpsys battery unplug`` or ``set`` the service prints "UPDATES STOPPED" and goes on
    telling the level and the temperature of that moment for ever: then nothing is believed.
    """
    if "UPDATES STOPPED" in dump.upper():
        return Gauge(stopped=True)
    fields = {name.strip().lower(): value for name, value in _FIELD.findall(_whole(dump))}
    if fields.get("present") == "false":
        return Gauge()
    files = dict(line.split(maxsplit=1) for line in supply.splitlines() if len(line.split(maxsplit=1)) == 2)
    level, scale = integer(fields.get("level")), integer(fields.get("scale", "100"))
    percent = None if level is None or not scale or level < 0 else 100 * level / scale
    tenths, millivolts = integer(fields.get("temperature")), integer(fields.get("voltage"))
    microvolts, counter = integer(files.get("voltage_now")), integer(files.get("charge_counter"))
    volts = microvolts / 1e6 if microvolts is not None else None if millivolts is None else millivolts / 1e3
    told = integer(files.get("current_now"))
    told = told if told is not None else integer(current.strip())
    powered = [fields.get(f"{way} powered") for way in ("ac", "usb", "wireless", "dock")]
    return Gauge(
        voltage_v=volts if volts is not None and 2.5 <= volts <= 10.0 else None,
        counter_uah=counter if counter is not None else integer(fields.get("charge counter")),
        current=None if told is None or abs(told) >= 2**31 - 1 else told,  # Integer.MIN_VALUE is "unknown"
        plugged=None if powered[:2] == [None, None] else "true" in powered,
        charging=_CHARGING.get(fields.get("status", "")),
        percent=percent,
        celsius=_within(_BATTERY_C, None if tenths is None else tenths / 10),
    )


def parse_rails(text: str) -> dict[str, tuple[float, int]]:
    """Of each rail: when it was read, s on the meter's clock, and its energy since boot, µJ."""
    return {name: (int(at) / 1000, int(energy)) for at, name, energy in _RAIL.findall(text)}


def integer(text: str | None) -> int | None:
    """Digits of any script, for a locale may choose them, and nothing else: 3.912 may be 3912 or 4."""
    return int(text) if text is not None and re.fullmatch(r"-?\d{1,15}", text) else None


def _whole(dump: str) -> str:
    """Without what a dump that broke off has last: 39 may be the beginning of 3912."""
    head, broken, _ = dump.partition("\n*** SERVICE ")
    fields = head.strip().splitlines()
    known_end = any(line.strip().startswith(("technology:", "HAL Ready: false")) for line in fields)
    if broken or (not known_end and "ThermalEventListeners" not in head):
        fields = fields[:-1]
    return "\n".join(fields)


def _sensors(dump: str) -> dict[str, float]:
    """°C by the names that the thermal HAL has now; those cached may be minutes old."""
    now = dump.partition(_HAL)[2].partition(_HAL_END)[0]
    found: dict[str, float] = {}
    for value, kind, name in _TEMPERATURE.findall(now):
        celsius = _within(_PLAUSIBLE_C, float(value))
        if celsius is not None and int(kind) in _TYPES:
            found[_unique(name, found)] = celsius
    return found


def _zones(text: str) -> dict[str, float]:
    """°C by zone type; zones of the same type are told apart as type, type#2, ..."""
    found: dict[str, float] = {}
    for line in text.splitlines():
        raw, _, kind = line.strip().partition(" ")
        value = integer(raw)
        celsius = _within(_PLAUSIBLE_C, None if value is None else value / 1000)
        if celsius is not None and kind:
            found[_unique(kind, found)] = celsius
    return found


def _unique(kind: str, found: Mapping[str, float]) -> str:
    name, copies = kind, 1
    while name in found:
        copies += 1
        name = f"{kind}#{copies}"
    return name


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


def _within(bounds: tuple[float, float], celsius: float | None) -> float | None:
    return celsius if celsius is not None and bounds[0] <= celsius <= bounds[1] else None

"""Who an Android device is, without a runner: its properties, memory and cores.

Sources: AOSP build/make/tools/buildinfo.sh and Android's Build.java for the properties, the dumps of
BatteryService and ThermalManagerService for battery and sensors;
kernel Documentation/admin-guide/cputopology.rst and cpu-freq for the clusters.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from device_agents.adb.shell_text import ask
from device_agents.adb.transport import AdbTransport
from device_agents.api import Cluster
from device_agents.deadline import Deadline
from device_agents.errors import AdbFailure

# Set by device_agents.virtual's profiles; a real device has no such property.
VIRTUAL_PROPERTY = "ro.kvfarm.virtual"
VIRTUAL = "virtual phone"
EMULATOR = "Android emulator"

_SENSOR = re.compile(r"Temperature\{[^}]*\bmName=([^,}]+)")
_PRESENT = re.compile(r"^\s*present: (true|false)\s*$", re.MULTILINE)
_PROPERTY = re.compile(r"\[([^\]]+)\]: \[(.*)\]")
_QUESTIONS = {
    "properties": "getprop",
    "memory": "cat /proc/meminfo",
    "kernel": "uname -r",
    "cores": (
        "for c in /sys/devices/system/cpu/cpu[0-9]*; do "
        'echo "${c##*/cpu} $(cat "$c/cpufreq/cpuinfo_max_freq" 2>/dev/null)"; done'
    ),
    "thermal": 'for z in /sys/class/thermal/thermal_zone*; do cat "$z/type"; done',
    "sensors": "dumpsys thermalservice",
    "battery": "dumpsys battery",
    "enforce": "getenforce",
}


@dataclass(frozen=True)
class Facts:
    """What the device says of itself; "" and None are "not told"."""

    serial: str
    model: str
    soc: str
    abi: str
    abis: tuple[str, ...]
    release: str  # Android's version
    api: int | None
    fingerprint: str
    kernel: str
    ram_bytes: int
    clusters: tuple[Cluster, ...]
    thermal_zones: tuple[str, ...]  # of the kernel, where the shell user may see them
    thermal_sensors: tuple[str, ...]  # of the thermal HAL
    battery: bool | None
    enforcing: bool | None  # SELinux
    simulated: str

    @property
    def cores(self) -> int:
        return sum(len(cluster.cores) for cluster in self.clusters)

    @property
    def os(self) -> str:
        return f"Android {self.release}" + (f" (API {self.api})" if self.api is not None else "")


def read_facts(transport: AdbTransport, deadline: Deadline) -> Facts:
    """Ask the device.

    Raises:
        AdbFailure: it answers, but not as an Android device does. DeviceUnreachable, DeadlineExceeded.
    """
    answers = ask(transport, _QUESTIONS, deadline)
    properties = parse_properties(answers["properties"])
    get = properties.get
    abi = get("ro.product.cpu.abi", "")
    if not abi:
        raise AdbFailure(
            f"{transport.serial}: sought the property ro.product.cpu.abi, found {len(properties)} properties "
            "without it; is this an Android device?"
        )
    maker, model = get("ro.product.manufacturer", ""), get("ro.product.model", "")
    chip_maker = get("ro.soc.manufacturer", "")
    # ro.soc.* exist since Android 12.
    chip = get("ro.soc.model") or get("ro.board.platform") or get("ro.hardware", "")
    api = get("ro.build.version.sdk", "")
    return Facts(
        serial=get("ro.serialno") or transport.serial,
        model=model if model.lower().startswith(maker.lower()) else f"{maker} {model}".strip(),
        soc=f"{chip_maker} {chip}".strip(),
        abi=abi,
        abis=tuple(filter(None, get("ro.product.cpu.abilist", abi).split(","))),
        release=get("ro.build.version.release", ""),
        api=int(api) if api.isdigit() else None,
        fingerprint=get("ro.build.fingerprint", ""),
        kernel=answers["kernel"],
        ram_bytes=mem_total(answers["memory"]),
        clusters=parse_clusters(answers["cores"]),
        thermal_zones=tuple(answers["thermal"].split()),
        thermal_sensors=tuple(dict.fromkeys(_SENSOR.findall(answers["sensors"]))),
        battery={"true": True, "false": False}.get(_found(_PRESENT, answers["battery"])),
        enforcing={"Enforcing": True, "Permissive": False, "Disabled": False}.get(answers["enforce"]),
        simulated=_simulated(properties),
    )


def parse_properties(text: str) -> dict[str, str]:
    """What ``getprop`` prints."""
    return {match[1]: match[2] for line in text.splitlines() if (match := _PROPERTY.fullmatch(line.strip()))}


def mem_total(text: str) -> int:
    """Bytes, from /proc/meminfo; 0 when not told."""
    found = re.search(r"^MemTotal:\s+(\d+) kB$", text, re.MULTILINE)
    return int(found[1]) * 1024 if found else 0


def parse_clusters(text: str) -> tuple[Cluster, ...]:
    """From lines "core highest-kHz", slowest cluster first."""
    clusters: dict[int | None, list[int]] = {}
    for line in text.splitlines():
        words = line.split()
        if words and words[0].isdigit():
            khz = int(words[1]) if len(words) > 1 and words[1].isdigit() else None
            clusters.setdefault(khz, []).append(int(words[0]))
    return tuple(
        Cluster(khz, tuple(sorted(cores))) for khz, cores in sorted(clusters.items(), key=lambda c: c[0] or 0)
    )


def _found(pattern: re.Pattern[str], text: str) -> str:
    match = pattern.search(text)
    return match[1] if match else ""


def _simulated(properties: dict[str, str]) -> str:
    if properties.get(VIRTUAL_PROPERTY):
        return VIRTUAL
    qemu = properties.get("ro.boot.qemu") == "1" or properties.get("ro.kernel.qemu") == "1"
    return EMULATOR if qemu or properties.get("ro.hardware") in ("goldfish", "ranchu") else ""

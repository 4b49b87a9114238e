"""What a device is, read on the device itself. Runs in the runner."""

from __future__ import annotations

import os
import platform
from dataclasses import dataclass
from pathlib import Path

import kvengine
from device_agents.api import DeviceIdentity


@dataclass(frozen=True)
class Probe:
    """The parts of a DeviceIdentity that the runner can find out; "" is "not told here"."""

    model: str
    soc: str
    abi: str
    os: str
    build: str  # kernel release and version
    cores: int  # this process may use
    ram_bytes: int
    providers: tuple[str, ...]  # onnxruntime's names
    runtime: dict[str, str]  # python, numpy, onnxruntime, kvengine versions

    def identity(self, name: str, kind: str, simulated: str = "") -> DeviceIdentity:
        return DeviceIdentity(
            name=name,
            kind=kind,
            model=self.model,
            soc=self.soc,
            abi=self.abi,
            os=self.os,
            build=self.build,
            cores=self.cores,
            ram_bytes=self.ram_bytes,
            providers=self.providers,
            runtime=self.runtime,
            simulated=simulated,
        )


def probe(root: Path = Path("/")) -> Probe:
    """Look around. ``root``: where /proc, /sys and /etc lie. Imports numpy and onnxruntime."""
    import numpy
    import onnxruntime

    return Probe(
        model=_first_line(root / "sys/class/dmi/id/product_name")
        or _first_line(root / "proc/device-tree/model"),
        soc=_cpu_name(root / "proc/cpuinfo"),
        abi=platform.machine(),
        os=_os_name(root / "etc/os-release") or platform.system(),
        build=f"{platform.release()} {platform.version()}".strip(),
        cores=len(os.sched_getaffinity(0)),
        ram_bytes=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        providers=tuple(onnxruntime.get_available_providers()),
        runtime={
            "python": platform.python_version(),
            "numpy": numpy.__version__,
            "onnxruntime": onnxruntime.__version__,
            "kvengine": kvengine.__version__,
        },
    )


def _first_line(path: Path) -> str:
    try:
        return path.read_text(errors="replace").splitlines()[0].strip(" \0")
    except (OSError, IndexError):
        return ""


def _value(path: Path, keys: tuple[str, ...], separator: str) -> str:
    """The first value in ``path`` of one of ``keys``, tried in order."""
    try:
        lines = path.read_text(errors="replace").splitlines()
    except OSError:
        return ""
    pairs = [line.split(separator, 1) for line in lines if separator in line]
    for key in keys:
        for name, value in pairs:
            if name.strip() == key:
                return value.strip().strip('"')
    return ""


def _cpu_name(path: Path) -> str:
    # x86 says "model name"; ARM kernels say "Hardware" and, some, "Processor".
    return _value(path, ("model name", "Hardware", "Processor"), ":")


def _os_name(path: Path) -> str:
    return _value(path, ("PRETTY_NAME", "NAME"), "=")

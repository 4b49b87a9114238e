"""A device as the page names it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from reports import text
from reports.results import ClusterInfo, DeviceInfo

DEVICES_SHOWN_OPEN = 3  # more devices than this: only those with something wrong start open


@dataclass(frozen=True)
class DeviceView:
    """``name`` with what it is; ``simulated`` says what is simulated, "" for real hardware."""

    name: str
    simulated: str
    model: str
    facts: tuple[tuple[str, str], ...]
    anchor: str = ""  # unique on the page

    @property
    def label(self) -> str:
        """The name for places that hold only text."""
        return f"{self.name} (simulated)" if self.simulated else self.name


def device_view(info: DeviceInfo) -> DeviceView:
    """``info`` as the page shows it."""
    runtime = ", ".join(f"{name} {version}" for name, version in info.runtime.items())
    facts = (
        ("Kind", info.kind),
        ("Model", info.model),
        ("Serial", info.serial),
        ("SoC", info.soc),
        ("ABI", ", ".join(info.abis) or info.abi),
        ("System", info.os),
        ("API level", "" if info.api_level is None else str(info.api_level)),
        ("Build", info.build),
        ("Cores", _cores(info)),
        ("Memory", text.byte_size(info.ram_bytes)),
        ("Battery", {True: "yes", False: "none", None: ""}[info.battery]),
        ("Thermal sensors", ", ".join(info.thermal_sensors)),
        ("Providers", ", ".join(info.providers)),
        ("Runtime", runtime),
        ("Simulated", info.simulated or "no, real hardware"),
        ("Effort", _effort(info)),
        ("Stopped by infrastructure", _flaky(info)),
        ("Waited until fit", f"{text.seconds(info.unfit_s)}: {info.unfit}" if info.unfit_s else ""),
        ("Quarantined", info.quarantined),
    )
    return DeviceView(info.name, info.simulated, info.model, tuple((k, v) for k, v in facts if v))


def _effort(info: DeviceInfo) -> str:
    """Nothing where the device got all that was asked for."""
    return "" if info.effort == 1 else f"{info.effort:.0%} of the programs and repeats asked for"


def _flaky(info: DeviceInfo) -> str:
    return f"{info.stopped} of its newest {text.plural(info.results, 'result')}" if info.results else ""


def _cores(info: DeviceInfo) -> str:
    """``8: 4 at 1.70 GHz, 4 at 2.91 GHz``; just the number where no clock is told."""
    known = [cluster for cluster in info.clusters if cluster.max_khz is not None]
    return f"{info.cores}: {', '.join(map(_cluster, known))}" if known else str(info.cores)


def _cluster(cluster: ClusterInfo) -> str:
    return f"{len(cluster.cores)} at {(cluster.max_khz or 0) / 1e6:.2f} GHz"


def unique(names: Iterable[str]) -> list[str]:
    """``names`` without repeats, first seen first."""
    return list(dict.fromkeys(names))

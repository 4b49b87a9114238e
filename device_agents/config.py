"""Which devices a lab host owns; read from farm.toml by the harness, plain data here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class DeviceSettings:
    """What a phone is put into while it is leased; each is off unless asked for by name.

    fixed_performance: a clock that it can keep up. stay_on: the screen, while plugged. airplane:
    airplane mode. brightness: of the screen, 0 to 255, no longer automatic.
    """

    fixed_performance: bool = False
    stay_on: bool = False
    airplane: bool = False
    brightness: int | None = None


@dataclass(frozen=True)
class DeviceConfig:
    """One attached device.

    kind: "host" (this machine), "android" or "simulated". threads: intra-op threads for recipes that leave it
    open; None leaves it to the engine. options: what only this kind of device understands; of
    "android" see device_agents.adb.devices, of "simulated" device_agents.simulated.device. power_cycle,
    power_cycles_per_day: see device_agents.power.
    """

    name: str
    kind: str = "host"
    threads: int | None = None
    options: dict[str, str] = field(default_factory=dict)
    settings: DeviceSettings = field(default_factory=DeviceSettings)
    power_cycle: tuple[str, ...] = ()
    power_cycles_per_day: int = 3

    def key(self, agent: str) -> str:
        """What is leased: the same for all lab agents of a machine that mean the same device.

        A phone is its serial number, whatever it is called. A virtual phone is its agent's, who started it,
        and so is a simulated device.
        """
        if self.options.get("virtual") == "true" or self.kind == "simulated":
            return f"{self.name} of {agent}"
        return self.options.get("serial") or self.name


def name_of(key: str, serials: Mapping[str, str] | None = None) -> str:
    """The device that a journal knows by ``key``. serials: names by serial number, if known."""
    return (serials or {}).get(key) or key.split(" of ", 1)[0]

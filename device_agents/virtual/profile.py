"""What model of phone a virtual phone plays: data in profiles/*.toml, read strictly into these types."""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from device_agents.virtual.errors import VirtualPhoneUnavailable
from kvengine.codec import DecodeError, decode

FOLDER = Path(__file__).parent / "profiles"
DEFAULT = "pixel-8"

Abi = Literal["x86_64", "arm64-v8a"]


@dataclass(frozen=True)
class Cluster:
    """Cores of one kind. Frequencies in kHz; part and implementer as in Arm's MIDR_EL1."""

    cores: int
    core: str  # Cortex-A510
    part: int
    min_khz: int
    max_khz: int
    fixed_khz: int  # the most that fixed-performance mode allows
    implementer: int = 0x41  # Arm
    governor: str = "sched_pixel"


@dataclass(frozen=True)
class Battery:
    """The battery and how the model tells of it.

    full_uah: charge when full, µAh. idle_w, core_w: power at rest, and of each busy core on top, W.
    voltage_mv: at rest when the phone starts; it sags by resistance_ohm under load.
    unit, discharge_sign: how ``current_now`` counts. counter_tick_uah: the steps of the charge
    counter; counter_stuck_uah: what it always says. refresh_s: how often ``current_now`` changes.
    smoothing_s: time constant of its filter. current_gain: what it tells, of what flows.
    current_stuck: what it always says. noise: of each of its values, one standard deviation relative.
    health_refresh_s: how old what `dumpsys battery` tells may be. temperature_unit: of that.
    input_suspended: the property power.battery_input.suspended is set.
    sysfs: what the shell user finds in /sys/class/power_supply/battery. shell_current: whether
    `cmd battery get current_now` is known. updates_stopped: somebody ran `dumpsys battery unplug`.
    """

    full_uah: int
    level_percent: int
    voltage_mv: int
    temperature_c: float
    idle_w: float
    core_w: float
    technology: str = "Li-ion"
    plugged: Literal["none", "usb", "ac"] = "none"
    unit: Literal["uA", "mA"] = "uA"
    discharge_sign: Literal[-1, 1] = -1
    counter_tick_uah: int = 1
    counter_stuck_uah: int | None = None
    refresh_s: float = 0.25
    resistance_ohm: float = 0.0
    smoothing_s: float = 0.0
    current_gain: float = 1.0
    current_stuck: int | None = None
    noise: float = 0.0
    health_refresh_s: float = 0.0
    temperature_unit: Literal["tenths", "degrees"] = "tenths"
    input_suspended: bool = False
    sysfs: Literal["readable", "denied"] = "denied"
    shell_current: bool = True
    updates_stopped: bool = False


@dataclass(frozen=True)
class Sensor:
    """One line of `dumpsys thermalservice`. type: android.os.Temperature's TYPE_*.

    follows: what its temperature is computed from: the battery, the skin, the silicon, or nothing.
    """

    name: str
    type: int
    follows: Literal["battery", "skin", "soc", "nothing"]
    celsius: float | None = None  # of one that follows nothing


@dataclass(frozen=True)
class Zone:
    """/sys/class/thermal/thermal_zoneN: its ``type``, and what its temperature follows."""

    type: str
    follows: Literal["battery", "skin", "soc", "nothing"]
    celsius: float | None = None
    per_degree: int = 1000  # what it counts for 1 °C


@dataclass(frozen=True)
class Rail:
    """One channel of the power meter: the share of the power at rest, and of the cores', that it carries."""

    name: str  # S2M_VDD_CPUCL2
    idle_share: float
    core_share: float


@dataclass(frozen=True)
class Thermal:
    """hal: whether the thermal HAL is there. throttle_c: skin °C from which on status is 1, 2, ... 6."""

    hal: bool
    throttle_c: tuple[float, ...]
    sensors: tuple[Sensor, ...]
    zones: tuple[Zone, ...] = ()
    zones_readable: bool = False  # by the shell user


@dataclass(frozen=True)
class Quirk:
    """What this model does differently, and where that was seen; not ``seen``: nowhere, it is ours."""

    what: str
    source: str
    seen: bool = True


@dataclass(frozen=True)
class Profile:
    """A model of phone. abi: of the real one; a virtual phone may be started with another.

    ram_mib: what its kernel tells as MemTotal, which is less than what it is sold with.
    rails: of a power meter that the shell user may read. number_format: how its dumps write numbers.
    cut_dumps: every how many dumps of a service one breaks off; 0: none does.
    """

    name: str
    model: str
    manufacturer: str
    brand: str
    device: str
    soc_manufacturer: str
    soc_model: str
    abi: Abi
    android: str  # 15
    api_level: int  # 35
    build_id: str
    fingerprint: str
    security_patch: str
    page_size: int
    ram_mib: int
    clusters: tuple[Cluster, ...]
    battery: Battery
    thermal: Thermal
    quirks: tuple[Quirk, ...]
    rails: tuple[Rail, ...] = ()
    number_format: Literal["plain", "german", "arabic"] = "plain"
    cut_dumps: int = 0

    @property
    def cores(self) -> int:
        return sum(cluster.cores for cluster in self.clusters)


def parse_abi(text: str) -> Abi:
    """Raises VirtualPhoneUnavailable when ``text`` names no ABI that a virtual phone can have."""
    known: tuple[Abi, ...] = get_args(Abi)
    for abi in known:
        if abi == text:
            return abi
    raise VirtualPhoneUnavailable(f"sought a virtual phone of ABI {text!r}; there are {', '.join(known)}")


def profile_names() -> tuple[str, ...]:
    return tuple(sorted(path.stem for path in FOLDER.glob("*.toml")))


def load_profile(name: str = DEFAULT) -> Profile:
    """The profile of that name.

    Raises:
        VirtualPhoneUnavailable: there is none; the message lists those there are.
    """
    if name not in profile_names():
        raise VirtualPhoneUnavailable(
            f"sought virtual phone profile {name!r}; there are {', '.join(profile_names())}"
        )
    path = FOLDER / f"{name}.toml"
    try:
        return decode(Profile, {"name": name, **tomllib.loads(path.read_text())}, path.name)
    except (tomllib.TOMLDecodeError, DecodeError) as error:
        raise VirtualPhoneUnavailable(f"{path} is not a profile: {error}") from error

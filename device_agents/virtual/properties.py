"""What `getprop` and the files under /sys of a virtual phone say; from its profile."""

from __future__ import annotations

from collections.abc import Iterator

from device_agents.virtual.physics import Physics
from device_agents.virtual.profile import Abi, Profile

# What kvfarm looks for to mark everything measured here as virtual.
VIRTUAL_PROPERTY = "ro.kvfarm.virtual"

DENIED = 0o000  # not even for its owner, who in a user namespace is the shell
READABLE = 0o444


def properties(profile: Profile, abi: Abi, name: str) -> dict[str, str]:
    """All properties of the phone ``name``."""
    suspended = {"power.battery_input.suspended": "true"} if profile.battery.input_suspended else {}
    family = [abi] if abi == "x86_64" else [abi, "armeabi-v7a", "armeabi"]
    return {
        VIRTUAL_PROPERTY: "1",
        "ro.hardware.virtual_device": "1",
        "ro.product.model": profile.model,
        "ro.product.manufacturer": profile.manufacturer,
        "ro.product.brand": profile.brand,
        "ro.product.device": profile.device,
        "ro.product.name": profile.device,
        "ro.product.board": profile.device,
        "ro.product.cpu.abi": abi,
        "ro.product.cpu.abilist": ",".join(family),
        "ro.product.cpu.abilist64": abi,
        "ro.soc.manufacturer": profile.soc_manufacturer,
        "ro.soc.model": profile.soc_model,
        "ro.hardware": profile.device,
        "ro.board.platform": profile.soc_model.lower(),
        "ro.build.version.release": profile.android,
        "ro.build.version.sdk": str(profile.api_level),
        "ro.build.version.security_patch": profile.security_patch,
        "ro.build.id": profile.build_id,
        "ro.build.type": "user",
        "ro.build.tags": "release-keys",
        "ro.build.fingerprint": profile.fingerprint,
        "ro.debuggable": "0",
        "ro.secure": "1",
        "ro.boot.hardware.cpu.pagesize": str(profile.page_size),
        "ro.serialno": name,
        "ro.boot.serialno": name,
        "sys.boot_completed": "1",
        "dev.bootcomplete": "1",
        "init.svc.adbd": "running",
        "persist.sys.locale": "en-US",
        "persist.sys.timezone": "UTC",
        **suspended,
    }


def sysfs(profile: Profile, physics: Physics, fixed_performance: bool) -> Iterator[tuple[str, str, int]]:
    """Path below /sys, content and mode of every file there."""
    yield from _cpus(profile, fixed_performance, physics.clock_share)
    yield from meters(profile, physics)


def meters(profile: Profile, physics: Physics) -> Iterator[tuple[str, str, int]]:
    """The part of ``sysfs`` that tells of battery, temperatures and power rails."""
    battery = profile.battery
    mode = READABLE if battery.sysfs == "readable" else DENIED
    supply = "class/power_supply/battery"
    for name, value in {
        "type": "Battery",
        "status": "Charging" if physics.charging else "Discharging",
        "capacity": physics.level_percent,
        "voltage_now": physics.voltage_mv * 1000,
        "current_now": physics.current_now,
        "charge_counter": physics.counter_uah,
        "temp": round(physics.celsius["battery"] * 10),
        "technology": battery.technology,
    }.items():
        yield f"{supply}/{name}", f"{value}\n", mode
    mode = READABLE if profile.thermal.zones_readable else DENIED
    for index, zone in enumerate(profile.thermal.zones):
        celsius = zone.celsius if zone.celsius is not None else physics.celsius.get(zone.follows, 0.0)
        yield f"class/thermal/thermal_zone{index}/type", f"{zone.type}\n", mode
        yield f"class/thermal/thermal_zone{index}/temp", f"{round(celsius * zone.per_degree)}\n", mode
    if profile.rails:
        yield "bus/iio/devices/iio:device0/energy_value", _rails(profile, physics), READABLE


def _rails(profile: Profile, physics: Physics) -> str:
    """As Pixel's on-device power monitor tells: milliseconds, and µW s since boot for each channel.

    Format: AOSP hardware/google/pixel powerstats, IioEnergyMeterDataProvider.cpp.
    """
    at = round(physics.now * 1000)
    lines = [
        f"CH{index}(T={at})[{rail.name}], "
        f"{round(1e6 * (rail.idle_share * physics.idle_j + rail.core_share * physics.net_j))}"
        for index, rail in enumerate(profile.rails)
    ]
    return "\n".join([f"t={at}", *lines]) + "\n"


def _cpus(profile: Profile, fixed_performance: bool, clock_share: float) -> Iterator[tuple[str, str, int]]:
    root = "devices/system/cpu"
    everyone = _span(0, profile.cores)
    for name in ("possible", "present", "online"):
        yield f"{root}/{name}", f"{everyone}\n", READABLE
    yield f"{root}/kernel_max", "31\n", READABLE
    first = 0
    for number, cluster in enumerate(profile.clusters):
        span = _span(first, cluster.cores)
        related = " ".join(str(core) for core in range(first, first + cluster.cores))
        most = cluster.fixed_khz if fixed_performance else cluster.max_khz
        policy = {
            "cpuinfo_min_freq": cluster.min_khz,
            "cpuinfo_max_freq": cluster.max_khz,
            "scaling_min_freq": cluster.min_khz,
            "scaling_max_freq": most,
            "scaling_cur_freq": max(cluster.min_khz, round(most * clock_share)),
            "scaling_governor": cluster.governor,
            "related_cpus": related,
            "affected_cpus": related,
        }
        for core in range(first, first + cluster.cores):
            for name, value in policy.items():
                yield f"{root}/cpu{core}/cpufreq/{name}", f"{value}\n", READABLE
            yield f"{root}/cpu{core}/topology/physical_package_id", f"{number}\n", READABLE
            yield f"{root}/cpu{core}/topology/core_siblings_list", f"{span}\n", READABLE
            yield f"{root}/cpu{core}/topology/core_id", f"{core}\n", READABLE
        for name, value in policy.items():
            yield f"{root}/cpufreq/policy{first}/{name}", f"{value}\n", READABLE
        first += cluster.cores


def _span(first: int, count: int) -> str:
    return str(first) if count == 1 else f"{first}-{first + count - 1}"

"""The answers of a virtual phone's Android: getprop, setprop, settings, dumpsys, cmd, svc.

Only what a lab host asks a phone. Texts are those of AOSP: BatteryService.dumpInternal and
onShellCommand, ThermalManagerService.dumpInternal, SettingsService, PowerManagerShellCommand,
and the dumps of real phones that the profiles name.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from device_agents.virtual.physics import Physics
from device_agents.virtual.profile import Abi, Profile, Sensor
from device_agents.virtual.properties import properties

_BATTERY_STATUS = {"charging": 2, "discharging": 3, "full": 5}
_STAY_ON = {"true": 15, "false": 0, "ac": 1, "usb": 2, "wireless": 4, "dock": 8}
# What the shell user may set; the rest is init's and the vendor's (AOSP shell.te, property_contexts).
_SETTABLE = ("debug.", "log.", "persist.log.tag", "persist.traced.enable")
_DEFAULT_SETTINGS = {
    "global": {"airplane_mode_on": "0", "low_power": "0", "stay_on_while_plugged_in": "0"},
    "system": {"screen_brightness": "102", "screen_brightness_mode": "1", "screen_off_timeout": "30000"},
    "secure": {"location_mode": "3"},
}
_ARABIC = str.maketrans("0123456789", "٠١٢٣٤٥٦٧٨٩")
_BOOLEANS = {"true": True, "false": False, "1": True, "0": False}


@dataclass(frozen=True)
class Answer:
    """What a command printed, and its exit code; error: it went to stderr."""

    text: str = ""
    code: int = 0
    error: bool = False


@dataclass
class HealthInfo:
    """What BatteryService knows; a copy of it is frozen while updates are stopped."""

    ac: bool
    usb: bool
    wireless: bool
    status: int
    present: bool
    level: int
    counter: int
    voltage: int
    temp: int


class AndroidServices:
    """One phone's services. ``advance`` the physics before asking."""

    def __init__(
        self,
        profile: Profile,
        abi: Abi,
        name: str,
        physics: Physics,
        settings: Mapping[str, Mapping[str, str]] | None = None,
    ) -> None:
        """settings: by namespace, those it had before its reboot; None: a new phone's."""
        self._profile = profile
        self._physics = physics
        self._properties = properties(profile, abi, name)
        self.settings = {space: dict(values) for space, values in (settings or _DEFAULT_SETTINGS).items()}
        self._cached_c = dict(physics.celsius)
        self._thermal_override: int | None = None
        self._stopped: HealthInfo | None = None
        self._known: HealthInfo | None = None
        self._known_at = 0.0
        self._dumps = 0
        self.fixed_performance = False
        if profile.battery.updates_stopped:
            self._unplug()

    def call(self, words: Sequence[str]) -> Answer:
        """One command line. What Android does not know it says so; nothing raises."""
        commands: dict[str, Callable[[list[str]], Answer]] = {
            "getprop": self._getprop,
            "setprop": self._setprop,
            "settings": self._settings_command,
            "dumpsys": self._dumpsys,
            "cmd": self._cmd,
            "svc": self._svc,
        }
        command = commands.get(words[0]) if words else None
        if command is None:
            return Answer(f"{' '.join(words[:1])}: inaccessible or not found\n", 127, error=True)
        return command(list(words[1:]))

    def _getprop(self, words: list[str]) -> Answer:
        if not words:
            return Answer("".join(f"[{k}]: [{v}]\n" for k, v in sorted(self._properties.items())))
        return Answer(self._properties.get(words[0], words[1] if len(words) > 1 else "") + "\n")

    def _setprop(self, words: list[str]) -> Answer:
        if len(words) != 2:
            return Answer("usage: setprop NAME VALUE\n", 1, error=True)
        name, value = words
        if not name.startswith(_SETTABLE):
            return Answer(f"setprop: failed to set property '{name}' to '{value}'\n", 1, error=True)
        self._properties[name] = value
        return Answer()

    def _settings_command(self, words: list[str]) -> Answer:
        usage = Answer("usage: settings get|put|delete|list NAMESPACE [KEY [VALUE]]\n", 255, error=True)
        if len(words) < 2 or words[1] not in self.settings:
            return usage
        verb, space, *rest = words
        values = self.settings[space]
        if verb == "list" and not rest:
            return Answer("".join(f"{k}={v}\n" for k, v in sorted(values.items())))
        if verb == "get" and len(rest) == 1:
            return Answer(values.get(rest[0], "null") + "\n")
        if verb == "put" and len(rest) >= 2:
            values[rest[0]] = rest[1]
            return Answer()
        if verb == "delete" and len(rest) == 1:
            return Answer(f"Deleted {int(values.pop(rest[0], None) is not None)} rows\n")
        return usage

    def _svc(self, words: list[str]) -> Answer:
        if words[:2] == ["power", "stayon"] and len(words) == 3 and words[2] in _STAY_ON:
            self.settings["global"]["stay_on_while_plugged_in"] = str(_STAY_ON[words[2]])
            return Answer()
        return Answer("Available commands:\n    help\n    power\n", 0, error=True)

    def _dumpsys(self, words: list[str]) -> Answer:
        if words == ["-l"]:
            return Answer("Currently running services:\n  battery\n  power\n  thermalservice\n")
        if words[:1] == ["battery"]:
            return self._dumpsys_battery(words[1:])
        if words[:1] == ["thermalservice"]:
            return Answer(self._as_told("thermalservice", self._dump_thermal()))
        if words[:1] == ["power"]:
            stay_on = self.settings["global"]["stay_on_while_plugged_in"]
            return Answer(
                "POWER MANAGER (dumpsys power)\n\nPower Manager State:\n"
                f"  mWakefulness=Awake\n  mIsPowered={_java(self._health().usb or self._health().ac)}\n"
                f"  mStayOnWhilePluggedInSetting={stay_on}\n"
            )
        if not words:
            return Answer("Currently running services:\n  battery\n  power\n  thermalservice\n")
        return Answer(f"Can't find service: {words[0]}\n", 0, error=True)

    def _cmd(self, words: list[str]) -> Answer:
        if words == ["-l"]:
            return Answer("Currently running services:\n  battery\n  power\n  settings\n  thermalservice\n")
        handlers: dict[str, Callable[[list[str]], Answer]] = {
            "battery": self._battery_command,
            "power": self._power_command,
            "thermalservice": self._thermal_command,
            "settings": self._settings_command,
            "connectivity": self._connectivity_command,
        }
        if not words or words[0] not in handlers:
            return Answer(f"cmd: Can't find service: {' '.join(words[:1])}\n", 20, error=True)
        return handlers[words[0]](words[1:])

    def _connectivity_command(self, words: list[str]) -> Answer:
        if words[:1] == ["airplane-mode"]:
            if words[1:] in (["enable"], ["disable"]):
                self.settings["global"]["airplane_mode_on"] = str(int(words[1] == "enable"))
                return Answer()
            if len(words) == 1:
                on = self.settings["global"]["airplane_mode_on"] == "1"
                return Answer("enabled\n" if on else "disabled\n")
        return Answer("Connectivity service commands:\n", 255, error=True)

    def _power_command(self, words: list[str]) -> Answer:
        if (
            len(words) == 2
            and words[0] == "set-fixed-performance-mode-enabled"
            and words[1].lower() in _BOOLEANS
        ):
            self.fixed_performance = _BOOLEANS[words[1].lower()]
            return Answer()
        return Answer("Power manager (power) commands:\n", 255, error=True)

    # Battery

    def _health(self) -> HealthInfo:
        battery, physics = self._profile.battery, self._physics
        if self._stopped is not None:
            return self._stopped
        if self._known is None or physics.now - self._known_at >= battery.health_refresh_s:
            self._known, self._known_at = self._read_health(), physics.now
        return self._known

    def _read_health(self) -> HealthInfo:
        battery, physics = self._profile.battery, self._physics
        state = "charging" if physics.charging else "discharging"
        if physics.charging and physics.level_percent >= 100:
            state = "full"
        return HealthInfo(
            ac=battery.plugged == "ac",
            usb=battery.plugged == "usb",
            wireless=False,
            status=_BATTERY_STATUS[state],
            present=True,
            level=physics.level_percent,
            counter=physics.counter_uah,
            voltage=physics.voltage_mv,
            temp=round(physics.celsius["battery"] * (10 if battery.temperature_unit == "tenths" else 1)),
        )

    def _unplug(self) -> None:
        """As BatteryService.unplugBattery: the flags, and from now on no updates."""
        health = replace(self._health())
        health.ac = health.usb = health.wireless = False
        self._stopped = health

    def _dumpsys_battery(self, words: list[str]) -> Answer:
        if words and words != ["-a"]:
            return self._battery_command(words)
        return Answer(self._as_told("battery", self._dump_battery()))

    def _as_told(self, service: str, text: str) -> str:
        """The dump as this model writes numbers, and broken off if it is its turn.

        What dumpsys prints then is AOSP's cmds/dumpsys/dumpsys.cpp; its exit code is 0 all the same.
        """
        style = self._profile.number_format
        if style == "german":  # 28,4 and 3.912
            text = re.sub(r"(?<==|\s)(-?\d+)\.(\d+)", r"\1,\2", text)
            text = re.sub(r": (-?\d{4,})$", lambda m: f": {int(m[1]):,}".replace(",", "."), text, flags=re.M)
        elif style == "arabic":
            text = re.sub(r"(?<=: )-?\d+$", lambda m: m[0].translate(_ARABIC), text, flags=re.M)
        self._dumps += 1
        every = self._profile.cut_dumps
        if every and self._dumps % every == 0:
            text = text[: 180 + 37 * self._dumps % 220]
            text += f"\n*** SERVICE '{service}' DUMP TIMEOUT (10000ms) EXPIRED ***\n\n"
        return text

    def _dump_battery(self) -> str:
        health, api = self._health(), self._profile.api_level
        lines = ["Current Battery Service state:"]
        if self._stopped is not None:
            lines.append("  (UPDATES STOPPED -- use 'reset' to restart)")
        lines += [
            f"  AC powered: {_java(health.ac)}",
            f"  USB powered: {_java(health.usb)}",
            f"  Wireless powered: {_java(health.wireless)}",
        ]
        if api >= 33:
            lines.append("  Dock powered: false")
        plugged = health.ac or health.usb
        lines += [
            f"  Max charging current: {500000 if plugged else 0}",
            f"  Max charging voltage: {5000000 if plugged else 0}",
            f"  Charge counter: {health.counter}",
            f"  status: {health.status}",
            "  health: 2",
            f"  present: {_java(health.present)}",
            f"  level: {health.level}",
            "  scale: 100",
            f"  voltage: {health.voltage}",
            f"  temperature: {health.temp}",
            f"  technology: {self._profile.battery.technology}",
        ]
        if api >= 34:
            lines += ["  Charging state: 0", "  Charging policy: 0"]
        return "\n".join(lines) + "\n"

    def _battery_command(self, words: list[str]) -> Answer:
        verb, *rest = words or ["help"]
        keys = [word for word in rest if word != "-f"]
        if verb == "unplug":
            self._unplug()
            return Answer()
        if verb == "reset":
            self._stopped = None
            return Answer()
        if verb == "suspend_input":
            return Answer(
                "Exception occurred while executing 'suspend_input':\njava.lang.SecurityException: "
                "battery suspend_input is only supported on debuggable builds\n",
                255,
                error=True,
            )
        if verb == "set" and len(keys) == 2:
            return self._battery_set(*keys)
        if verb == "get" and len(keys) == 1:
            return self._battery_get(keys[0])
        return Answer("Battery service (battery) commands:\n  help\n    Print this help text.\n")

    def _battery_get(self, key: str) -> Answer:
        health = self._health()
        values: dict[str, str] = {
            name: _java(value) if isinstance(value, bool) else str(value)
            for name, value in vars(health).items()
            if name != "voltage"  # AOSP has no `get voltage`
        }
        if self._profile.battery.shell_current:
            # Read from the HAL at each call, also while updates are stopped.
            values |= dict.fromkeys(("current_now", "current_average"), str(self._physics.current_now))
        return Answer(f"{values[key]}\n" if key in values else f"Unknown get option: {key}\n")

    def _battery_set(self, key: str, value: str) -> Answer:
        health = replace(self._health())
        if key == "voltage" or key not in vars(health):
            return Answer(f"Unknown set option: {key}\n")
        try:
            number = int(value)
        except ValueError:
            return Answer(f"Bad value: {value}\n", 255)
        setattr(health, key, bool(number) if isinstance(getattr(health, key), bool) else number)
        self._stopped = health
        return Answer()

    # Thermal

    @property
    def thermal_status(self) -> int:
        if self._thermal_override is not None:
            return self._thermal_override
        return self._physics.thermal_status if self._profile.thermal.hal else 0

    def _thermal_command(self, words: list[str]) -> Answer:
        if words[:1] == ["override-status"] and len(words) == 2 and words[1].isdigit():
            self._thermal_override = int(words[1])
            return Answer()
        if words == ["reset"]:
            self._thermal_override = None
            return Answer()
        if words[:1] == ["headroom"] and len(words) == 2 and self._profile.thermal.hal:
            severe = self._profile.thermal.throttle_c[2]  # headroom 1.0 is where SEVERE begins
            return Answer(f"Headroom in {words[1]} seconds: {1 + (self._skin() - severe) / 30:.2f}\n")
        return Answer("Thermal service (thermalservice) commands:\n", 255, error=True)

    def _skin(self) -> float:
        return self._physics.celsius["skin"]

    def _dump_thermal(self) -> str:
        thermal = self._profile.thermal
        listeners = "\tcallbacks: 1\n\tkilled: false\n\tbroadcasts count: -1\n"
        text = (
            f"IsStatusOverride: {_java(self._thermal_override is not None)}\n"
            f"ThermalEventListeners:\n{listeners}ThermalStatusListeners:\n{listeners}"
            f"Thermal Status: {self.thermal_status}\nCached temperatures:\n"
        )
        if not thermal.hal:
            return text + "HAL Ready: false\n"
        text += "".join(self._temperature(sensor, self._cached_c) for sensor in thermal.sensors)
        text += "HAL Ready: true\nHAL connection:\n\tThermalHAL AIDL 2  connected: yes\n"
        text += "Current temperatures from HAL:\n"
        text += "".join(self._temperature(sensor, self._physics.celsius) for sensor in thermal.sensors)
        text += "Current cooling devices from HAL:\n"
        text += "".join(
            f"\tCoolingDevice{{mValue=0, mType=2, mName=thermal-cpufreq-{index}}}\n"
            for index in range(len(self._profile.clusters))
        )
        limits = ", ".join(f"{limit:.1f}" for limit in thermal.throttle_c)
        skins = [sensor for sensor in thermal.sensors if sensor.follows == "skin"][:1]
        text += "Temperature static thresholds from HAL:\n"
        return text + "".join(
            f"\tTemperatureThreshold{{mType={skin.type}, mName={skin.name}, "
            f"mHotThrottlingThresholds=[NaN, {limits}], "
            "mColdThrottlingThresholds=[NaN, NaN, NaN, NaN, NaN, NaN, NaN]}\n"
            for skin in skins
        )

    def _temperature(self, sensor: Sensor, celsius: dict[str, float]) -> str:
        value = sensor.celsius if sensor.celsius is not None else celsius.get(sensor.follows, 0.0)
        status = self.thermal_status if sensor.follows == "skin" else 0
        return (
            f"\tTemperature{{mValue={value:.6g}, mType={sensor.type}, mName={sensor.name}, "
            f"mStatus={status}}}\n"
        )


def _java(value: bool) -> str:
    return "true" if value else "false"

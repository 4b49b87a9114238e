"""What a virtual phone's battery and temperatures really do, before its model tells of them in its way.

Power is what the profile states for rest and for each busy core; the busy cores are the CPU time that
the phone's own processes truly used. Temperatures follow power as first-order lags. Simulated, all of it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from device_agents.virtual.profile import Battery, Profile

AMBIENT_C = 22.0
_CHARGER_W = {"none": 0.0, "usb": 4.5, "ac": 15.0}
# Rise above ambient for each watt, °C/W, and how fast, s: plausible for a phone in still air.
_LAGS = {"soc": (9.0, 4.0), "skin": (3.2, 150.0), "battery": (2.0, 400.0)}


@dataclass(frozen=True)
class Truth:
    """What no phone tells, for tests that compare. Energy drawn by the phone since start, J."""

    energy_j: float
    cpu_s: float
    charge_uah: float
    power_w: float


class Physics:
    """Advances with time; everything it gives is as of the last ``advance``."""

    def __init__(self, profile: Profile, now: float) -> None:
        """now: s, of whichever clock ``advance`` is given."""
        self._battery: Battery = profile.battery
        self._throttle_c = profile.thermal.throttle_c
        self._now = now
        self._cpu_s = 0.0
        self._energy_j = 0.0
        self._power_w = self._battery.idle_w
        self.charge_uah = self._battery.full_uah * self._battery.level_percent / 100
        battery_c = self._battery.temperature_c
        self.celsius = {"battery": battery_c, "skin": battery_c + 1.0, "soc": battery_c + 5.0}
        self._told_ma = self._flow_ma()
        self._told_at = now
        self._gathered = 0.0  # mA s since it was told

    def advance(self, now: float, cpu_s: float) -> None:
        """cpu_s: CPU time of all the phone's processes since its start, s."""
        elapsed = now - self._now
        if elapsed <= 0:
            return
        busy = max(0.0, cpu_s - self._cpu_s)
        self._now, self._cpu_s = now, max(cpu_s, self._cpu_s)
        energy = self._battery.idle_w * elapsed + self._battery.core_w * busy
        self._energy_j += energy
        self._power_w = energy / elapsed
        flow = self._flow_ma()
        charge = self.charge_uah + flow * elapsed / 3.6
        self.charge_uah = min(max(charge, 0.0), float(self._battery.full_uah))
        self._tell(flow, elapsed)
        for place, (rise, lag) in _LAGS.items():
            goal = AMBIENT_C + rise * self._power_w
            self.celsius[place] += (goal - self.celsius[place]) * (1 - math.exp(-elapsed / lag))

    @property
    def truth(self) -> Truth:
        return Truth(self._energy_j, self._cpu_s, self.charge_uah, self._power_w)

    @property
    def level_percent(self) -> int:
        return round(100 * self.charge_uah / self._battery.full_uah)

    @property
    def counter_uah(self) -> int:
        """The charge counter as this model has it."""
        if self._battery.counter_stuck_uah is not None:
            return self._battery.counter_stuck_uah
        tick = self._battery.counter_tick_uah
        return int(self.charge_uah // tick) * tick

    @property
    def current_now(self) -> int:
        """As this model tells it: its unit, its sign, refreshed when it does."""
        told = -self._told_ma * self._battery.discharge_sign
        return round(told if self._battery.unit == "mA" else told * 1000)

    @property
    def charging(self) -> bool:
        return self._flow_ma() > 0

    @property
    def thermal_status(self) -> int:
        return sum(self.celsius["skin"] >= limit for limit in self._throttle_c)

    def _flow_ma(self) -> float:
        """Into the battery; negative while it discharges."""
        watts = _CHARGER_W[self._battery.plugged] - self._power_w
        return watts / self._battery.voltage_mv * 1e6

    def _tell(self, flow: float, elapsed: float) -> None:
        """``current_now`` is the mean since it last changed."""
        self._gathered += flow * elapsed
        window = self._now - self._told_at
        if window >= self._battery.refresh_s:
            self._told_ma = self._gathered / window
            self._told_at, self._gathered = self._now, 0.0

"""What a virtual phone's battery and temperatures really do, before its model tells of them in its way.

Power is what the profile states for rest and for each busy core; the busy cores are the CPU time that
the phone's own processes truly used. The battery is a source with an inner resistance. Temperatures
follow power as first-order lags; a hot phone clocks down and takes less. Simulated, all of it.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass

from device_agents.virtual.profile import Battery, Profile

AMBIENT_C = 22.0
_CHARGER_W = {"none": 0.0, "usb": 4.5, "ac": 15.0}
# Rise above ambient for each watt, °C/W, and how fast, s: plausible for a phone in still air.
_LAGS = {"soc": (9.0, 4.0), "skin": (3.2, 150.0), "battery": (2.0, 400.0)}
_MV_PER_PERCENT = 8.0  # of charge, in the flat middle of a lithium-ion cell's curve
# From MODERATE (2) on a status takes this much of the clock, and power goes with its square.
_CLOCK_PER_STATUS = 0.12
_CLOCK_LEAST = 0.4


@dataclass(frozen=True)
class Truth:
    """What no phone tells, for tests that compare. Energy drawn by the phone since start, J.

    idle_j: what of it a phone at rest would have drawn as well.
    """

    energy_j: float
    cpu_s: float
    charge_uah: float
    power_w: float
    idle_j: float


class Physics:
    """Advances with time; everything it gives is as of the last ``advance``."""

    def __init__(self, profile: Profile, now: float, *, ambient_c: float = AMBIENT_C, seed: int = 0) -> None:
        """now: s, of whichever clock ``advance`` is given. seed: of the noise."""
        self._battery: Battery = profile.battery
        self._throttle_c = profile.thermal.throttle_c
        self._ambient_c = ambient_c
        self._random = random.Random(seed)
        self.now = now
        self._cpu_s = 0.0
        self._energy_j = 0.0
        self._idle_j = 0.0
        self._power_w = self._battery.idle_w
        self.charge_uah = self._battery.full_uah * self._battery.level_percent / 100
        battery_c = self._battery.temperature_c
        self.celsius = {"battery": battery_c, "skin": battery_c + 1.0, "soc": battery_c + 5.0}
        self._mv = float(self._battery.voltage_mv)
        self._flow = self._flow_ma()
        self._told_ma = self._smooth_ma = self._flow
        self._told_at = now
        self._gathered = 0.0  # mA s since it was told

    def advance(self, now: float, cpu_s: float) -> None:
        """cpu_s: CPU time of all the phone's processes since its start, s."""
        elapsed = now - self.now
        if elapsed <= 0:
            return
        busy = max(0.0, cpu_s - self._cpu_s)
        self.now, self._cpu_s = now, max(cpu_s, self._cpu_s)
        idle = self._battery.idle_w * elapsed
        energy = idle + self._battery.core_w * self.clock_share**2 * busy
        self._energy_j += energy
        self._idle_j += idle
        self._power_w = energy / elapsed
        self._flow = self._flow_ma()
        charge = self.charge_uah + self._flow * elapsed / 3.6
        self.charge_uah = min(max(charge, 0.0), float(self._battery.full_uah))
        self._tell(self._flow, elapsed)
        for place, (rise, lag) in _LAGS.items():
            goal = self._ambient_c + rise * self._power_w
            self.celsius[place] += (goal - self.celsius[place]) * (1 - math.exp(-elapsed / lag))

    @property
    def truth(self) -> Truth:
        return Truth(self._energy_j, self._cpu_s, self.charge_uah, self._power_w, self._idle_j)

    @property
    def net_j(self) -> float:
        """Energy drawn by the cores' work, J."""
        return self._energy_j - self._idle_j

    @property
    def idle_j(self) -> float:
        return self._idle_j

    @property
    def level_percent(self) -> int:
        return round(100 * self.charge_uah / self._battery.full_uah)

    @property
    def voltage_mv(self) -> int:
        """At the battery's terminals, under the present load."""
        return round(self._mv)

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
        if self._battery.current_stuck is not None:
            return self._battery.current_stuck
        told = -self._told_ma * self._battery.discharge_sign * self._battery.current_gain
        return round(told if self._battery.unit == "mA" else told * 1000)

    @property
    def charging(self) -> bool:
        return self._flow > 0

    @property
    def thermal_status(self) -> int:
        return sum(self.celsius["skin"] >= limit for limit in self._throttle_c)

    @property
    def clock_share(self) -> float:
        """What a hot phone leaves of its clocks."""
        return max(_CLOCK_LEAST, 1 - _CLOCK_PER_STATUS * max(0, self.thermal_status - 1))

    def _flow_ma(self) -> float:
        """Into the battery; negative while it discharges. Solves I = P / V, V = E + R I."""
        watts = _CHARGER_W[self._battery.plugged] - self._power_w
        percent = 100 * self.charge_uah / self._battery.full_uah - self._battery.level_percent
        rest_v = (self._battery.voltage_mv + _MV_PER_PERCENT * percent) / 1000
        ohm = self._battery.resistance_ohm
        volts = (rest_v + math.sqrt(max(0.0, rest_v**2 + 4 * ohm * watts))) / 2
        self._mv = volts * 1000
        return watts / volts * 1000

    def _tell(self, flow: float, elapsed: float) -> None:
        """``current_now`` is the mean since it last changed, or follows the current slowly."""
        lag = self._battery.smoothing_s
        self._smooth_ma += (flow - self._smooth_ma) * (1 - math.exp(-elapsed / lag) if lag else 1.0)
        self._gathered += flow * elapsed
        window = self.now - self._told_at
        if window >= self._battery.refresh_s:
            mean = self._smooth_ma if lag else self._gathered / window
            noise = self._battery.noise
            self._told_ma = mean * (self._random.gauss(1.0, noise) if noise else 1.0)
            self._told_at, self._gathered = self.now, 0.0

"""Work starts from a sound state: waits until a device is fit, for a bounded time, and tells.

On a phone: thermal status 0, the battery cool and its charge inside a window (with hysteresis, so that it
does not start at the edge each time). On a host: nobody else uses its cores. What a device does not tell is
not waited for.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from device_agents.api import Vitals
from harness import measuring
from harness.fitness import Thresholds
from harness.measuring import LOOK_S

POLL_S = 2.0  # between looks at a device that is not fit
REST_S = 10.0  # after a void block; after each further one in a row twice as long


@dataclass(frozen=True)
class Waited:
    """seconds: waited before the start. given_up: why the device was still not fit, "" if it was. why: what
    was wrong with it at first."""

    seconds: float = 0.0
    given_up: str = ""
    why: str = ""


class Entry:
    """The entry condition of one device: remembers whether it was hot or low, and how long all starts waited.

    busy_cores: that other processes may use, None: it is not looked; only of a host whose CPU time can be
    read. tell: called with what is wrong at every look at a device that is waited for.
    """

    def __init__(
        self,
        vitals: Callable[[], Vitals],
        settings: Thresholds,
        *,
        busy_cores: float | None = None,
        pause: Callable[[float], None] = measuring.wait,
        clock: Callable[[], float] = time.monotonic,
        tell: Callable[[str], None] = lambda reason: None,
    ) -> None:
        self._vitals = vitals
        self._settings = settings
        self._busy_cores = busy_cores
        self._pause = pause
        self._clock = clock
        self._tell = tell
        self._was_hot = self._was_low = False
        self._rested_s = 0.0  # since the last start
        self.total_s = 0.0

    def rest_s(self, void: int) -> float:
        """s to rest after ``void`` void blocks in a row: what disturbed them may pass.

        Never more than is left of the time for all starts.
        """
        if not void:
            return 0.0
        left = max(0.0, self._settings.wait_total_s - self.total_s)
        return min(REST_S * 2.0 ** (void - 1), left)

    def rest(self, seconds: float) -> None:
        """The next start tells that it came so much later."""
        self._pause(seconds)
        self._rested_s += seconds
        self.total_s += seconds

    def wait(self, patient: bool = True) -> Waited:
        """Returns once the device is fit, or when the time for this start or for all of them is over.

        patient: else it looks once and only tells.

        Raises:
            InfrastructureError: the device does not tell how it is.
        """
        rested, self._rested_s = self._rested_s, 0.0
        began, why = self._clock(), ""
        allowed = min(self._settings.wait_s, self._settings.wait_total_s - self.total_s) if patient else 0.0
        while True:
            unfit = self.unfit()
            why = why or unfit
            waited = self._clock() - began
            if not unfit or waited >= allowed:
                if unfit or waited > 2 * LOOK_S:
                    self.total_s += waited
                    return Waited(rested + waited, unfit, why)
                return Waited(rested)
            self._tell(unfit)
            self._pause(min(POLL_S, max(0.0, allowed - waited)))

    def unfit(self) -> str:
        """Why the device should not start now, "" if it should."""
        vitals = self._vitals()
        wrong = [*self._thermal(vitals), *self._charge(vitals)]
        if self._busy_cores is not None:
            cores = measuring.busy_cores(vitals, self._vitals, self._pause)
            wrong += filter(None, [measuring.busy_with_others(cores, self._busy_cores)])
        return "; ".join(wrong)

    def _thermal(self, vitals: Vitals) -> list[str]:
        wrong = []
        if vitals.thermal_status:
            wrong.append(f"thermal status is {vitals.thermal_status}, not 0")
        celsius = vitals.temperatures_c.get("battery")
        if celsius is not None:
            limit = self._settings.resume_c if self._was_hot else self._settings.battery_c
            self._was_hot = celsius > limit
            if self._was_hot:
                wrong.append(f"the battery has {celsius:.1f} °C, over {limit:.1f} °C")
        return wrong

    def _charge(self, vitals: Vitals) -> list[str]:
        percent, low, high = vitals.battery_percent, self._settings.charge_low, self._settings.charge_high
        if percent is None:
            return []
        low = max(low, self._settings.charge_resume) if self._was_low else low
        self._was_low = percent < low
        if low <= percent <= high:
            return []
        return [f"the battery is at {percent:.0f} %, outside {low:.0f} to {high:.0f} %"]

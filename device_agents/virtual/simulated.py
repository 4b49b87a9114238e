"""A phone of a profile in simulated time: its physics, its services and its logger, in this process.

No adb, no sleep. What it logs has the logger's own format (device_agents.recording), so that the code
which reads real logs reads these; the truth is there to compare with.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, replace

from device_agents.energy import CALIBRATION_PLAN, Calibration, Energy, Window, calibrate, idle_needs, measure
from device_agents.energy.ladder import unsupported
from device_agents.energy.series import Unsupported
from device_agents.recording.record import MARK, Record, parse_log
from device_agents.virtual.physics import Physics
from device_agents.virtual.profile import Profile
from device_agents.virtual.properties import READABLE, meters
from device_agents.virtual.services import AndroidServices

_STEP_S = 0.1
_PAUSES = (1.0, 0.8, 1.15, 0.9, 1.15)
_TOKENS_PER_CORE_S = 9.0
Load = Callable[[float], float]
"""Busy cores at a time."""


@dataclass(frozen=True)
class Trial:
    """One phone, one seed. true_j_per_token: net of rest."""

    profile: str
    seed: int
    energy: Energy
    true_j_per_token: float

    @property
    def error(self) -> float | None:
        """Relative; None where the pipeline gives no number."""
        found = self.energy.net_j_per_token
        return None if found is None else found / self.true_j_per_token - 1


class SimulatedPhone:
    """A phone that runs as fast as it is asked to."""

    def __init__(self, profile: Profile, seed: int) -> None:
        draw = random.Random(f"{profile.name} {seed}")
        battery = replace(
            profile.battery,
            level_percent=draw.randint(30, 85),
            temperature_c=round(draw.uniform(22, 34), 1),
        )
        self._profile = replace(profile, battery=battery)
        self._draw = draw
        self._now = draw.uniform(500, 90_000)
        self._cpu_s = self._tokens = 0.0
        ambient = draw.uniform(18, 28)
        self.physics = Physics(self._profile, self._now, ambient_c=ambient, seed=draw.randrange(1 << 30))
        self._services = AndroidServices(self._profile, profile.abi, "SIM", self.physics)
        self._log: list[str] = []
        self._number = 0

    @property
    def now(self) -> float:
        return self._now

    def record(self, seconds: float, load: Load, burning: bool = False) -> float:
        """Go on for ``seconds`` with the logger running; returns the tokens generated meanwhile."""
        before, end = self._tokens, self._now + seconds
        due = self._now + self._draw.uniform(0, 0.5)
        begun = self._now
        while self._now < end - 1e-9:
            step = min(_STEP_S, end - self._now)
            busy = load(self._now - begun) * step
            self._now += step
            self._cpu_s += busy
            self._tokens += busy * self.physics.clock_share * _TOKENS_PER_CORE_S
            self.physics.advance(self._now, self._cpu_s)
            if self._now >= due:
                self._sample(burning)
                due = self._now + _PAUSES[self._number % len(_PAUSES)] + self._draw.uniform(0.02, 0.12)
        return self._tokens - before

    def take_record(self) -> Record:
        text, self._log = "".join(self._log), []
        return parse_log(text)

    def _sample(self, burning: bool) -> None:
        self._number += 1
        number = self._number
        files = {name: text for name, text, mode in meters(self._profile, self.physics) if mode == READABLE}
        sections = {
            "supply": _supply(files),
            "current": self._ask("cmd battery get -f current_now"),
            "battery": self._ask("dumpsys battery"),
            "rails": files.get("bus/iio/devices/iio:device0/energy_value", ""),
        }
        if number % 5 == 1:
            sections["thermal"] = self._ask("dumpsys thermalservice")
            sections["suspended"] = self._ask("getprop power.battery_input.suspended")
        phase = "burn" if burning else "idle"
        head = f"{MARK} sample {number} {self._now:.2f} {1.7e9 + self._now:.6f} {phase}\n"
        body = "".join(f"{MARK} {name}\n{text}\n" for name, text in sections.items())
        self._log.append(f"{head}{body}{MARK} end {number}\n")

    def _ask(self, command: str) -> str:
        answer = self._services.call(command.split())
        return "" if answer.error else answer.text


def _supply(files: dict[str, str]) -> str:
    folder = "class/power_supply/battery"
    names = ("current_now", "voltage_now", "charge_counter")
    return "".join(f"{n} {files[f'{folder}/{n}']}" for n in names if f"{folder}/{n}" in files)


def run_trial(profile: Profile, seed: int) -> Trial:
    """Calibrate a phone, let it work, and see what the pipeline makes of what it logged."""
    phone = SimulatedPhone(profile, seed)
    model, build = profile.model, profile.fingerprint
    calibration = _calibrate(phone, profile, model, build)
    if isinstance(calibration, Unsupported):
        return Trial(profile.name, seed, unsupported(str(calibration)), 0.0)
    draw = random.Random(seed)
    before, after = idle_needs(calibration)
    phone.record(before, lambda _: 0.0)
    net, start = phone.physics.net_j, phone.now
    tokens = phone.record(draw.uniform(62, 110), _shape(draw, profile.cores))
    window = Window(start, phone.now, max(1, round(tokens)))
    net = phone.physics.net_j - net
    phone.record(after, lambda _: 0.0)
    return Trial(profile.name, seed, measure(phone.take_record(), calibration, window), net / window.tokens)


def _calibrate(phone: SimulatedPhone, profile: Profile, model: str, build: str) -> Calibration | Unsupported:
    plan = CALIBRATION_PLAN
    phone.record(plan.burn_after_s or 0.0, lambda _: 0.0)
    phone.record(plan.burn_s, lambda _: float(profile.cores), burning=True)
    phone.record(plan.max_s - (plan.burn_after_s or 0.0) - plan.burn_s, lambda _: 0.0)
    try:
        return calibrate(phone.take_record(), model, build)
    except Unsupported as reason:
        return reason
    finally:
        phone.record(300.0, lambda _: 0.0)  # it cools down
        phone.take_record()


def _shape(draw: random.Random, cores: int) -> Load:
    """Busy cores: steady, or bursts of prefill between tokens, or ever fewer."""
    most = draw.uniform(1.0, min(4, cores))
    kind = draw.choice(("steady", "bursts", "falling"))
    period, share = draw.uniform(0.7, 9.0), draw.uniform(0.3, 0.8)
    phase = draw.uniform(0, period)
    if kind == "bursts":
        return lambda t: most if (t + phase) % period < share * period else 0.45 * most
    if kind == "falling":
        return lambda t: most * (1 - 0.003 * t)
    return lambda t: most

"""Energy of a leg: calibrates a model once, records rest, work and rest, and keeps what it found."""

from __future__ import annotations

import json
import logging
import math
import threading
from collections.abc import Callable
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Protocol

from device_agents.api import DeviceIdentity
from device_agents.deadline import Deadline
from device_agents.energy import (
    CALIBRATION_PLAN,
    MIN_WINDOW_S,
    Calibration,
    Energy,
    Unsupported,
    Window,
    calibrate,
    idle_needs,
    measure,
    unsupported,
)
from device_agents.energy.series import check_state
from device_agents.recording.record import Plan, Record
from kvengine.codec import DecodeError, decode, encode
from kvengine.program import Measurement, Workload
from reports.results import EnergyInfo

Step = Callable[[str, int, int], None]
_LONGEST_CALL_S = 240.0
_MOST_ROUNDS = 40
_log = logging.getLogger(__name__)


class Recorded(Protocol):
    """The part of harness.device_session.DeviceSession that is needed."""

    def run_workload(self, workload: Workload) -> Measurement: ...

    def start_recording(self, plan: Plan) -> None: ...

    def stop_recording(self) -> Record: ...


def energy_of(
    session: Recorded, identity: DeviceIdentity, workload: Workload, cache: Path, on_step: Step
) -> EnergyInfo:
    """Takes minutes. What cannot be measured is unsupported, with the reason.

    cache: folder of the calibrations, one file for each model and build.

    Raises:
        InfrastructureError: the device went away.
    """
    try:
        calibration = _calibration(session, identity, cache, on_step)
        return energy_info(_work(session, workload, calibration, on_step))
    except Unsupported as reason:
        return energy_info(unsupported(str(reason)))


def energy_info(energy: Energy) -> EnergyInfo:
    """The report's copy: same fields, other room."""
    return decode(EnergyInfo, encode(energy))


def _work(session: Recorded, workload: Workload, calibration: Calibration, on_step: Step) -> Energy:
    before, after = idle_needs(calibration)
    most_s = before + after + 2 * _LONGEST_CALL_S + MIN_WINDOW_S
    session.start_recording(Plan(max_s=most_s))
    try:
        on_step("energy: at rest", 0, 0)
        _rest(before)
        on_step("energy: working", 0, 0)
        window = _busy(session, workload)
        on_step("energy: at rest", 0, 0)
        _rest(after)
    except BaseException:
        _discard(session)
        raise
    return measure(session.stop_recording(), calibration, window)


def _busy(session: Recorded, workload: Workload) -> Window:
    """Repeats the workload until MIN_WINDOW_S have passed on the device."""
    once = replace(workload, repeats=1, warmup=0)
    first = last = session.run_workload(once)
    if not first.ended_s:
        raise Unsupported("the runner's system tells no time since boot")
    tokens = workload.new_tokens
    for _ in range(_MOST_ROUNDS):
        left = MIN_WINDOW_S + 2.0 - (last.ended_s - first.began_s)
        if left <= 0:
            return Window(first.began_s, last.ended_s, tokens)
        each = max(last.ended_s - last.began_s, 1e-3) / max(1, len(last.samples))
        repeats = max(1, math.ceil(min(left, _LONGEST_CALL_S) / each))
        last = session.run_workload(replace(once, repeats=repeats))
        tokens += repeats * workload.new_tokens
    raise Unsupported(f"{_MOST_ROUNDS} rounds of work did not fill {MIN_WINDOW_S:.0f} s")


def _calibration(session: Recorded, identity: DeviceIdentity, cache: Path, on_step: Step) -> Calibration:
    """Of this model and build: kept from earlier, or made now. Raises Unsupported."""
    if identity.kind != "android":
        raise Unsupported(
            f"{identity.name} is a {identity.kind}: no battery that feeds it alone is known here"
        )
    key = sha256(f"{identity.model}\n{identity.build}\n{identity.simulated}".encode()).hexdigest()[:32]
    path = cache / f"{key}.json"
    try:
        return decode(Calibration, json.loads(path.read_text()))
    except FileNotFoundError:
        pass
    except (OSError, ValueError, DecodeError) as error:
        _log.warning("the calibration in %s is made again: %s", path, error)
    _look_first(session)
    on_step("energy: calibrating", 0, 0)
    session.start_recording(CALIBRATION_PLAN)
    try:
        _rest(CALIBRATION_PLAN.max_s)
    except BaseException:
        _discard(session)
        raise
    found = calibrate(session.stop_recording(), identity.model, identity.build)
    cache.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.write_text(json.dumps(encode(found)))
    part.replace(path)
    _rest(60.0)  # it cools down
    return found


def _look_first(session: Recorded) -> None:
    """What 2 s show need not be waited for 2 minutes. Raises Unsupported."""
    session.start_recording(Plan(max_s=30, slow_every=1))
    _rest(2.5)
    samples = session.stop_recording().samples
    if samples and not samples[0].rails:
        check_state(samples)


def _discard(session: Recorded) -> None:
    try:
        session.stop_recording()
    except Exception as error:
        _log.warning("a recording was not stopped: %s", error)


def _rest(seconds: float) -> None:
    """The device is left alone, on purpose."""
    deadline, never = Deadline(seconds), threading.Event()
    while not deadline.expired:
        never.wait(deadline.remaining)

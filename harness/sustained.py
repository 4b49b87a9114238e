"""Sustained speed: generations back to back until the decode speed has settled, or time is up.

Phones start fast and slow down as they warm: of the phones of arXiv 2603.23640 one lost 44 % of its
speed within twenty runs. A burst shows none of it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from statistics import median
from typing import Protocol

from device_agents.recording.record import Record
from harness.during import hottest
from harness.measuring import sample_info
from kvengine.errors import InvalidRequest
from kvengine.program import Measurement, Sample, Workload
from reports.results import SustainedInfo
from reports.stats import decode_rate

POINT_S = 2.0  # generations that make up one point take at least so long
LEAST_POINTS = 20  # back to back before the speed may count as settled
SETTLED = 0.02  # the last points and those before them differ by less

Step = Callable[[str, int, int], None]


class Works(Protocol):
    """The part of an EngineSession that is needed."""

    def run_workload(self, workload: Workload) -> Measurement: ...


@dataclass(frozen=True)
class SustainedRun:
    """points: (s on the device's clock at the end, tokens/s). measurement: all samples together."""

    points: tuple[tuple[float, float], ...]
    settled: bool
    measurement: Measurement

    def info(self, record: Record) -> SustainedInfo:
        """For the report; temperatures and clocks are of ``record``, on the same clock."""
        began, ended = self.measurement.began_s, self.measurement.ended_s
        rates = [rate for _, rate in self.points]
        window = _window(len(rates))
        inside = [s for s in record.samples if began <= s.at <= ended]
        sensor, _ = hottest(inside)
        return SustainedInfo(
            seconds=tuple(at - began for at, _ in self.points),
            tokens_per_s=tuple(rates),
            settled=self.settled,
            first=median(rates[:window]),
            last=median(rates[-window:]),
            sensor=sensor,
            temperatures_c=tuple(
                (s.at - began, s.vitals.temperatures_c[sensor])
                for s in inside
                if sensor in s.vitals.temperatures_c
            ),
            clocks_mhz=tuple(
                (s.at - began, max(s.vitals.clocks_khz) / 1000) for s in inside if s.vitals.clocks_khz
            ),
        )


def sustain(session: Works, workload: Workload, most_s: float, on_step: Step) -> SustainedRun:
    """Repeat ``workload`` for at most ``most_s`` (and the generation that is under way then).

    Raises:
        InvalidRequest: the device's system does not tell time, or the workload has no second token.
    """
    if workload.new_tokens < 2:
        raise InvalidRequest(f"sought at least 2 new tokens for a decode speed, found {workload.new_tokens}")
    once = replace(workload, repeats=1, warmup=0)
    first = last = session.run_workload(once)
    if not first.ended_s:
        raise InvalidRequest("a sustained run needs the time since boot, which this system does not tell")
    points = [_point(first)]
    samples = list(first.samples)
    settled = False
    while not settled and last.ended_s - first.began_s < most_s:
        on_step("sustained", int(last.ended_s - first.began_s), math.ceil(most_s))
        each = max((last.ended_s - last.began_s) / len(last.samples), 1e-3)
        last = session.run_workload(replace(once, repeats=max(1, round(POINT_S / each))))
        points.append(_point(last))
        samples += last.samples
        settled = has_settled([rate for _, rate in points])
    whole = replace(last, samples=tuple(samples), load_ms=first.load_ms, began_s=first.began_s)
    return SustainedRun(tuple(points), settled, whole)


def has_settled(rates: Sequence[float]) -> bool:
    """Whether the last quarter of ``rates`` (at least 5) is like the quarter before it."""
    window = _window(len(rates))
    if len(rates) < max(LEAST_POINTS, 2 * window):
        return False
    last, before = median(rates[-window:]), median(rates[-2 * window : -window])
    return abs(last / before - 1) < SETTLED


def _window(points: int) -> int:
    return max(5, points // 4)


def _point(measurement: Measurement) -> tuple[float, float]:
    return measurement.ended_s, _rate(measurement.samples)


def _rate(samples: Sequence[Sample]) -> float:
    return decode_rate(map(sample_info, samples)) or 0.0

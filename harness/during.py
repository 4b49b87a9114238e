"""What a recording says in a report's words."""

from __future__ import annotations

from device_agents.recording.record import Record, Sample
from reports.results import DuringInfo

# A sensor that says the same in so many samples is not wired, or stands still; peaks are not taken of it.
_FROZEN_AFTER = 10


def during_info(record: Record, began_s: float = 0.0, ended_s: float = 0.0) -> DuringInfo:
    """Of the samples between two moments on the device's clock; 0, 0: of all."""
    inside = [s for s in record.samples if not ended_s or began_s - 1 <= s.at <= ended_s + 1]
    if not inside:
        return DuringInfo(note=record.note or "no sample fell into the leg")
    statuses = [s.vitals.thermal_status for s in inside if s.vitals.thermal_status is not None]
    levels = [s.gauge.percent for s in inside if s.gauge.percent is not None]
    runners = [s.runner for s in inside if s.runner is not None]
    pss = [r.pss_bytes for r in runners if r.pss_bytes is not None]
    swap = [r.swap_bytes for r in runners if r.swap_bytes is not None]
    sensor, peak = hottest(inside)
    return DuringInfo(
        samples=len(inside),
        seconds=inside[-1].at - inside[0].at,
        peak_c=peak,
        hottest=sensor,
        thermal_status=max(statuses, default=None),
        clocks=_clocks(inside),
        governor=next((s.vitals.governor for s in inside if s.vitals.governor), None),
        battery_percent=(levels[0], levels[-1]) if levels else None,
        pss_bytes=max(pss, default=None),
        swap_bytes=max(swap, default=None),
        minor_faults=runners[-1].minor_faults - runners[0].minor_faults if runners else None,
        major_faults=runners[-1].major_faults - runners[0].major_faults if runners else None,
        cgroup=next((r.cgroup for r in runners if r.cgroup), ""),
        cpuset=next((r.cpuset for r in runners if r.cpuset), ""),
        note=record.note,
    )


def hottest(samples: list[Sample]) -> tuple[str, float | None]:
    """The sensor that was hottest, and its °C; those that never move do not count."""
    seen: dict[str, list[float]] = {}
    for sample in samples:
        for name, celsius in sample.vitals.temperatures_c.items():
            seen.setdefault(name, []).append(celsius)
    moving = {name: v for name, v in seen.items() if len(v) < _FROZEN_AFTER or min(v) != max(v)}
    if not moving:
        return "", None
    sensor = max(moving, key=lambda name: max(moving[name]))
    return sensor, max(moving[sensor])


def _clocks(samples: list[Sample]) -> tuple[str, ...]:
    """Neighbouring cores that always had the same clock are one cluster: "0-3: 300–1704 MHz"."""
    rows = [s.vitals.clocks_khz for s in samples if s.vitals.clocks_khz]
    if not rows or len({len(row) for row in rows}) != 1:
        return ()
    clusters: list[tuple[int, int, list[int]]] = []
    for core, series in enumerate(map(list, zip(*rows, strict=True))):
        if clusters and clusters[-1][2] == series:
            clusters[-1] = (clusters[-1][0], core, series)
        else:
            clusters.append((core, core, series))
    return tuple(_cluster(first, last, series) for first, last, series in clusters)


def _cluster(first: int, last: int, khz: list[int]) -> str:
    cores = f"core {first}" if first == last else f"cores {first}-{last}"
    low, high = min(khz) // 1000, max(khz) // 1000
    return f"{cores}: {low:,} MHz" if low == high else f"{cores}: {low:,}–{high:,} MHz"

"""Where a number comes from: one leg, its artifact, its device's state before and after."""

from __future__ import annotations

from dataclasses import dataclass

from reports import text
from reports.ceiling import bandwidth_line, reads_line
from reports.conditions import during_line, energy_line
from reports.devices import DeviceView
from reports.results import LegResult, VitalsInfo


@dataclass(frozen=True)
class LegProvenance:
    device: DeviceView
    recipe: str
    workload: str
    validity: str
    facts: tuple[tuple[str, str], ...]
    vitals: tuple[tuple[str, str, str], ...]  # name, before, after


def leg_provenance(leg: LegResult, device: DeviceView) -> LegProvenance:
    nodes = ", ".join(f"{provider} {count}" for provider, count in leg.nodes_by_provider.items())
    facts = [
        ("Nodes by provider", nodes),
        ("Threads", str(leg.threads)),
        ("Model", leg.model),
        *leg.provenance.items(),
        ("During", during_line(leg.during)),
        ("Placement", _placement(leg)),
        ("Energy", energy_line(leg.energy)),
        ("A step reads", reads_line(leg.reads) if leg.reads else ""),
        ("Read bandwidth", bandwidth_line(leg.bandwidth)),
        *(("Energy note", note) for note in leg.energy.notes),
        *(("Reason", reason) for reason in leg.reasons),
        *(("Note", note) for note in leg.notes),
    ]
    return LegProvenance(
        device=device,
        recipe=leg.recipe,
        workload=leg.workload,
        validity=leg.validity,
        facts=tuple((k, v) for k, v in facts if v),
        vitals=_vitals(leg.vitals_before, leg.vitals_after),
    )


def _placement(leg: LegResult) -> str:
    """Where the system let the runner run."""
    if leg.during is None:
        return ""
    places = (("cpuset", leg.during.cpuset), ("cgroup", leg.during.cgroup.replace("\n", " ")))
    return ", ".join(f"{name} {value}" for name, value in places if value)


def _vitals(before: VitalsInfo, after: VitalsInfo) -> tuple[tuple[str, str, str], ...]:
    """Every vital that was read before or after the leg."""
    pairs = dict.fromkeys((*_vital_texts(before), *_vital_texts(after)))
    first, second = _vital_texts(before), _vital_texts(after)
    return tuple((name, first.get(name, text.MISSING), second.get(name, text.MISSING)) for name in pairs)


def _vital_texts(vitals: VitalsInfo) -> dict[str, str]:
    clocks = ", ".join(f"{khz / 1000:,.0f}" for khz in vitals.clocks_khz)
    shown = {
        "Load, 1 min": None if vitals.load_1m is None else f"{vitals.load_1m:.2f}",
        "Memory available": None
        if vitals.mem_available_bytes is None
        else text.byte_size(vitals.mem_available_bytes),
        "Clocks, MHz": clocks or None,
        "Governor": vitals.governor,
        **{f"{name}, °C": f"{degrees:.1f}" for name, degrees in vitals.temperatures_c.items()},
        "Thermal status": None if vitals.thermal_status is None else str(vitals.thermal_status),
        "Battery": None if vitals.battery_percent is None else f"{vitals.battery_percent:.0f} %",
        "Charging": None if vitals.battery_charging is None else ("yes" if vitals.battery_charging else "no"),
    }
    return {name: value for name, value in shown.items() if value is not None}

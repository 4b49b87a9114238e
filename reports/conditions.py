"""What a device went through during a leg, and what that took, each in one line."""

from __future__ import annotations

from reports import text
from reports.results import DuringInfo, EnergyInfo


def during_line(during: DuringInfo | None) -> str:
    """Peak temperature, thermal status, clocks, memory; "" when nothing was recorded."""
    if during is None:
        return ""
    battery = during.battery_percent
    parts = (
        None if during.peak_c is None else f"peak {during.peak_c:.1f} °C ({during.hottest})",
        None if during.thermal_status is None else f"thermal status {during.thermal_status}",
        "; ".join(during.clocks) or None,
        None if battery is None else f"battery {battery[0]:.0f} → {battery[1]:.0f} %",
        None if during.pss_bytes is None else f"PSS {text.byte_size(during.pss_bytes)}",
        None if not during.swap_bytes else f"swap {text.byte_size(during.swap_bytes)}",
        None if during.major_faults is None else f"{during.major_faults:,} major page faults",
        during.note or None,
    )
    return ", ".join(part for part in parts if part is not None)


def energy_line(energy: EnergyInfo) -> str:
    """Net and gross J for each token, or why there is no number."""
    if energy.net_j_per_token is None or energy.gross_j_per_token is None:
        return f"unsupported: {energy.reason}"
    net = f"{energy.net_j_per_token:.3g} J/token net"
    if energy.uncertainty is not None:
        net += f" ± {energy.uncertainty:.1%}"
    return f"{net}, {energy.gross_j_per_token:.3g} gross ({energy.rung})"

"""The live page: one HTML page that a server makes, and its sections anew for each look."""

from __future__ import annotations

import math
from collections import Counter
from datetime import UTC, datetime
from typing import Any
from urllib.parse import quote

from markupsafe import Markup

from reports import text
from reports.farm_state import DeviceState, FarmState, VitalsState
from reports.page import asset, environment, hashed, script

SECTIONS = ("summary", "devices", "quarantine", "work", "waiting", "history")
POLL_MS = 2000
_STATES = {
    "free": "passed",
    "leased": "busy",
    "finishing": "busy",
    "quarantined": "failed",
    "unknown": "none",
}
# Flutter's flake threshold: 2 % over the last 100, see docs/security.md's neighbour, docs/leases.md.
FLAKY = 0.02


def html(state: FarmState) -> str:
    """The whole page, readable without JavaScript; with it its sections are renewed every POLL_MS."""
    return (
        environment()
        .get_template("farm_page.html.j2")
        .render(
            sections={name: Markup(part) for name, part in sections(state).items()},
            style=Markup(_style()),
            script=Markup(script("farm.js")),
            poll_ms=POLL_MS,
        )
    )


def sections(state: FarmState) -> dict[str, str]:
    """HTML by the id of the element that it fills; whatever came from a device or a person is escaped."""
    template = environment().get_template("farm_sections.html.j2")
    made: dict[str, Any] = vars(template.make_module(_words(state)))
    return {name: str(made[name](state)) for name in SECTIONS}


def policy() -> str:
    """The page's Content-Security-Policy, for its HTTP header: our style, our script, and our server."""
    return (
        f"default-src 'none'; script-src {hashed(script('farm.js'))}; style-src {hashed(_style())}; "
        "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )


def _style() -> str:
    return asset("style.css") + asset("farm.css")


def _words(state: FarmState) -> dict[str, Any]:
    """What the templates say things with."""
    return {
        "ago": lambda at: _span(state.at - at),
        "left": lambda at: _span(at - state.at),
        "clock": _clock,
        "iso": lambda at: datetime.fromtimestamp(at, UTC).isoformat(timespec="seconds"),
        "moment": text.moment,
        "plural": text.plural,
        "tone": lambda device: _STATES[device.state],
        "counts": Counter(device.state for device in state.devices),
        "flaky": _flaky,
        "vitals": _vitals,
        "hot": _hottest,
        "slug": text.slug,
        "quoted": lambda run_id: quote(run_id, safe=""),
        "working": [run for run in state.runs if run.holders],
        "run_link": {run.run_id for run in state.runs},
    }


def _span(seconds: float) -> str:
    """Whole seconds: the page is renewed every two."""
    seconds = max(0.0, seconds)
    return (
        f"{seconds:.0f} s" if seconds < 60 else text.seconds(seconds) if seconds < 86400 else _days(seconds)
    )


def _days(seconds: float) -> str:
    return text.plural(int(seconds // 86400), "day")


def _clock(at: float) -> str:
    return f"{datetime.fromtimestamp(at, UTC):%H:%M:%S}"


def _flaky(device: DeviceState) -> str:
    """ "" where there are no results; else whether its infrastructure is below or above FLAKY."""
    if not device.results:
        return ""
    return "warn" if device.stopped / device.results > FLAKY else "fine"


def _hottest(vitals: VitalsState) -> tuple[str, float] | None:
    """The battery's, where it is told, for gates look at that; else the hottest sensor."""
    known = {name: each for name, each in vitals.temperatures_c.items() if math.isfinite(each)}
    if not known:
        return None
    name = "battery" if "battery" in known else max(known, key=lambda each: known[each])
    return name, known[name]


def _vitals(vitals: VitalsState) -> str:
    words = []
    if vitals.battery_percent is not None:
        words.append(f"{vitals.battery_percent:.0f} %" + (" charging" if vitals.charging else ""))
    if (hottest := _hottest(vitals)) is not None:
        words.append(f"{hottest[1]:.1f} °C {hottest[0]}")
    if vitals.thermal_status:
        words.append(f"thermal status {vitals.thermal_status}")
    return ", ".join(words)

"""What the report says of a device during a leg, and of energy."""

from __future__ import annotations

import json

from kvengine.codec import decode, encode
from reports.conditions import during_line, energy_line
from reports.page import html
from reports.results import DuringInfo, EnergyInfo, LegResult
from reports.view import build_view
from tests.reports.sample import leg, run

DURING = DuringInfo(
    samples=42,
    seconds=41.0,
    peak_c=41.26,
    hottest="VIRTUAL-SKIN",
    thermal_status=1,
    clocks=("cores 0-3: 300–1,704 MHz", "core 8: 2,914 MHz"),
    battery_percent=(72.0, 71.0),
    pss_bytes=61 << 20,
    swap_bytes=0,
    major_faults=3,
    cgroup="0::/top-app",
    cpuset="/top-app",
    note="1 of 43 samples are not whole",
)
ENERGY = EnergyInfo("gauge", "", 0.1234, 0.2, 0.012, 0.55, 900, 62.0, 1.003, ("told by the counter",))


def test_a_leg_is_one_line() -> None:
    assert during_line(DURING) == (
        "peak 41.3 °C (VIRTUAL-SKIN), thermal status 1, cores 0-3: 300–1,704 MHz; core 8: 2,914 MHz, "
        "battery 72 → 71 %, PSS 61 MiB, 3 major page faults, 1 of 43 samples are not whole"
    )
    assert during_line(DuringInfo(note="not recorded: no setsid")) == "not recorded: no setsid"
    assert during_line(None) == ""


def test_energy_is_a_number_with_its_doubt_or_the_reason() -> None:
    assert energy_line(ENERGY) == "0.123 J/token net ± 1.2%, 0.2 gross (gauge)"
    assert energy_line(EnergyInfo()) == "unsupported: not asked for (--energy)"
    assert energy_line(EnergyInfo("unsupported", "plugged in")) == "unsupported: plugged in"


def test_the_page_shows_both_beside_the_row_and_in_the_provenance() -> None:
    results = run(legs=(leg(during=DURING, energy=ENERGY),))
    page = html(results)
    assert page.count("peak 41.3 °C (VIRTUAL-SKIN)") == 2
    assert page.count("0.123 J/token net ± 1.2%") == 2
    facts = dict(build_view(results).legs[0].facts)
    assert facts["Placement"] == "cpuset /top-app, cgroup 0::/top-app"
    assert facts["Energy note"] == "told by the counter"


def test_a_leg_stored_before_there_was_energy_is_still_read() -> None:
    stored = encode(leg())
    del stored["during"]
    del stored["energy"]
    assert decode(LegResult, json.loads(json.dumps(stored))).energy.rung == "unsupported"

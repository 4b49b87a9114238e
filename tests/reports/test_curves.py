"""Speed against prompt length, context depth and time: drawn where there is more than one length."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from reports.curves import curve_groups
from reports.devices import device_view
from reports.page import html
from reports.results import LegResult, SampleInfo, SustainedInfo
from tests.reports.parsed import Page
from tests.reports.sample import AFTER, BEFORE, HOST, device, leg, run

DEVICES = {HOST: device_view(device(HOST))}
SLOWING = SustainedInfo(
    (2.0, 4.0, 6.0), (40.0, 32.0, 30.0), True, 40.0, 30.0, "skin", ((1.0, 30.0), (5.0, 41.5))
)


def at(prompt: int, depth: int = 0, ttft: float = 100.0, itl: float = 20.0, **changes: Any) -> LegResult:
    fields: dict[str, Any] = {
        "workload": f"prompt {prompt} at {depth}",
        "prompt_tokens": prompt,
        "depth": depth,
        "samples": (SampleInfo(ttft, (itl,) * 4),),
    }
    return leg(HOST, **{"recipe": AFTER, **fields, **changes})


def drawn(*legs: LegResult) -> dict[str, Any]:
    """Points of each chart by the key's last word."""
    found = {}
    for group in curve_groups(run(legs=legs), DEVICES):
        for chart in group.charts:
            spec = chart.spec
            values = next(iter(spec["datasets"].values())) if "datasets" in spec else spec["data"]["values"]
            found[chart.key.split("-")[-1]] = [(row["recipe"], row["x"], row["y"]) for row in values]
    return found


def test_one_workload_is_no_curve() -> None:
    assert curve_groups(run(legs=(at(128), at(128))), DEVICES) == ()


def test_time_to_first_token_against_prompt_length_and_speed_against_depth() -> None:
    legs = (
        at(32, ttft=50.0),
        at(128, ttft=200.0, itl=25.0),
        at(128, ttft=220.0, itl=25.0),
        at(32, 1024, ttft=900.0, itl=40.0),
        at(32, recipe=BEFORE, ttft=60.0),
    )
    assert drawn(*legs) == {
        "prompt": [(AFTER, 32, 50.0), (BEFORE, 32, 60.0), (AFTER, 128, 210.0)],
        "depth": [(AFTER, 32, 50.0), (BEFORE, 32, 50.0), (AFTER, 128, 40.0), (AFTER, 1056, 25.0)],
    }


def test_a_time_at_depth_is_no_time_of_a_prompt_alone() -> None:
    assert set(drawn(at(32), at(32, 512))) == {"depth"}


def test_an_invalid_leg_is_not_drawn() -> None:
    assert curve_groups(run(legs=(at(32), at(64, validity="INVALID"))), DEVICES) == ()


def test_a_sustained_run_is_drawn_over_time_and_told_in_words() -> None:
    legs = (at(32), at(32, sustained=SLOWING, workload="sustained"))
    assert drawn(*legs) == {
        "sustained": [(AFTER, 2.0, 40.0), (AFTER, 4.0, 32.0), (AFTER, 6.0, 30.0)],
        "temperature": [(AFTER, 1.0, 30.0), (AFTER, 5.0, 41.5)],
    }
    (group,) = curve_groups(run(legs=legs), DEVICES)
    assert group.sustained == ((AFTER, "40.0 → 30.0 tok/s (−25.0 %) after 6.0 s, settled"),)
    (open_end,) = curve_groups(run(legs=(at(32, sustained=replace(SLOWING, settled=False)),)), DEVICES)
    assert open_end.sustained[0][1].endswith("not settled when time was up")


def test_the_page_has_the_curves_and_their_words() -> None:
    page = Page(html(run(legs=(at(32), at(64), at(32, sustained=SLOWING, workload="sustained")))))
    (section,) = [e for e in page.all("section") if e.attributes.get("id") == "curves"]
    assert "40.0 → 30.0 tok/s" in section.words
    assert {"c0-prompt", "c0-depth", "c0-sustained"} <= {e.attributes["id"] for e in page.all("figure")}

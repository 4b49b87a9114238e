"""A made-up night with everything its page must show. Nothing was measured."""

from __future__ import annotations

from dataclasses import replace

from reports.gate_night import NightDevice, NightInfo, NightPart

HOSTILE = "<img src=x onerror=alert(1)>"


def sample_night() -> NightInfo:
    parts = (
        NightPart(
            "calibrate",
            "Calibration (A/A)",
            "INCONCLUSIVE",
            "A/A goes on",
            "Of 2 A/A cells: 2 INCONCLUSIVE.",
            ("host p128+n64 time to first token does not gate: blocks of the same code scatter by 6.0 %.",),
            decides=False,
            run_id="r1",
            page="calibrate/index.html",
            started_at="2026-11-24T01:00:00+00:00",
            seconds=95.0,
        ),
        NightPart(
            "check",
            "Correctness",
            "WRONG",
            "The KV cache is wrong",
            f"1 of 19 checks failed on {HOSTILE}.",
            run_id="r2",
            page="check/index.html",
            seconds=61.0,
        ),
        NightPart("gate", "Gate", "REGRESSED", "The candidate is worse", "Of 4: 1 REGRESSED.", seconds=180.0),
    )
    return NightInfo(
        night="2026-11-24T010000Z-0a1b2c3d",
        name="nightly",
        started_at="2026-11-24T01:00:00+00:00",
        finished_at="2026-11-24T01:06:00+00:00",
        command=f"kvfarm nightly --config {HOSTILE}",
        config="nightly.toml",
        model="gemma-3-1b",
        baseline="v1.2",
        candidate="hybrid,threads=2",
        planned=("calibrate", "check", "measure", "gate"),
        drill="the candidate's steps are slowed down by 5.0 %",
        starts=2,
        devices=(
            NightDevice("host", "Xeon", ""),
            NightDevice("virtual1", "Pixel 8", "virtual phone"),
            NightDevice(HOSTILE, "", "", "no route"),
        ),
        parts=parts,
        calibration="Of 8 A/A verdicts in 9 runs, 0 called the same code REGRESSED.",
        provenance={"commit": "0123456789"},
    )


def earlier_night() -> NightInfo:
    night = sample_night()
    passed = tuple(replace(part, word="PASS", remarks=()) for part in night.parts)
    return replace(
        night,
        night="2026-11-23T010000Z-0a1b2c3d",
        started_at="2026-11-23T01:00:00+00:00",
        finished_at="2026-11-23T01:09:00+00:00",
        parts=passed,
        planned=("calibrate", "check", "gate"),
        drill="",
        starts=1,
    )

"""A made-up gate and a made-up calibration with everything their page must show. Nothing was measured."""

from __future__ import annotations

import math
from dataclasses import replace

from reports.gate_results import (
    BlockInfo,
    CalibratedCell,
    CalibrationInfo,
    CheckedInfo,
    Comparison,
    GateCell,
    GateInfo,
    GateVerdict,
    Injection,
    InjectionFound,
    Place,
    Side,
    Tail,
    WaiverInfo,
)
from reports.results import BandwidthInfo, LegResult, RunResults, SampleInfo, StepReads
from tests.reports.sample import device, leg, mutation, run

BANDWIDTH = BandwidthInfo(31e9, 512 << 20, 2, 32 << 20)
READS = StepReads(600_000_000, 20_000_000)
HOSTILE = "<img src=x onerror=alert(1)>"
WORKLOAD = "p128+n64"
METRICS = {
    "ttft": ("Time to first token", "ms", 0.05, 745.0),
    "decode": ("Inter-token latency", "ms", 0.03, 25.5),
    "memory": ("Peak memory", "bytes", 0.02, 9.4e8),
}


def gate_cell(
    name: str, metric: str, verdict: GateVerdict, estimate: float | None, half: float = 0.01
) -> GateCell:
    title, unit, margin, base = METRICS[metric]
    return GateCell(
        id=f"{name}/gemma-3-1b/{WORKLOAD}/{metric}",
        comparison="gate",
        device=name,
        model="gemma-3-1b",
        workload=WORKLOAD,
        metric=metric,
        title=title,
        unit=unit,
        exact=False,
        gating=True,
        advisory="",
        margin=margin,
        verdict=verdict,
        reason=f"made up as {verdict}",
        baseline=base if estimate is not None else None,
        candidate=None if estimate is None else base * (1 + estimate),
        blocks=()
        if estimate is None
        else tuple(math.log1p(estimate) + 0.002 * (i % 3 - 1) for i in range(8)),
        void=1,
        looks=1,
        estimate=estimate,
        low=None if estimate is None else estimate - half,
        high=None if estimate is None else estimate + half,
        sd=None if estimate is None else 0.01,
        p=None if estimate is None else 0.2,
        sign_flip=None if estimate is None else 0.21,
        tails=(Tail("baseline", "p50", 25.5, 1512, 1), Tail("baseline", "p99", None, 500, 662)),
    )


def exact_cell(name: str, verdict: GateVerdict) -> GateCell:
    return replace(
        gate_cell(name, "memory", verdict, 0.0),
        id=f"{name}/gemma-3-1b/{WORKLOAD}/tokens",
        metric="tokens",
        title="Tokens",
        unit="",
        exact=True,
        estimate=0.0 if verdict == "PASS" else None,
        low=None,
        high=None,
        blocks=(),
        tails=(),
    )


def gate_legs(
    name: str, blocks: int = 3, workload: str = WORKLOAD, prompt: int = 128
) -> tuple[LegResult, ...]:
    """The host's bandwidth was measured beside its first leg, no other device's."""
    legs = []
    for block in range(blocks):
        for position, arm in enumerate(("baseline", "candidate", "candidate", "baseline")):
            place = Place("gate", workload, block, position, arm)  # type: ignore[arg-type]
            ttft = 5.8 * prompt + position
            samples = tuple(SampleInfo(ttft, (25.0 + position / 10,) * 20) for _ in range(2))
            made = leg(name, place=place, samples=samples, prompt_tokens=prompt, reads=READS)
            first = name == "host" and (block, position) == (0, 0)
            legs.append(replace(made, bandwidth=BANDWIDTH) if first else made)
    return tuple(legs)


def gate_blocks(name: str) -> tuple[BlockInfo, ...]:
    return tuple(
        BlockInfo(
            name,
            "gate",
            WORKLOAD,
            index,
            "ABBA",
            ("the canary moved by +4.1 %, over 3.0 %",) if index == 1 else (),
            0.041 if index == 1 else 0.002,
            12.0 if index == 1 else 0.0,
            {"ttft": 0.01, "decode": 0.002},
        )
        for index in range(3)
    )


def calibration() -> CalibrationInfo:
    cells = tuple(
        CalibratedCell(
            device="host",
            model="gemma-3-1b",
            workload=WORKLOAD,
            metric=metric,
            title=METRICS[metric][0],
            margin=METRICS[metric][2],
            trials=4,
            false_regressed=0,
            estimate=0.001,
            low=-0.01,
            high=0.012,
            sd=sd,
            detectable_8=0.041,
            detectable_32=0.034,
            found=(
                InjectionFound("+3 %", 0.03, 0.031, "INCONCLUSIVE"),
                InjectionFound("+5 %", 0.05, 0.049, "REGRESSED"),
            ),
            revoked=revoked,
        )
        for metric, sd, revoked in (
            ("ttft", 0.01, ""),
            ("decode", 0.06, "blocks of the same code scatter by 6.0 %, over the margin of 3.0 %"),
        )
    )
    return CalibrationInfo(("r7", "r6"), "2026-11-20T01:00:00+00:00", 8, 0, 0.0, 0.369, cells)


def gate_info(*cells: GateCell, verdict: GateVerdict, exit_code: int) -> GateInfo:
    return GateInfo(
        kind="gate",
        plan_key="k",
        baseline=Side("v1.2", "hybrid", "a" * 64, "{}"),
        candidate=Side("hybrid,threads=2", "hybrid,threads=2", "b" * 64, "{}"),
        comparisons=(Comparison("gate"),),
        looks=(8, 16, 32),
        alpha=0.01,
        level=0.01 / 3,
        planned_cells=len(cells),
        settings="gate.toml",
        verdict=verdict,
        exit_code=exit_code,
        cells=cells,
        blocks=gate_blocks("host"),
        calibration=calibration(),
    )


def sample_gate() -> RunResults:
    """Every verdict, a waiver of each state, a void block, a revoked cell, a hostile device; a device that
    was set aside, a leg that was tried again; a longer workload, bandwidth, checks and mutants."""
    waived = replace(gate_cell("pixel-9", "ttft", "REGRESSED", 0.061), waived="longer prefill")
    revoked = replace(
        gate_cell("host", "memory", "PASS", 0.001), gating=False, advisory="failed A/A: it scatters"
    )
    cells = (
        gate_cell("host", "ttft", "PASS", 0.002),
        gate_cell("host", "decode", "REGRESSED", 0.062),
        revoked,
        exact_cell("host", "PASS"),
        waived,
        gate_cell("pixel-9", "decode", "INCONCLUSIVE", 0.02, half=0.4),
        gate_cell(HOSTILE, "decode", "INVALID", None),
    )
    info = replace(
        gate_info(*cells, verdict="REGRESSED", exit_code=1),
        waivers=(
            WaiverInfo("pixel-9/*/ttft", 0.08, "mara", "longer prefill", "#123", "2026-12-20", "used"),
            WaiverInfo("x/*", 0.08, "mara", HOSTILE, "#124", "2026-12-20", "unused"),
            WaiverInfo("y/*", 0.08, "mara", "old", "#1", "2026-01-01", "expired"),
        ),
        checked=(
            CheckedInfo(
                "host", "hybrid,threads=2", "r5", "2026-11-24T01:00:00+00:00", "f61b6a9", 19, 19, (), 0.11
            ),
            CheckedInfo(
                "pixel-9", "hybrid,threads=2", "r5", "", "other", 18, 19, (f"Rewinds {HOSTILE}",), 0.9
            ),
            CheckedInfo(HOSTILE, "hybrid,threads=2"),
        ),
    )
    legs = (*gate_legs("host"), *gate_legs("host", 1, "p1024+n64", 1024), *gate_legs("pixel-9"))
    again = replace(legs[1], retries=(f"RunnerDied: {HOSTILE}",))
    return replace(
        run(legs=(legs[0], again, *legs[2:])),
        devices=(
            device("host"),
            device("pixel-9", simulated="virtual phone", quarantined=f"3 lost in a row {HOSTILE}"),
        ),
        mutation=mutation("f61b6a9"),
        checks=(),
        gate=info,
        command=f"kvfarm gate --baseline v1.2 --candidate {HOSTILE}",
    )


def sample_calibration() -> RunResults:
    """One injected comparison beside A/A."""
    a_a = replace(gate_cell("host", "decode", "PASS", 0.001), comparison="A/A")
    injected = replace(
        gate_cell("host", "decode", "REGRESSED", 0.051),
        comparison="+5 %",
        gating=False,
        advisory="a loss was injected here",
    )
    info = replace(
        gate_info(a_a, injected, verdict="PASS", exit_code=0),
        kind="calibration",
        comparisons=(Comparison("A/A"), Comparison("+5 %", Injection(0.05, 0.05))),
    )
    return replace(run(legs=()), checks=(), devices=(device("host"),), gate=info)


def large_gate(devices: int = 20, cells: int = 40, suffix: str = "") -> RunResults:
    """As large as a page must bear. suffix: of every device's name."""
    names = [f"phone-{number}{suffix}" for number in range(devices)]
    workloads = [f"p{2**number}+n64" for number in range(math.ceil(cells / 3))]
    made = [
        replace(gate_cell(name, metric, "PASS", 0.001), workload=workload, id=f"{name}/m/{workload}/{metric}")
        for name in names
        for workload in workloads
        for metric in METRICS
    ]
    legs = [
        replace(found, place=replace(found.place, workload=workload))
        for name in names
        for workload in workloads
        for found in gate_legs(name, 8)
        if found.place is not None
    ]
    info = replace(gate_info(*made, verdict="PASS", exit_code=0), blocks=())
    return replace(run(legs=tuple(legs)), checks=(), gate=info, devices=tuple(map(device, names)))

"""How long a store with many results takes to be asked: ``python -m bench.store``.

Fills a SQLite file and a database of a PostgreSQL server of its own with made-up nights, then asks as
``kvfarm history``, ``report``, ``gate`` and the report's trend do. Each question is asked three times by a
store that was opened anew, and the median is kept, s. Prints one JSON line; progress goes to stderr.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import psycopg
from sqlalchemy import insert

from harness.gate.calibration import known_calibration
from harness.store import SqlStore, open_store
from harness.store.engine import transaction
from harness.store.rows import digest, dump, measured
from harness.store.tables import Leg, Measured
from harness.trends import series_of_run
from reports.gate_results import GATE, Comparison, GateCell, GateInfo, Side
from reports.results import DeviceInfo, LegResult, RunResults, SampleInfo, VitalsInfo
from tests import postgres

DEVICES = tuple(f"phone-{n}" for n in range(10))
RECIPES = ("naive", "static", "hybrid", "hybrid-int8kv", "int4")
WORKLOADS = ((128, 64), (1024, 64))
LEGS = 2  # of a cell in a night
A_NIGHT = len(DEVICES) * len(RECIPES) * len(WORKLOADS) * LEGS
GATES = 5  # every fifth night has one
REPEATS, TIMES = 5, 3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--legs", type=int, default=100_000)
    nights = parser.parse_args().legs // A_NIGHT
    found: dict[str, Any] = {"legs": nights * A_NIGHT, "runs": nights}
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        found["sqlite"] = _of(str(folder / "results.db"), nights)
        if binaries := postgres.programs():
            server = stack.enter_context(postgres.server(binaries))
            with psycopg.connect(
                host=server, user=postgres.USER, dbname="postgres", autocommit=True
            ) as connection:
                connection.execute("CREATE DATABASE results")
            found["postgresql"] = _of(postgres.url(server, "results"), nights)
    sys.stdout.write(json.dumps(found) + "\n")


def _of(where: str, nights: int) -> dict[str, float]:
    with open_store(where) as store:
        began = time.monotonic()
        for number in range(nights):
            _fill(store, number)
            if number % 50 == 49:
                left = (time.monotonic() - began) / (number + 1) * (nights - number - 1)
                sys.stderr.write(f"filling: night {number + 1} of {nights}, about {left:.0f} s left\n")
        newest = store.latest()
    questions: dict[str, Callable[[SqlStore], object]] = {
        "open": lambda s: None,
        "history, 40 rows": lambda s: s.history(limit=40),
        "history, one series": lambda s: s.history(
            device="phone-3", recipe="hybrid", workload="prompt 128 + 64 new", metric="decode"
        ),
        "history, 30 days": lambda s: s.history(since=_night(nights - 30)),
        "history, all of one metric": lambda s: s.history(metric="ttft"),
        "history, all": lambda s: s.history(),
        "runs": lambda s: s.runs(),
        "one run for its report": lambda s: s.results(newest),
        "gate: resume, calibration": lambda s: (
            s.headers(plan_key="none", finished=False, limit=1),
            known_calibration(s),
        ),
        "gate cells, one device": lambda s: s.gate_cells(device="phone-3"),
        "trend of one run": lambda s: series_of_run(s, s.results(newest)),
        "find a tag": lambda s: s.find("v7"),
    }
    return {name: _timed(where, ask) for name, ask in questions.items()}


def _timed(where: str, ask: Callable[[SqlStore], object]) -> float:
    times = []
    for _ in range(TIMES):
        began = time.monotonic()
        with open_store(where) as store:
            ask(store)
        times.append(time.monotonic() - began)
    return round(statistics.median(times), 3)


def _night(number: int) -> str:
    return (datetime(2025, 1, 1, 22, tzinfo=UTC) + timedelta(days=max(0, number))).isoformat(
        timespec="seconds"
    )


def _fill(store: SqlStore, number: int) -> None:
    run_id = f"night-{number:05d}"
    kind = None if number % GATES else "calibration" if number % (2 * GATES) else "gate"
    run = RunResults(
        run_id=run_id,
        started_at=_night(number),
        finished_at=_night(number),
        command="kvfarm nightly",
        seed=number,
        model="gemma-3-1b",
        reference="transformers, float32, no cache",
        provenance={"commit": f"{number:040x}"},
        devices=(),
        recipes=(),
        checks=(),
        legs=(),
        planned_checks=0,
        planned_legs=A_NIGHT,
        gate=_gate(kind) if kind else None,
        tags=(f"v{number // 30}",) if number % 30 == 0 else (),
    )
    store.begin_run(run)
    for name in DEVICES:
        store.add_device(run_id, _device(name))
    # In one transaction: a hundred thousand durable writes would be most of the time.
    legs = [
        _leg(number, device, recipe, prompt, new, leg)
        for device in DEVICES
        for recipe in RECIPES
        for prompt, new in WORKLOADS
        for leg in range(LEGS)
    ]
    payloads = [dump(leg) for leg in legs]
    with transaction(store._engine) as connection:
        rows = [{"run_id": run_id, "digest": digest(text), "payload": text} for text in payloads]
        ordered = insert(Leg).returning(Leg.seq, sort_by_parameter_order=True)
        numbers = connection.scalars(ordered, rows).all()
        connection.execute(
            insert(Measured),
            [
                {"seq": seq, "run_id": run_id, **(measured(leg) or {})}
                for seq, leg in zip(numbers, legs, strict=True)
            ],
        )


def _leg(night: int, device: str, recipe: str, prompt: int, new: int, number: int) -> LegResult:
    speed = 20 + len(recipe) + night % 7
    vitals = VitalsInfo(
        night * 86400.0 + number, 0.5, 4 << 30, (1800000,) * 8, "schedutil", {"cpu": 41.0}, 0, 80.0
    )
    return LegResult(
        device=device,
        recipe=recipe,
        model="gemma-3-1b",
        workload=f"prompt {prompt} + {new} new",
        prompt_tokens=prompt,
        new_tokens=new,
        load_ms=900.0,
        samples=tuple(SampleInfo(5.0 * prompt, (float(speed),) * (new - 1)) for _ in range(REPEATS)),
        peak_rss_bytes=1 << 30,
        kv_bytes=1 << 25,
        nodes_by_provider={"CPUExecutionProvider": 900},
        threads=4,
        validity="NOISY" if night % 11 == 0 else "VALID",
        reasons=(),
        vitals_before=vitals,
        vitals_after=vitals,
        provenance={"commit": f"{night:040x}", "artifact": "a" * 64},
    )


def _gate(kind: str) -> GateInfo:
    side = Side("hybrid", "hybrid", "a" * 64, "{}")
    name = GATE if kind == "gate" else "A/A"
    cells = tuple(
        GateCell(
            id=f"{device}/gemma-3-1b/p{prompt}+n{new}/{metric}",
            comparison=name,
            device=device,
            model="gemma-3-1b",
            workload=f"p{prompt}+n{new}",
            metric=metric,
            title=metric,
            unit="ms",
            exact=False,
            gating=True,
            advisory="",
            margin=0.05,
            verdict="PASS",
            reason="",
            blocks=(0.001,) * 8,
            estimate=0.001,
            low=-0.01,
            high=0.01,
            sd=0.01,
        )
        for device in DEVICES
        for prompt, new in WORKLOADS
        for metric in ("ttft", "decode", "memory")
    )
    return GateInfo(
        kind="gate" if kind == "gate" else "calibration",
        plan_key="key",
        baseline=side,
        candidate=side,
        comparisons=(Comparison(name),),
        looks=(8,),
        alpha=0.01,
        level=0.01,
        planned_cells=len(cells),
        settings="defaults",
        verdict="PASS",
        exit_code=0,
        cells=cells,
    )


def _device(name: str) -> DeviceInfo:
    return DeviceInfo(
        name=name,
        kind="android",
        model="Pixel 8",
        soc="Tensor G3",
        abi="arm64-v8a",
        os="Android 15",
        build="b",
        cores=9,
        ram_bytes=8 << 30,
        providers=("CPUExecutionProvider",),
        runtime={},
    )


if __name__ == "__main__":
    main()

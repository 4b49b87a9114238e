"""From results to the columns they are looked up by. What a number means is defined where it is judged."""

from __future__ import annotations

import hashlib
import json
import math
from typing import Any, TypeVar

from harness.gate.metrics import METRICS
from kvengine.codec import decode, encode
from reports.gate_results import AA, GATE, GateCell, GateInfo, Injection
from reports.results import LegResult, RunResults
from reports.stats import decode_rate

T = TypeVar("T")
CANARY = "canary"  # the arm of its legs
_LATER: dict[str, Any] = {"reads": None, "bandwidth": None, "key": ""}  # fields of a leg, and their defaults
DRILL = "DRILL"  # in a run's provenance: what was made wrong on purpose


def dump(value: Any) -> str:
    return json.dumps(encode(value), separators=(",", ":"), sort_keys=True)


def dump_leg(leg: LegResult) -> str:
    """As ``dump``, without the fields that legs got later where they say nothing: a leg is known by its text,
    and one that an older kvfarm wrote is to be known again."""
    told = {k: value for k, value in encode(leg).items() if k not in _LATER or value != _LATER[k]}
    return json.dumps(told, separators=(",", ":"), sort_keys=True)


def load(kind: type[T], payload: str) -> T:
    return decode(kind, json.loads(payload))


def digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def run_columns(run: RunResults) -> dict[str, Any]:
    return {
        "started_at": run.started_at,
        "finished_at": run.finished_at,
        "model": run.model,
        "command": run.command,
        "code": run.provenance.get("commit", ""),
        "drill": _drill(run),
    }


def _drill(run: RunResults) -> str:
    """What was made wrong on purpose: as the run says, or its gate (a night's says it in words)."""
    said: str = run.provenance.get(DRILL, "") or (run.gate.drill if run.gate else "")
    injected = run.gate is not None and run.gate.kind == "gate" and _injected(run.gate)
    return said or ("a loss was injected into the candidate" if injected else "")


def _injected(gate: GateInfo) -> bool:
    return any(each.injection != Injection() for each in gate.comparisons)


def measured(leg: LegResult) -> dict[str, Any] | None:
    """What history keeps of a leg; None for one that says nothing about its recipe: a warm-up, one of a
    comparison into which a loss was injected. Of a canary its speed alone."""
    place = leg.place
    if place is not None and place.arm == CANARY:
        return _columns(leg) | {"decode": _finite(METRICS["decode"].value(leg))}
    if place is not None and place.comparison not in (GATE, AA):
        return None
    values = {name: METRICS[name].value(leg) for name in ("ttft", "decode", "memory", "energy")}
    values["tokens_per_s"] = decode_rate(leg.samples)
    if place is not None and not leg.memory_pass:
        values["memory"] = None  # in a gate only a process that was weighed by itself tells it
    return _columns(leg) | {name: _finite(value) for name, value in values.items()}


def _columns(leg: LegResult) -> dict[str, Any]:
    place = leg.place
    return {
        "device": leg.device,
        "recipe": leg.recipe,
        "model": leg.model,
        "workload": leg.workload,
        "arm": place.arm if place else "",
        "artifact": leg.provenance.get("artifact", ""),
        "code": leg.provenance.get("commit", ""),
        "validity": leg.validity,
    }


def gate_columns(gate: GateInfo) -> dict[str, Any]:
    return {
        "kind": gate.kind,
        "aa": same(gate),
        "plan_key": gate.plan_key,
        "baseline": gate.baseline.recipe,
        "candidate": gate.candidate.recipe,
        "verdict": gate.verdict,
        "exit_code": gate.exit_code,
        "planned_cells": gate.planned_cells,
    }


def cell_columns(gate: GateInfo) -> list[dict[str, Any]]:
    """One dict for each cell, in order."""
    unaltered = {each.name for each in gate.comparisons if each.injection == Injection()}
    untouched = unaltered if same(gate) else set()
    return [_cell(cell, gate.candidate.recipe, cell.comparison in untouched) for cell in gate.cells]


def same(gate: GateInfo) -> bool:
    """Whether its two sides are the same code, but for what was injected."""
    old, new = gate.baseline, gate.candidate
    return (old.artifact, old.session) == (new.artifact, new.session)


def _cell(cell: GateCell, recipe: str, aa: bool) -> dict[str, Any]:
    names = ("device", "model", "workload", "metric", "comparison", "verdict", "gating", "margin")
    return {
        "recipe": recipe,
        "waived": bool(cell.waived),
        "aa": aa,
        "blocks": len(cell.blocks),
        "ratio": _finite(cell.estimate),
        **{name: getattr(cell, name) for name in names},
        **{n: _finite(getattr(cell, n)) for n in ("low", "high", "sd", "p", "baseline", "candidate")},
    }


def _finite(value: float | None) -> float | None:
    """SQLite keeps no NaN."""
    return value if value is not None and math.isfinite(value) else None

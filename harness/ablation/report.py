"""An ablation for people and for programs: tables for the terminal, ablation.json and index.html."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rich.console import Group
from rich.table import Table
from rich.text import Text

from harness.reporting import finite, replace_file
from kvengine.codec import encode
from reports import text
from reports.ablation import METRICS, DeviceAblation, SeedRow, StepRow, ablations, percent
from reports.ablation_page import render
from reports.results import RunResults

_STYLES = {"reached": "bold green", "not reached": "bold yellow"}


def write(results: RunResults, folder: Path) -> Path:
    """ablation.json (the summary and every raw leg) and index.html in ``folder``; returns the page's path.

    Raises:
        OSError: ``folder`` cannot be made or written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    whole = {"format": "kvfarm-ablation/1", **summary(results), "results": encode(results)}
    replace_file(folder / "ablation.json", json.dumps(finite(whole), indent=1, allow_nan=False) + "\n")
    return render(results, folder)


def summary(results: RunResults) -> dict[str, Any]:
    """What ``--json`` prints: the seed's rows and every step, for each device."""
    return {
        "workload": next((leg.workload for leg in results.legs), ""),
        "planned_legs": results.planned_legs,
        "legs": len(results.legs),
        "infrastructure": list(results.infrastructure),
        "devices": [_device(found) for found in ablations(results)],
    }


def tables(results: RunResults, page: Path) -> Group:
    """For the terminal."""
    parts: list[Any] = []
    for found in ablations(results):
        parts += [_seed_table(found, results), "", _step_table(found), ""]
        parts += [f"{row.metric.title}: {row.why}" for row in found.seed if row.why]
        if found.noisy:
            parts.append(
                f"{found.noisy} of {found.legs} legs are not VALID: these figures show, they decide nothing."
            )
    parts += [f"not measured: {error}" for error in results.infrastructure]
    return Group(*parts, str(page))


def _seed_table(found: DeviceAblation, results: RunResults) -> Table:
    workload = next(leg.workload for leg in results.legs)
    assert results.ablation is not None
    name = f"{found.device} (simulated)" if found.simulated else found.device
    title = f"{results.model}, {name}, {workload}, {results.ablation.weights} weights before and after"
    table = Table(
        "",
        "seed report",
        "improvement",
        "naive",
        "full",
        "improvement",
        "worst – best round",
        "",
        title=title,
    )
    for row in found.seed:
        cells = [row.metric.title, row.seed, percent(row.metric.seed_improvement)]
        cells += [row.metric.show(row.before), row.metric.show(row.after), percent(row.improvement)]
        cells.append(f"{percent(row.low)} – {percent(row.high)}" if row.low is not None else "")
        table.add_row(*cells, Text(row.outcome, style=_STYLES.get(row.outcome, "")))
    return table


def _step_table(found: DeviceAblation) -> Table:
    shown = [index for index in range(len(METRICS)) if any(row.figures[index].values for row in found.rows)]
    table = Table("step", title="each step against the one before, medians over legs")
    for index in shown:
        table.add_column(METRICS[index].title, justify="right")
        table.add_column("", justify="right")
    for heading in ("KV cache", "tokens", "legs (valid)"):
        table.add_column(heading, justify="right")

    def add(row: StepRow, title: str, gains: tuple[float | None, ...]) -> None:
        cells: list[str | Text] = []
        for index in shown:
            gain = gains[index]
            style = "" if gain is None or abs(gain) < 0.01 else "green" if gain > 0 else "yellow"
            cells += [METRICS[index].show(row.figures[index].middle)]
            cells += [Text("" if gain is None else percent(gain), style=style)]
        same = {True: "same", False: "other", None: ""}[row.same_tokens]
        table.add_row(title, *cells, text.byte_size(row.kv_bytes), same, f"{row.legs} ({row.valid})")

    for row in found.rows:
        add(row, row.step.title, row.gains)
    if found.unquantised is not None:
        table.add_section()
        add(found.unquantised, "Full engine, unquantised", (None,) * len(METRICS))
        add(found.rows[-1], found.unquantised.step.title, found.quantised)
    return table


def _device(found: DeviceAblation) -> dict[str, Any]:
    steps = [_step(row, row.gains) for row in found.rows]
    if found.unquantised is not None:
        steps.append(_step(found.unquantised, (None,) * len(METRICS)))
    return {
        "device": found.device,
        "simulated": found.simulated,
        "sentence": found.sentence,
        "legs": found.legs,
        "not_valid": found.noisy,
        "seed": [_seed(row) for row in found.seed],
        "steps": steps,
        "quantised_weights": dict(zip((m.key for m in METRICS), found.quantised, strict=True)),
    }


def _seed(row: SeedRow) -> dict[str, Any]:
    return {
        "metric": row.metric.key,
        "unit": row.metric.unit,
        "seed": row.metric.seed,
        "seed_improvement": row.metric.seed_improvement,
        "before": row.before,
        "after": row.after,
        "improvement": row.improvement,
        "worst_round": row.low,
        "best_round": row.high,
        "outcome": row.outcome,
        "why": row.why,
    }


def _step(row: StepRow, gains: tuple[float | None, ...]) -> dict[str, Any]:
    return {
        "step": row.step.key,
        "recipe": row.step.recipe,
        "values": {m.key: f.values for m, f in zip(METRICS, row.figures, strict=True)},
        "gain": {m.key: gain for m, gain in zip(METRICS, gains, strict=True)},
        "kv_bytes": row.kv_bytes,
        "threads": row.threads,
        "legs": row.legs,
        "valid": row.valid,
        "same_tokens_as_naive": row.same_tokens,
    }

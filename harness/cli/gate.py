"""``kvfarm gate`` and ``calibrate``: is the candidate no worse, and how often is that answer wrong here?"""

from __future__ import annotations

import secrets
import sys
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape

from harness.cli.devices import CACHE
from harness.cli.options import AddressOption, FarmOption, StoreOption
from harness.cli.output import JsonOption, Report, progress, show
from harness.errors import HarnessError
from reports import gate_view

if TYPE_CHECKING:
    from harness.gate.plan import Plan
    from harness.gate.settings import GateSettings
    from harness.store import SqlStore

Planner = Callable[["SqlStore", tuple[str, ...], Report], "Plan"]

DevicesOption = Annotated[
    str,
    typer.Option("--devices", help="host, farm (all), adb, virtual:N, names, pools, or a condition."),
]
ModelOption = Annotated[
    Path | None, typer.Option(help="Hugging Face checkpoint folder, for a REF that is a recipe.")
]
SettingsOption = Annotated[
    Path | None,
    typer.Option("--settings", help="Margins and which cells gate.  [default: ./gate.toml, else built in]"),
]
PromptOption = Annotated[int | None, typer.Option(help="Prompt tokens.  [default: the settings']", min=1)]
NewOption = Annotated[int | None, typer.Option(help="New tokens.  [default: the settings']", min=2)]
RepeatsOption = Annotated[
    int | None, typer.Option(help="Counted generations a leg.  [default: the settings']", min=1)
]
BlocksOption = Annotated[
    int | None,
    typer.Option(help="Take no look beyond so many blocks.", min=4),
]
EnergyOption = Annotated[bool, typer.Option("--energy", help="Also energy per token: minutes a leg.")]
OutputOption = Annotated[
    Path, typer.Option("--report", help="Folder for index.html, results.json, junit.xml, summary.md.")
]
BaselineOption = Annotated[
    str,
    typer.Option(
        metavar="REF",
        help="What to beat, or to calibrate with: a recipe, an artifact folder, RUN[:RECIPE] or a tag.",
    ),
]
TagOption = Annotated[
    list[str] | None, typer.Option(help="Keep the candidate under this name, for later REFs; repeat.")
]


def register(app: typer.Typer) -> None:
    app.command()(gate)
    app.command()(calibrate)


def gate(
    baseline: BaselineOption,
    candidate: Annotated[str, typer.Option(metavar="REF", help="What is to be released, likewise.")],
    devices: DevicesOption = "host",
    model: ModelOption = None,
    settings: SettingsOption = None,
    waivers: Annotated[
        Path | None, typer.Option(help="Losses somebody answers for.  [default: ./waivers.toml, else none]")
    ] = None,
    prompt: PromptOption = None,
    new_tokens: NewOption = None,
    repeats: RepeatsOption = None,
    blocks: BlocksOption = None,
    energy: EnergyOption = False,
    tag: TagOption = None,
    output: OutputOption = Path("report"),
    store: StoreOption = None,
    farm_file: FarmOption = None,
    farm_address: AddressOption = None,
    as_json: JsonOption = False,
) -> None:
    """Measure candidate against baseline in paired blocks and decide.

    The same command goes on after a kill. Exit code 0 PASS, 1 REGRESSED or a waiver has expired,
    2 refused, 3 INCONCLUSIVE (a person decides), 4 INVALID (not measured)."""
    from harness.gate import waivers as waiver_file
    from harness.gate.plan import Plan, looks_up_to
    from harness.gate.references import resolve
    from harness.tags import tags_of
    from reports.gate_results import GATE, Comparison

    rules, source = _settings(settings, prompt, new_tokens, repeats)
    looks = looks_up_to(rules, blocks)
    tags = tags_of(tag or ())
    allowed = waiver_file.load(waivers, datetime.now(UTC).date())

    def plan(results: SqlStore, names: tuple[str, ...], report: Report) -> Plan:
        old, new = (resolve(ref, model, CACHE, results, report) for ref in (baseline, candidate))
        return Plan(
            kind="gate",
            baseline=old,
            candidate=new,
            comparisons=(Comparison(GATE),),
            devices=names,
            settings=rules,
            settings_from=source,
            looks=looks,
            seed=secrets.randbits(32),
            cache=CACHE,
            command=_command(),
            waivers=allowed,
            energy=energy,
            tags=tags,
        )

    _run(plan, devices, store, farm_file, farm_address, output, as_json)


def calibrate(
    baseline: BaselineOption,
    devices: DevicesOption = "host",
    model: ModelOption = None,
    inject: Annotated[
        str, typer.Option(help="Shares of time and memory to add, one comparison each; '' for A/A alone.")
    ] = "0.03,0.05,0.10",
    settings: SettingsOption = None,
    prompt: PromptOption = None,
    new_tokens: NewOption = None,
    repeats: RepeatsOption = None,
    blocks: BlocksOption = 8,
    output: OutputOption = Path("report"),
    store: StoreOption = None,
    farm_file: FarmOption = None,
    farm_address: AddressOption = None,
    as_json: JsonOption = False,
) -> None:
    """Measure how often the gate is wrong here, and what it can see.

    A/A through the gate's own code, then slowdowns and heavier memory that are injected. A cell that
    fails A/A does not gate until it passes. Exit codes are those of kvfarm gate, of the A/A cells."""
    from harness.gate.plan import Plan, calibration_comparisons, looks_up_to
    from harness.gate.references import resolve

    rules, source = _settings(settings, prompt, new_tokens, repeats)
    looks, shares = looks_up_to(rules, blocks), _shares(inject)

    def plan(results: SqlStore, names: tuple[str, ...], report: Report) -> Plan:
        side = resolve(baseline, model, CACHE, results, report)
        return Plan(
            kind="calibration",
            baseline=side,
            candidate=side,
            comparisons=calibration_comparisons(shares),
            devices=names,
            settings=rules,
            settings_from=source,
            looks=looks,
            seed=secrets.randbits(32),
            cache=CACHE,
            command=_command(),
        )

    _run(plan, devices, store, farm_file, farm_address, output, as_json)


def _run(
    plan: Planner,
    devices: str,
    store: str | None,
    farm_file: Path | None,
    farm_address: str | None,
    output: Path,
    as_json: bool,
) -> None:
    """Open store and farm, run the plan, write the report, end with the gate's exit code."""
    from harness import choosing
    from harness.cli.gate_watch import watcher
    from harness.farm import Farm
    from harness.gate.outputs import append_step_summary, write_gate_report
    from harness.gate.plan import must_fit
    from harness.gate.session import GateSession
    from harness.store import open_store
    from harness.trends import series_of_run

    meant = choosing.read(devices, choosing.inventory_for(farm_file, farm_address))
    with open_store(store) as results, progress() as report:
        ready = plan(results, meant.names, report)
        must_fit(ready.baseline, ready.candidate, ready.settings)
        with Farm(meant.inventory, meant.names, farm_address) as farm:
            names = meant.choose(farm.status()).names if meant.condition is not None else meant.names
            found = GateSession(replace(ready, devices=names), farm, results, watcher(report)).run()
        page = write_gate_report(found, output, series_of_run(results, found))
    append_step_summary(found)
    assert found.gate is not None
    told = gate_view.summary(found.gate)
    data: dict[str, Any] = {
        "run": found.run_id,
        "verdict": found.gate.verdict,
        "exit_code": found.gate.exit_code,
        "summary": f"{told.word}: {told.sentence}",
        "planned_cells": told.planned,
        "measured_cells": told.measured,
        "cells": [_cell(row) for row in gate_view.rows(found.gate)],
        "report": str(page),
    }
    lines = [f"{told.word}: {told.headline}. {told.sentence}", *told.remarks]
    if found.gate.kind == "calibration":
        lines.append(gate_view.calibration_sentence(found.gate.calibration))
    show(as_json, data, escape("\n".join([*lines, str(page)])))
    raise typer.Exit(found.gate.exit_code)


def _settings(
    path: Path | None, prompt: int | None, new_tokens: int | None, repeats: int | None
) -> tuple[GateSettings, str]:
    from harness.gate import settings

    rules, source = settings.load(path)
    return settings.with_workload(rules, prompt, new_tokens, repeats), source


def _shares(text: str) -> tuple[float, ...]:
    try:
        shares = tuple(float(part) for part in text.split(",") if part.strip())
    except ValueError:
        raise HarnessError(f"--inject {text!r}: sought shares like 0.03,0.05") from None
    if any(not 0 < share <= 1 for share in shares) or len(set(shares)) != len(shares):
        raise HarnessError(f"--inject {text!r}: sought different shares over 0 and up to 1 (5 % is 0.05)")
    return shares


def _command() -> str:
    from harness.provenance import command_line

    return command_line(["kvfarm", *sys.argv[1:]])


def _cell(row: gate_view.GateRow) -> dict[str, Any]:
    cell = row.cell
    return {
        "id": cell.id,
        "verdict": cell.verdict,
        "gating": cell.gating,
        "waived": cell.waived,
        "reason": cell.reason,
        "estimate": cell.estimate,
        "low": cell.low,
        "high": cell.high,
        "margin": cell.margin,
        "blocks": len(cell.blocks),
        "sd": cell.sd,
        "p": cell.p,
        "sign_flip_p": cell.sign_flip,
    }

"""``kvfarm doctor``: one table of what is wrong, and what to do."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.console import Group
from rich.table import Table
from rich.text import Text

from device_agents.printable import printable
from harness.cli.devices import CACHE
from harness.cli.options import AddressOption, FarmOption
from harness.cli.output import JsonOption, progress, show
from harness.doctor import Row

_STYLES = {"ok": "green", "note": "yellow", "fix": "bold red"}


def register(app: typer.Typer) -> None:
    app.command()(doctor)


def doctor(
    selection: Annotated[
        str | None,
        typer.Option(
            "--devices",
            help="As for `kvfarm devices`.  [default: every device of the farm file, and all that adb knows]",
        ),
    ] = None,
    farm_file: FarmOption = None,
    farm_address: AddressOption = None,
    as_json: JsonOption = False,
) -> None:
    """Say what is wrong with this machine and with every device, and what to do.

    Nothing is changed and no device leased. Exit code 1 when something has to be fixed before these
    devices can be used."""
    from harness import doctor

    with progress() as report:
        patients = doctor.find_patients(selection, farm_file)
        rows = doctor.diagnose(patients, farm_address, CACHE, report)
    ill = [row for row in rows if row.finding.state == "fix"]
    data = {"well": not ill, "findings": [{"where": row.where, **_plain(row)} for row in rows]}
    show(as_json, data, Group(_table(rows), Text(_summary(rows))))
    if ill:
        raise typer.Exit(1)


def _plain(row: Row) -> dict[str, str]:
    finding = row.finding
    return {"what": finding.what, "state": finding.state, "found": finding.found, "do": finding.do}


def _table(rows: tuple[Row, ...]) -> Table:
    table = Table("where", "what", "state")
    for title in ("found", "what to do"):
        table.add_column(title, overflow="fold")  # nothing that is to be done is cut off
    before = ""
    for row in rows:
        if before and row.where != before:
            table.add_section()
        finding, style = row.finding, _STYLES[row.finding.state]
        # As Text: what a device said may look like markup.
        cells = (
            finding.what,
            Text(finding.state, style),
            Text(printable(finding.found)),
            Text(printable(finding.do)),
        )
        table.add_row("" if row.where == before else printable(row.where), *cells)
        before = row.where
    return table


def _summary(rows: tuple[Row, ...]) -> str:
    fixes = sum(row.finding.state == "fix" for row in rows)
    notes = sum(row.finding.state == "note" for row in rows)
    ending = f"; {notes} to know" if notes else ""
    return (f"{fixes} to fix" if fixes else "nothing to fix") + ending

"""``kvfarm compare`` and ``kvfarm trend``: pages over several stored runs. They inform; the gate decides."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from harness.cli.options import StoreOption
from harness.cli.output import JsonOption, show
from harness.cli.runs import must_exist

OutputOption = Annotated[Path, typer.Option("-o", "--output", help="Folder to write.")]


def register(app: typer.Typer) -> None:
    app.command()(compare)
    app.command()(trend)


def compare(
    a: Annotated[str, typer.Argument(metavar="A", help="The run before: an id, a tag or a commit.")],
    b: Annotated[str, typer.Argument(metavar="B", help="The run after.")],
    output: OutputOption = Path("report"),
    store: StoreOption = None,
    as_json: JsonOption = False,
) -> None:
    """Write two stored runs side by side as one page.

    No verdict: stored numbers were not taken side by side. kvfarm gate measures both live."""
    from harness.store import open_store
    from harness.tags import find_run
    from reports.comparison import compare as compared
    from reports.comparison_page import headline, render

    must_exist(store)
    with open_store(store) as results_store:
        first, second = (results_store.results(find_run(name, results_store) or name) for name in (a, b))
    found = compared(first, second)
    page = render(first, second, (a, b), output)
    data = {
        "a": first.run_id,
        "b": second.run_id,
        "headline": headline(found),
        "worse": sum(ratio.word == "worse" for ratio in found.ratios),
        "better": sum(ratio.word == "better" for ratio in found.ratios),
        "compared": len(found.ratios),
        "turned": len(found.turned),
        "report": str(page),
    }
    show(as_json, data, f"{headline(found)}\n{page}")


def trend(
    device: Annotated[
        str | None, typer.Option(help="Only this device; * stands for anything.  [default: all]")
    ] = None,
    model: Annotated[str | None, typer.Option(help="Only this model.  [default: all]")] = None,
    output: OutputOption = Path("report"),
    store: StoreOption = None,
    as_json: JsonOption = False,
) -> None:
    """Write the trend over all stored runs as one page.

    Change points are alerts and never change the exit code."""
    from harness.errors import StoreError
    from harness.store import open_store
    from harness.trends import series_of_store
    from reports.trend import trend_view
    from reports.trend_page import render

    must_exist(store)
    with open_store(store) as results_store:
        series = series_of_store(results_store, device, model)
    view = trend_view(series)
    if view is None:
        raise StoreError("sought a cell that two runs measured, found none; a trend needs several nights")
    page = render(series, output)
    alerts = [
        {"cell": cell.name, "since": change.run_id, "change": change.change, "word": change.word}
        for cell in view.cells
        for change in cell.news
    ]
    data = {"cells": len(view.cells), "runs": view.nights, "alerts": alerts, "report": str(page)}
    show(as_json, data, f"{view.sentence}\n{page}")

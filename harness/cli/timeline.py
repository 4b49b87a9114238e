"""``kvfarm timeline``: what each device of a run did when, for Perfetto."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from harness.cli.options import StoreOption
from harness.cli.output import JsonOption, show
from harness.cli.runs import must_exist
from harness.errors import StoreError


def register(app: typer.Typer) -> None:
    app.command()(timeline)


def timeline(
    run: Annotated[
        str | None, typer.Argument(metavar="[RUN]", help="A run's id or tag.  [default: the newest]")
    ] = None,
    output: Annotated[Path, typer.Option("-o", "--output", help="File to write.")] = Path("trace.json"),
    store: StoreOption = None,
    as_json: JsonOption = False,
) -> None:
    """Write what each device of a run did when: leases, waits, deploys, sessions, programs, legs, retries.

    The file opens in ui.perfetto.dev and chrome://tracing."""
    from harness.reporting import replace_file
    from harness.store import open_store
    from harness.tags import find_run
    from harness.timeline import trace

    must_exist(store)
    with open_store(store) as results:
        run_id = (find_run(run, results) or run) if run else results.latest()
        found = results.results(run_id)
        spans = results.spans(run_id)
        if not spans:
            raise StoreError(
                f"sought when run {run_id} did what, found nothing: it did nothing, or is of an older kvfarm"
            )
    made = trace(found, spans)
    output.parent.mkdir(parents=True, exist_ok=True)
    replace_file(output, json.dumps(made))
    events = len(made["traceEvents"])
    data = {"run": run_id, "file": str(output), "events": events}
    show(as_json, data, f"{output}: {events} events; open it in ui.perfetto.dev")

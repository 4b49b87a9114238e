"""``kvfarm run`` and ``report``: the suite as a command, and its report again from the store."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from harness.cli.options import (
    AddressOption,
    FarmOption,
    PriorityOption,
    StoreOption,
    UserOption,
    WaitOption,
)
from harness.cli.output import JsonOption, note, show
from harness.errors import StoreError
from harness.suite_process import suite_command
from kvengine.codec import decode
from reports.results import RunResults

if TYPE_CHECKING:
    from harness.store import RunSummary


def register(app: typer.Typer) -> None:
    app.command(context_settings={"allow_extra_args": True})(run)
    app.command()(resume)
    app.command()(report)


def run(
    context: typer.Context,
    model: Annotated[Path, typer.Option(help="Hugging Face checkpoint folder to check.")],
    devices: Annotated[
        str, typer.Option(help="host, farm (all), or names of devices and pools: NAME,NAME.")
    ] = "host",
    recipes: Annotated[
        str | None,
        typer.Option(help="Recipes: naive,hybrid,threads=2,int4.  [default: the suite's]"),
    ] = None,
    output: Annotated[Path, typer.Option("--report", help="Folder of the report to write.")] = Path("report"),
    store: StoreOption = None,
    tag: Annotated[
        list[str] | None, typer.Option(help="Keep the run under this name, such as a release; repeat.")
    ] = None,
    farm_file: FarmOption = None,
    farm_address: AddressOption = None,
    user: UserOption = None,
    priority: PriorityOption = 0,
    wait: WaitOption = "1h",
    as_json: JsonOption = False,
) -> None:
    """Run the suite on devices and write the report.

    Arguments after -- go to pytest."""
    options = {"--devices": devices, "--model": model, "--report": output}
    options |= {"--recipes": recipes, "--store": store}
    options |= {"--farm": farm_file, "--farm-address": farm_address}
    options |= {"--user": user, "--priority": priority, "--wait": wait}
    arguments = [f"{name}={value}" for name, value in options.items() if value is not None]
    arguments += [f"--tag={name}" for name in tag or ()]
    older = _written(output)
    code = _pytest(suite_command([*arguments, *context.args]))
    results = _read(output) if _written(output) != older else None
    data: dict[str, Any] = {"exit_code": code, "report": str(output / "index.html")}
    if results is None:
        data["ok"] = False
        show(as_json, data, f"the suite ended with exit code {code} and wrote no results to {output}")
    else:
        data |= _summary(results) | {"ok": code == 0}
        show(as_json, data, f"{data['summary']}\n{data['report']}")
    raise typer.Exit(code)


def resume(
    run_id: Annotated[str | None, typer.Argument(metavar="[RUN]", help="A run's id or tag.")] = None,
    last: Annotated[bool, typer.Option("--last", help="The newest run that is not finished.")] = False,
    store: StoreOption = None,
    as_json: JsonOption = False,
) -> None:
    """Go on with a run that was killed: what is done stays, the rest is done, in the folder it began in.

    The report is written where it was to be written."""
    from harness import resuming
    from harness.store import DEFAULT_STORE, open_store
    from harness.store.spool import SPOOL, SpoolingStore

    if (run_id is None) != last:
        raise typer.BadParameter("sought a run's id or --last, one of them")
    must_exist(store)
    where = store if store and "://" in store else str(Path(store or DEFAULT_STORE).absolute())
    with closing(SpoolingStore(where, SPOOL, run_id or "none", note)) as spooling:
        spooling.adopt()  # perhaps not even its beginning got into the store
        run = resuming.find(spooling, run_id)
    resuming.check_subjects(run)
    assert run.request is not None
    command = [*resuming.command(run.request), f"--store={where}", f"{resuming.OPTION}={run.run_id}"]
    code = _pytest(command, Path(run.request.folder))
    with open_store(where) as results_store:
        results = results_store.results(run.run_id)
    finished = results.finished_at is not None
    data = {"exit_code": code, "ok": code == 0 and finished} | _summary(results)
    show(as_json, data, data["summary"] if finished else f"{data['summary']}\nnot finished yet")
    raise typer.Exit(code)


def report(
    run_id: Annotated[
        str | None, typer.Argument(metavar="[RUN]", help="A run's id or tag.  [default: the newest]")
    ] = None,
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder to write.")] = Path("report"),
    store: StoreOption = None,
    list_runs: Annotated[
        bool, typer.Option("--list", help="List the stored runs and write nothing.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Write the report of a stored run again.

    Also of one that was interrupted."""
    from harness.gate.outputs import write_gate_report
    from harness.reporting import write_report
    from harness.store import open_store
    from harness.tags import find_run
    from harness.trends import series_of_run

    must_exist(store)
    with open_store(store) as results_store:
        if list_runs:
            runs = results_store.runs()
            show(as_json, {"runs": list(runs)}, _table(runs))
            return
        wanted = (find_run(run_id, results_store) or run_id) if run_id else results_store.latest()
        results = results_store.results(wanted)
        trend = series_of_run(results_store, results)
    if results.gate is not None:
        page = write_gate_report(results, output, trend)
        data = {"verdict": results.gate.verdict, "exit_code": results.gate.exit_code, "report": str(page)}
        show(as_json, data, f"{results.gate.verdict}\n{page}")
        return
    page = write_report(results, output, trend)
    data = _summary(results) | {"report": str(page)}
    show(as_json, data, f"{data['summary']}\n{page}")


def _pytest(command: list[str], folder: Path | None = None) -> int:
    """pytest in a process of its own with its output on our stderr; returns its exit code."""
    from harness.provenance import command_line

    note(f"$ {command_line(command)}")
    with subprocess.Popen(command, stdout=sys.stderr.fileno(), cwd=folder) as child:
        try:
            return child.wait()
        except KeyboardInterrupt:
            # Ctrl-C went to the child as well: let it give its devices back and write what it has.
            try:
                child.wait(60)
            except subprocess.TimeoutExpired:
                child.kill()
            raise


def _written(folder: Path) -> int | None:
    """When results.json was written, in ns, so that an older run's is not taken for this one's."""
    path = folder / "results.json"
    return path.stat().st_mtime_ns if path.is_file() else None


def _read(folder: Path) -> RunResults:
    path = folder / "results.json"
    return decode(RunResults, json.loads(path.read_text()), path.name)


def _summary(results: RunResults) -> dict[str, Any]:
    from reports.view import summary_line, verdict

    found = verdict(results)
    return {
        "run_id": results.run_id,
        "state": found.state,
        "sentence": found.sentence,
        "summary": summary_line(results),
        "counts": dataclasses.asdict(found.counts),
    }


def _table(runs: tuple[RunSummary, ...]) -> Table:
    columns = ("run", "started", "finished", "model", "checks", "not passed", "measurements", "gate", "tags")
    table = Table(*columns)
    for r in runs:
        counts = (str(count) for count in (r.checks, r.failed, r.legs))
        told = (r.started_at, r.finished_at or "no", r.model, *counts, r.verdict or "", ", ".join(r.tags))
        table.add_row(r.run_id, *map(escape, told))
    return table


def stored(store: str | None) -> bool:
    """Whether there is a store to read; of one on a server only opening it tells."""
    from harness.store import DEFAULT_STORE

    return "://" in str(store) or Path(store or DEFAULT_STORE).is_file()


def must_exist(store: str | None) -> None:
    """Reading must not make an empty database out of a mistyped path."""
    from harness.store import DEFAULT_STORE

    path = Path(store or DEFAULT_STORE)
    if not stored(store):
        raise StoreError(f"sought a results database at {path}, found none; run `kvfarm run` or give --store")

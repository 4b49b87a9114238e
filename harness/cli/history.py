"""``kvfarm history``, ``tag`` and ``export-results``: what stored runs measured, and under which names."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from harness.cli.output import JsonOption, progress, show
from harness.cli.runs import must_exist
from harness.errors import StoreError
from reports import text
from reports.gate_view import percent
from reports.stats import SMALLEST_CUE

if TYPE_CHECKING:
    from harness.store import GateCellRow, HistoryRow

StoreOption = Annotated[
    str | None, typer.Option(help="Results database: a URL or a SQLite file.  [default: .kvfarm]")
]
_BARS = "▁▂▃▄▅▆▇█"
_POINTS = 12  # of a sparkline


def register(app: typer.Typer) -> None:
    app.command()(history)
    app.command()(tag)
    app.command("export-results")(export_results)


def history(
    device: Annotated[str | None, typer.Option(help="A name; * in any of these stands for anything.")] = None,
    recipe: Annotated[str | None, typer.Option(help="A recipe's name.")] = None,
    model: Annotated[str | None, typer.Option(help="A checkpoint's name.")] = None,
    workload: Annotated[str | None, typer.Option(help="Such as 'prompt 128 + 64 new'.")] = None,
    metric: Annotated[
        str | None,
        typer.Option(help="ttft, decode (inter-token latency), tokens_per_s, memory or energy."),
    ] = None,
    since: Annotated[str | None, typer.Option(help="A date, a time (UTC), or so many days: 30d.")] = None,
    limit: Annotated[int, typer.Option(min=1, help="Rows.")] = 40,
    verdicts: Annotated[
        bool, typer.Option("--verdicts", help="What gates and calibrations said, in place of values.")
    ] = False,
    store: StoreOption = None,
    as_json: JsonOption = False,
) -> None:
    """What stored runs measured, newest first.

    Each value stands beside its change since the run before and the run of its last twelve values."""
    from harness.store import open_store

    must_exist(store)
    chosen: dict[str, Any] = {"device": device, "recipe": recipe, "model": model, "workload": workload}
    chosen |= {"metric": metric, "since": _since(since)}
    with open_store(store) as results:
        if verdicts:
            cells = results.gate_cells(**chosen, limit=limit)
            show(as_json, {"cells": list(cells)}, _verdicts(cells))
            return
        rows = results.history(**chosen)
    told = with_trend(rows)[:limit]
    data = [dataclasses.asdict(row) | {"change": trend.change} for row, trend in told]
    show(as_json, {"rows": data}, _values(told))


def tag(
    run: Annotated[str, typer.Argument(metavar="RUN", help="A run's id or tag, or latest.")],
    names: Annotated[list[str], typer.Argument(metavar="NAME...", help="Such as the release it is of.")],
    store: StoreOption = None,
    as_json: JsonOption = False,
) -> None:
    """Give a stored run names.

    A name means the newest run that has it, for kvfarm gate as a REF and for kvfarm report."""
    from harness.store import open_store
    from harness.tags import find_run, tags_of

    must_exist(store)
    wanted = tags_of(names)
    with open_store(store) as results:
        run_id = results.latest() if run == "latest" else find_run(run, results) or run
        for name in wanted:
            results.add_tag(run_id, name)
    show(as_json, {"run_id": run_id, "tags": list(wanted)}, escape(f"{run_id} is {', '.join(wanted)}"))


def export_results(
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder to write.")] = Path("results"),
    store: StoreOption = None,
    as_json: JsonOption = False,
) -> None:
    """Write all that is stored as Parquet files, one a table.

    runs, devices, checks, legs with their raw samples, infrastructure, gate_cells, history."""
    from harness.store import open_store
    from harness.store.parquet import export

    must_exist(store)
    with open_store(store) as results, progress() as report:
        written = export(results, output, report)
    lines = [f"{output / name}.parquet: {count:,} rows" for name, count in written.items()]
    show(as_json, {"folder": str(output), "rows": written}, escape("\n".join(lines)))


@dataclasses.dataclass(frozen=True)
class Trend:
    """change: value / value of the run before - 1, None for a first one. values: oldest first."""

    change: float | None
    values: tuple[float, ...]


def with_trend(rows: Sequence[HistoryRow]) -> list[tuple[HistoryRow, Trend]]:
    """Each of ``rows`` (newest first) with what came before it of the same device, recipe, model, workload
    and metric, baseline and candidate apart."""
    series: dict[tuple[str, ...], list[float]] = {}
    found = []
    for row in reversed(rows):
        key = (row.device, row.recipe, row.model, row.workload, row.metric, row.arm)
        values = series.setdefault(key, [])
        change = row.value / values[-1] - 1 if values and values[-1] else None
        values.append(row.value)
        found.append((row, Trend(change, tuple(values[-_POINTS:]))))
    return found[::-1]


def sparkline(values: Sequence[float]) -> str:
    """One bar a value, between the lowest and the highest; "" for fewer than two."""
    low, high = min(values), max(values)
    if len(values) < 2:
        return ""
    if low == high:
        return _BARS[0] * len(values)
    return "".join(_BARS[round((value - low) / (high - low) * (len(_BARS) - 1))] for value in values)


def _values(told: Sequence[tuple[HistoryRow, Trend]]) -> Table | str:
    if not told:
        return "nothing measured that fits"
    table = Table()
    for title in ("when", "device", "recipe", "model", "workload", "metric", "value", "change", "trend"):
        table.add_column(title, justify="right" if title in ("value", "change") else "left")
    for title in ("validity", "run", "tags"):
        table.add_column(title)
    for row, trend in told:
        recipe = f"{row.recipe} ({row.arm})" if row.arm else row.recipe
        table.add_row(
            text.moment(row.at),
            *map(escape, (row.device, recipe, row.model, row.workload, row.metric)),
            _shown(row),
            _change(row, trend.change),
            sparkline(trend.values),
            row.validity if row.validity == "VALID" else f"[yellow]{row.validity}[/]",
            escape(row.run_id),
            escape(", ".join(row.tags)),
        )
    return table


def _shown(row: HistoryRow) -> str:
    if row.metric == "memory":
        return text.byte_size(row.value)
    return text.milliseconds(row.value) if row.unit == "ms" else f"{text.number(row.value)} {row.unit}"


def _change(row: HistoryRow, change: float | None) -> str:
    """Coloured where runs differ by more than repeated runs do."""
    if change is None:
        return ""
    worse = change < 0 if row.metric == "tokens_per_s" else change > 0
    color = "red" if worse else "green"
    return f"[{color}]{percent(change)}[/]" if abs(change) >= SMALLEST_CUE else percent(change)


def _verdicts(cells: Sequence[GateCellRow]) -> Table | str:
    if not cells:
        return "no gate's cell that fits"
    table = Table()
    for title in ("when", "verdict", "device", "recipe", "model", "workload", "metric", "comparison"):
        table.add_column(title)
    for title in ("change", "interval", "margin", "block SD"):
        table.add_column(title, justify="right")
    for title in ("run", "tags"):
        table.add_column(title)
    colors = {"PASS": "green", "REGRESSED": "red"}
    for cell in cells:
        notes = [note for note, is_so in (("advisory", not cell.gating), ("waived", cell.waived)) if is_so]
        verdict = f"[{colors.get(cell.verdict, 'yellow')}]{cell.verdict}[/] {', '.join(notes)}".strip()
        low, high = percent(cell.low), percent(cell.high)
        names = (cell.device, cell.recipe, cell.model, cell.workload, cell.metric)
        table.add_row(
            text.moment(cell.at),
            verdict,
            *map(escape, names),
            escape("A/A" if cell.aa else cell.comparison),
            percent(cell.ratio),
            f"{low} to {high}" if cell.low is not None and cell.high is not None else text.MISSING,
            percent(cell.margin, False),
            percent(cell.sd, False),
            escape(cell.run_id),
            escape(", ".join(cell.tags)),
        )
    return table


def _since(given: str | None) -> str | None:
    if given is None or not (days := re.fullmatch(r"(\d{1,5})d", given)):
        return given
    try:
        return (datetime.now(UTC) - timedelta(days=int(days[1]))).isoformat(timespec="seconds")
    except OverflowError:
        raise StoreError(f"--since {given}: there were no tests then; give fewer days") from None

"""``kvfarm history``, ``tag`` and ``export-results``: what stored runs measured, and under which names."""

from __future__ import annotations

import dataclasses
import re
from collections import Counter
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from harness.cli.options import StoreOption
from harness.cli.output import JsonOption, progress, show
from harness.cli.runs import must_exist
from harness.errors import StoreError
from reports import text
from reports.gate_view import percent
from reports.stats import SMALLEST_CUE

if TYPE_CHECKING:
    from harness.store import GateCellRow, HistoryRow, Store

_BARS = "▁▂▃▄▅▆▇█"
_POINTS = 12  # of a sparkline
_WHOLE = ("when (UTC)", "value", "trend", "change", "interval")  # columns that are never broken into lines


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
    chosen |= {"metric": metric, "since": since_when(since), "limit": limit}
    with open_store(store) as results:
        if verdicts:
            cells = results.gate_cells(**chosen)
            show(as_json, {"cells": list(cells)}, _verdicts(cells))
            return
        rows = results.history(**chosen)
        told = with_trend(rows, _before(results, rows, metric))
    data = [row._asdict() | {"change": trend.change} for row, trend in told]
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
    """change: value / value of the run before - 1, None for a first one. values: the newest last."""

    change: float | None
    values: tuple[float, ...]


def with_trend(rows: Sequence[HistoryRow], known: Sequence[HistoryRow]) -> list[tuple[HistoryRow, Trend]]:
    """Each of ``rows`` with what came before it in ``known`` (both newest first)."""
    series: dict[tuple[str, ...], list[HistoryRow]] = {}
    for row in known:
        series.setdefault(_series(row), []).append(row)
    found = []
    for row in rows:
        mine = series[_series(row)]
        at = mine.index(row)
        values = tuple(point.value for point in reversed(mine[at : at + _POINTS]))
        change = values[-1] / values[-2] - 1 if len(values) > 1 and values[-2] else None
        found.append((row, Trend(change, values)))
    return found


def _series(row: HistoryRow) -> tuple[str, ...]:
    """What may be compared over time; baseline and candidate apart."""
    return row.device, row.recipe, row.model, row.workload, row.metric, row.arm


def _before(store: Store, rows: Sequence[HistoryRow], metric: Any) -> list[HistoryRow]:
    """``rows`` and, of each one's series, what came before it as far as a trend shows it."""
    from harness.store import UNITS

    cells = Counter((row.device, row.recipe, row.model, row.workload) for row in rows)
    metrics, arms = 1 if metric else len(UNITS), 2
    found: list[HistoryRow] = []
    for (device, recipe, model, workload), shown in cells.items():
        most = shown + _POINTS * metrics * arms
        found += store.history(
            device=device, recipe=recipe, model=model, workload=workload, metric=metric, limit=most
        )
    return list(dict.fromkeys(found))


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
    rows = []
    for row, trend in told:
        rows.append(
            {
                "when (UTC)": _when(row.at),
                "device": escape(row.device),
                "recipe": escape(f"{row.recipe} ({row.arm})" if row.arm else row.recipe),
                "model": escape(row.model),
                "workload": escape(row.workload),
                "metric": escape(row.metric),
                "value": _shown(row),
                "change": _change(row, trend.change),
                "trend": sparkline(trend.values),
                "validity": row.validity if row.validity == "VALID" else f"[yellow]{row.validity}[/]",
                "run": escape(row.run_id),
                "tags": escape(", ".join(row.tags)),
            }
        )
    return _table(rows, right=("value", "change"), shared=("device", "recipe", "model", "workload", "metric"))


def _table(rows: Sequence[dict[str, str]], right: Sequence[str], shared: Sequence[str]) -> Table:
    """``rows`` by column. Of ``shared`` columns those that say the same in every row are said once, above;
    columns that say nothing are left out."""
    said = {name: {row[name] for row in rows} for name in rows[0]}
    above = [name for name in shared if len(said[name]) == 1]
    title = ", ".join(f"{name} {rows[0][name]}" for name in above)
    table = Table(title=title or None, title_justify="left", title_style="")
    shown = [name for name in rows[0] if name not in above and said[name] != {""}]
    for name in shown:
        table.add_column(name, justify="right" if name in right else "left", no_wrap=name in _WHOLE)
    for row in rows:
        table.add_row(*(row[name] for name in shown))
    return table


def _when(stamp: str) -> str:
    """``2026-01-31 08:00``, UTC."""
    return stamp[:16].replace("T", " ")


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
    colors = {"PASS": "green", "REGRESSED": "red"}
    rows = []
    for cell in cells:
        known = cell.low is not None and cell.high is not None
        notes = {"advisory": not cell.gating, "waived": cell.waived, "drill": bool(cell.drill)}
        verdict = f"[{colors.get(cell.verdict, 'yellow')}]{cell.verdict}[/]"
        rows.append(
            {
                "when (UTC)": _when(cell.at),
                "verdict": ", ".join([verdict, *(note for note, is_so in notes.items() if is_so)]),
                "device": escape(cell.device),
                "recipe": escape(cell.recipe),
                "model": escape(cell.model),
                "workload": escape(cell.workload),
                "metric": escape(cell.metric),
                "comparison": "A/A" if cell.aa else escape(cell.comparison),
                "change": percent(cell.ratio),
                "interval": f"{percent(cell.low)} to {percent(cell.high)}" if known else text.MISSING,
                "margin": percent(cell.margin, False),
                "block SD": percent(cell.sd, False),
                "run": escape(cell.run_id),
                "tags": escape(", ".join(cell.tags)),
            }
        )
    right, shared = ("change", "interval", "margin", "block SD"), ("device", "recipe", "model", "workload")
    return _table(rows, right, (*shared, "metric", "comparison"))


def since_when(given: str | None) -> str | None:
    if given is None or not (days := re.fullmatch(r"(\d{1,5})d", given)):
        return given
    try:
        return (datetime.now(UTC) - timedelta(days=int(days[1]))).isoformat(timespec="seconds")
    except OverflowError:
        raise StoreError(f"--since {given}: there were no tests then; give fewer days") from None

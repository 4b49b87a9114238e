"""What a person sees while blocks are measured: a line a block, a table a look. On stderr."""

from __future__ import annotations

from rich.markup import escape
from rich.table import Table

from harness.cli.output import Console, Report, note
from harness.gate.session import Watcher
from reports import gate_view
from reports import text as words
from reports.gate_results import BlockInfo, GateInfo


def watcher(report: Report) -> Watcher:
    """Of a gate, a calibration or a night."""
    return Watcher(report, _block_line, _look_table, note)


def _block_line(block: BlockInfo, done: int, total: int, left_s: float | None) -> None:
    """``host p128+n64 block 3 ABBA: ttft +0.1 %, decode −0.2 %; canary +0.3 %. 3 of 8, about 2 min left``."""
    data = ", ".join(f"{name} {gate_view.percent(datum)}" for name, datum in block.data.items())
    state = f"void, {block.reasons[0]}" if block.reasons else data
    canary = "" if block.drift is None else f"; canary {gate_view.percent(block.drift)}"
    left = "" if not left_s else f", about {words.seconds(left_s)} left to this look"
    what = block.device if block.comparison == "gate" else f"{block.device} {block.comparison}"
    note(
        f"{what} {block.workload} block {block.index + 1} {block.order}: {state}{canary}. "
        f"{done} of {total} valid{left}"
    )


def _look_table(gate: GateInfo, number: int) -> None:
    """All cells as they stand after a look, on stderr."""
    table = Table(title=f"look {number} of {len(gate.looks)}", title_justify="left")
    for title in ("verdict", "cell", "baseline", "candidate", "change", "interval", "margin", "blocks"):
        table.add_column(title, justify="left" if title in ("verdict", "cell") else "right")
    styles = {"PASS": "green", "REGRESSED": "red", "INCONCLUSIVE": "yellow", "INVALID": "yellow"}
    for row in gate_view.rows(gate):
        style = "yellow" if row.cell.waived else styles[row.cell.verdict]
        verdict = (
            f"[{style}]{row.symbol} {row.word}[/]"
            if row.cell.gating
            else f"{row.symbol} {row.word} (advisory)"
        )
        shown = (row.name, row.baseline, row.candidate, row.change, row.interval, row.margin, row.blocks)
        table.add_row(verdict, *map(escape, shown))
    console = Console(stderr=True, highlight=False)
    Console(stderr=True, highlight=False, width=None if console.is_terminal else 150).print(table)

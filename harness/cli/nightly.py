"""``kvfarm nightly``: a whole night in one command."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Annotated, Any

import typer
from rich.markup import escape

from harness.cli.devices import CACHE
from harness.cli.output import JsonOption, progress, show


def register(app: typer.Typer) -> None:
    app.command()(nightly)


def nightly(
    config: Annotated[Path, typer.Option(help="What the night does; see docs/nightly.md.")] = Path(
        "nightly.toml"
    ),
    as_json: JsonOption = False,
) -> None:
    """Do a night: discover devices, calibrate, check, measure, gate, report.

    The same command goes on after a kill. Exit code 0 PASS, 1 REGRESSED or a waiver has expired,
    2 refused, 3 INCONCLUSIVE (a person decides), 4 INVALID (not measured), 5 WRONG answers."""
    from harness.cli.gate_watch import watcher
    from harness.nightly import settings
    from harness.nightly.night import NightSession, prepare
    from harness.provenance import command_line
    from harness.store import open_store
    from reports import gate_night

    wanted = settings.load(config)
    command = command_line(["kvfarm", *sys.argv[1:]])
    with _terminable(), open_store(wanted.store) as store, progress() as report:
        prepared = prepare(wanted, config, CACHE, store, report)
        night = NightSession(prepared, CACHE, store, watcher(report), command).run()
    told = gate_night.summary(night)
    page = Path(wanted.report) / "index.html"
    data: dict[str, Any] = {
        "night": night.night,
        "verdict": night.word,
        "exit_code": night.exit_code,
        "headline": told.headline,
        "sentence": told.sentence,
        "drill": night.drill,
        "parts": [
            {"name": p.name, "verdict": p.word, "decides": p.decides, "run": p.run_id, "seconds": p.seconds}
            for p in night.parts
        ],
        "calibration": night.calibration,
        "report": str(page),
    }
    drill = [f"DRILL: {night.drill}"] if night.drill else []
    lines = [*drill, f"{told.word}: {told.headline}. {told.sentence}", *told.remarks, night.calibration]
    show(as_json, data, escape("\n".join([*filter(None, lines), str(page)])))
    raise typer.Exit(night.exit_code)


@contextmanager
def _terminable() -> Iterator[None]:
    """Inside, SIGTERM is as Ctrl-C: what was started is stopped, what was done is kept."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)

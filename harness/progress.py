"""What the terminal shows while devices work: a line a test, and which device does what right now."""

from __future__ import annotations

import dataclasses
import re
import shutil
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import pytest

from device_agents.printable import printable
from harness.anywhere import AnyOf
from harness.checking import Tally
from harness.handover import Teller
from harness.outcomes import device_of, label, on_a_device, place_of
from reports.results import CheckResult, RunResults
from reports.verdict import summary_line, verdict

if TYPE_CHECKING:
    from reports.trend import Series

_REDRAW_SECONDS = 0.2
_SHORT_WAIT_S = 0.5  # what nobody needs to be told of
_LINE = "kvfarm"  # the attribute of a report that carries its Line; plain data, for xdist


@dataclass
class Line:
    """What is said of a finished test besides its outcome."""

    label: str
    detail: str = ""
    retried: list[str] = dataclasses.field(default_factory=list)
    word: str = ""  # in place of the outcome's
    said: str = ""  # a further line


class Progress:
    """Counts tests, tells time left. On a terminal the last line is redrawn; in a log nothing is.

    teller: in a worker, which has no terminal, where to say what the device does now.
    """

    def __init__(self, config: pytest.Config, teller: Teller | None = None) -> None:
        self._config = config
        self._teller = teller
        self.live = teller is None and sys.stderr.isatty()
        self._total = self._done = 0
        self._started = time.monotonic()
        self._drawn = 0.0
        self._device = ""
        self._current = "devices"
        self._reporter: Any = None
        self._lines: list[str] = []
        self._waited_for = ""  # reason, without its numbers
        self._retried: list[str] = []  # of the test that runs
        self._screen = threading.Lock()

    def begin(self, total: int) -> None:
        """``total`` tests are about to run."""
        self._total, self._started = total, time.monotonic()
        self._reporter = self._config.pluginmanager.get_plugin("terminalreporter")
        if self._reporter is not None:
            # Our lines replace the file names and the percentage that pytest would weave into them.
            self._reporter.showfspath = False
            self._reporter._show_progress_info = False

    # -- while a test runs ------------------------------------------------------------------------

    def step(self, stage: str, done: int, total: int) -> None:
        """Progress callback of an export (steps) or of sending an artifact (bytes)."""
        share = f" {100 * done // total} %" if total else ""
        self._draw(f"{self._current}, {stage}{share}", force=not total)

    def test_started(self, item: pytest.Item) -> None:
        self._current = label(item)
        self._device = _device_or_nothing(item)
        self._draw(self._current, force=True)

    def program(self, tally: Tally) -> None:
        """Called before each program a check runs."""
        self._draw(f"{self._current}, program {tally.programs}")

    def retried(self, device: str, reason: str) -> None:
        """Called before what infrastructure stopped is tried again."""
        self._draw(f"{device}: tried again after {reason}", force=True)
        # pytest captures what is written while a test runs.
        self._retried.append(reason)

    def waits(self, reason: str) -> None:
        """Called again and again while others have the device, or it is hot; a log is told once of each
        reason."""
        self._draw(f"{self._current}: {reason}")
        shape = re.sub(r"\d+", "", reason)  # the seconds in it change all the time
        capture = self._config.pluginmanager.get_plugin("capturemanager")
        if self._teller is None and not self.live and shape != self._waited_for and capture is not None:
            with capture.global_and_fixture_disabled():
                self._write(f"          {reason}", yellow=True)
        self._waited_for = shape

    def idle(self) -> None:
        """In a worker: its device does nothing now."""
        if self._teller is not None:
            self._teller.tell(self._device, "")

    def devices(self, now: dict[str, str]) -> None:
        """In the controller: what each device does, by name."""
        self._draw(" | ".join(now.values()))

    # -- when it is over --------------------------------------------------------------------------

    def describe(
        self, item: pytest.Item, report: pytest.TestReport, result: CheckResult | None, waited_s: float
    ) -> None:
        """Puts its line on the report of a test, for ``test_finished`` here or in the controller."""
        details = []
        if result is not None and isinstance(place_of(cast("pytest.Function", item)), AnyOf):
            details.append(f"on {result.device}")
        if result is not None and result.programs:
            details.append(f"{result.programs} programs, worst {result.worst_error:.1e}")
        if waited_s >= _SHORT_WAIT_S:
            details.append(f"waited {waited_s:.0f} s")
        retried, self._retried = self._retried, []
        line = Line(label(item), ", ".join(details), retried)
        if result is not None and result.outcome == "not_supported":
            line.word, line.said = "n/a", f"not supported: {result.message}"
        setattr(report, _LINE, dataclasses.asdict(line))

    def describe_lost(self, report: pytest.TestReport, label: str) -> None:
        """As ``describe``, of a test whose process died with it."""
        setattr(report, _LINE, dataclasses.asdict(Line(label, "its worker process died")))

    def test_finished(self, report: pytest.TestReport) -> None:
        """Prints the line that ``describe`` put on the report; nothing for any other report."""
        found = getattr(report, _LINE, None)
        if found is None:
            return
        line = Line(**found)
        self._done += 1
        word = "ok" if report.passed else "ERROR" if report.when == "setup" else "FAILED"
        word = "skip" if report.skipped else word
        word = line.word or word
        text = (
            f"[{self._done:>3}/{self._total}] {word:<6} {report.duration:5.1f} s  {line.label:<76} "
            f"{line.detail}"
        )
        self._write(f"{text:<146} {self._left()}".rstrip(), **_colour(word))
        for reason in line.retried:
            self.tried_again(reason)
        if line.said:
            self._write(f"          {line.said}", yellow=True)

    def tried_again(self, reason: str) -> None:
        self._write(f"          tried again after {reason}", yellow=True)

    def finished(self, results: RunResults, folder: Path | None, trend: Sequence[Series] = ()) -> bool:
        """The run is over: write the report, keep the lines for the summary; True if all is right."""
        with self._screen:
            self._clear()
        self._lines = [summary_line(results)]
        if folder is not None:
            from harness.reporting import write_report  # takes half a second; workers never need it

            self._lines.append(f"report: {write_report(results, folder, trend)}")
        self._lines.append(f"run {results.run_id}, seed {results.seed}")
        return verdict(results).ok

    def unfinished(self, run_id: str, why: str) -> None:
        """The run cannot be finished now; see ``finished``."""
        with self._screen:
            self._clear()
        self._lines = [f"run {run_id} is not finished: {why}"]

    def summary(self, reporter: Any) -> None:
        for index, line in enumerate(self._lines):
            reporter.write_line(line, bold=index == 0)

    # -- inside -----------------------------------------------------------------------------------

    def _left(self) -> str:
        left = self._total - self._done
        if left <= 0:
            return ""
        seconds = (time.monotonic() - self._started) / self._done * left
        return f"about {int(seconds // 60)}:{int(seconds % 60):02d} left"

    def _write(self, text: str, **markup: bool) -> None:
        with self._screen:
            self._clear()
            if self._reporter is not None:
                self._reporter.write_line(printable(text), **markup)

    def _draw(self, text: str, force: bool = False) -> None:
        now = time.monotonic()
        if not force and now - self._drawn < _REDRAW_SECONDS:
            return
        self._drawn = now
        text = printable(text)
        if self._teller is not None:
            self._teller.tell(self._device, text)
        elif self.live:
            width = shutil.get_terminal_size().columns - 1
            with self._screen:
                sys.stderr.write("\r\x1b[K" + f"[{self._done:>3}/{self._total}] {text}"[:width])
                sys.stderr.flush()

    def _clear(self) -> None:
        if self.live:
            sys.stderr.write("\r\x1b[K")
            sys.stderr.flush()


def _device_or_nothing(item: pytest.Item) -> str:
    if isinstance(item, pytest.Function) and any(on_a_device(item, fixture) for fixture in ("cell", "leg")):
        return device_of(item)
    return ""


def _colour(word: str) -> dict[str, bool]:
    return {"ok": {}, "FAILED": {"red": True}}.get(word, {"yellow": True})

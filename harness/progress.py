"""What the terminal shows while devices work: a line a test, and which device does what right now."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import pytest

from harness.checking import Tally
from harness.reporting import write_report
from reports.results import CheckResult, RunResults
from reports.verdict import summary_line, verdict

_REDRAW_SECONDS = 0.2


class Progress:
    """Counts tests, tells time left. On a terminal the last line is redrawn; in a log nothing is."""

    def __init__(self, config: pytest.Config) -> None:
        self._config = config
        self._live = sys.stderr.isatty()
        self._total = self._done = 0
        self._started = time.monotonic()
        self._drawn = 0.0
        self._current = "devices"
        self._reporter: Any = None
        self._lines: list[str] = []
        self._retried: list[str] = []  # of the test that runs

    def begin(self, total: int) -> None:
        """``total`` tests are about to run."""
        self._total, self._started = total, time.monotonic()
        self._reporter = self._config.pluginmanager.get_plugin("terminalreporter")
        if self._reporter is not None:
            # Our lines replace the file names and the percentage that pytest would weave into them.
            self._reporter.showfspath = False
            self._reporter._show_progress_info = False

    def step(self, stage: str, done: int, total: int) -> None:
        """Progress callback of an export (steps) or of sending an artifact (bytes)."""
        share = f" {100 * done // total} %" if total else ""
        self._draw(f"{self._current}, {stage}{share}")

    def test_started(self, item: pytest.Item) -> None:
        self._current = label(item)
        self._draw(self._current, force=True)

    def program(self, tally: Tally) -> None:
        """Called before each program a check runs."""
        self._draw(f"{self._current}, program {tally.programs}")

    def retried(self, device: str, reason: str) -> None:
        """Called before what infrastructure stopped is tried again."""
        self._draw(f"{device}: tried again after {reason}", force=True)
        # pytest captures what is written while a test runs.
        self._retried.append(f"          tried again after {reason}")

    def test_finished(self, item: pytest.Item, report: pytest.TestReport, result: CheckResult | None) -> None:
        self._done += 1
        self._clear()
        retried, self._retried = self._retried, []
        if self._reporter is None:
            return
        word = "ok" if report.passed else "ERROR" if report.when == "setup" else "FAILED"
        word = "skip" if report.skipped else word
        if result is not None and result.outcome == "not_supported":
            word = "n/a"
            retried.append(f"          not supported: {result.message}")
        detail = ""
        if result is not None and result.programs:
            detail = f"{result.programs} programs, worst {result.worst_error:.1e}"
        line = (
            f"[{self._done:>3}/{self._total}] {word:<6} {report.duration:5.1f} s  {label(item):<76} {detail}"
        )
        self._reporter.write_line(f"{line:<146} {self._left()}".rstrip(), **_colour(word))
        for tried in retried:
            self._reporter.write_line(tried, yellow=True)

    def finished(self, results: RunResults, folder: Path | None) -> bool:
        """The run is over: write the report, keep the lines for the summary; True if all is right."""
        self._clear()
        self._lines = [summary_line(results)]
        if folder is not None:
            self._lines.append(f"report: {write_report(results, folder)}")
        self._lines.append(f"run {results.run_id}, seed {results.seed}")
        return verdict(results).ok

    def summary(self, reporter: Any) -> None:
        for index, line in enumerate(self._lines):
            reporter.write_line(line, bold=index == 0)

    def _left(self) -> str:
        left = self._total - self._done
        if not left:
            return ""
        seconds = (time.monotonic() - self._started) / self._done * left
        return f"about {int(seconds // 60)}:{int(seconds % 60):02d} left"

    def _draw(self, text: str, force: bool = False) -> None:
        now = time.monotonic()
        if self._live and (force or now - self._drawn >= _REDRAW_SECONDS):
            self._drawn = now
            sys.stderr.write(f"\r\x1b[K[{self._done:>3}/{self._total}] {text}"[:160])
            sys.stderr.flush()

    def _clear(self) -> None:
        if self._live:
            sys.stderr.write("\r\x1b[K")
            sys.stderr.flush()


def label(item: pytest.Item) -> str:
    """``host · hybrid · any chunking equals one shot``."""
    if not isinstance(item, pytest.Function):
        return item.name
    callspec = getattr(item, "callspec", None)
    what = item.originalname.removeprefix("test_").replace("_", " ")
    return f"{callspec.id} · {what}" if callspec else what


def _colour(word: str) -> dict[str, bool]:
    return {"ok": {}, "FAILED": {"red": True}}.get(word, {"yellow": True})

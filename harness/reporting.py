"""A run's files: index.html, results.json and junit.xml, all made of the same RunResults."""

from __future__ import annotations

import json
import math
import re
import xml.etree.ElementTree as ET
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kvengine.codec import encode
from reports.page import render
from reports.results import CheckResult, NotRun, RunResults
from reports.trend import Series
from reports.view import verdict

# XML 1.0 has no control characters but these three; what a device writes to stderr may hold any.
_NOT_XML = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def write_report(results: RunResults, folder: Path, trend: Sequence[Series] = ()) -> Path:
    """Write the three files into ``folder``, replacing older ones; returns the page's path.

    trend: see harness.trends.

    Raises:
        OSError: ``folder`` cannot be made or written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    replace_file(
        folder / "results.json", json.dumps(finite(encode(results)), indent=1, allow_nan=False) + "\n"
    )
    replace_file(folder / "junit.xml", junit(results))
    return render(results, folder, trend)


def junit(results: RunResults) -> str:
    """JUnit XML: a suite for each device and recipe; an infrastructure failure is an <error>.

    A check that never ran is an <error> too: CI systems show skipped tests as fine.
    """
    root = ET.Element("testsuites", name=f"kvfarm {results.run_id}")
    suites: dict[str, list[CheckResult]] = {}
    for check in results.checks:
        suites.setdefault(f"{check.device}[{check.recipe}]", []).append(check)
    for name, checks in suites.items():
        _suite(root, name, checks, results.started_at)
    if results.not_run:
        _without_device(root, results.not_run)
    errors = list(results.infrastructure)
    unexplained = sum(each.kind == "check" for each in results.not_run)
    if (missing := verdict(results).counts.not_run - unexplained) > 0:
        errors.append(f"{missing} planned checks did not run")
    if errors:
        attributes = {"name": "run", "tests": str(len(errors)), "errors": str(len(errors)), "failures": "0"}
        suite = ET.SubElement(root, "testsuite", attributes)
        for number, message in enumerate(errors, 1):
            case = ET.SubElement(
                suite, "testcase", classname="run", name=f"infrastructure {number}", time="0"
            )
            say(case, "error", message)
    ET.indent(root)
    return ET.tostring(root, encoding="unicode", xml_declaration=True) + "\n"


def _suite(root: ET.Element, name: str, checks: list[CheckResult], started_at: str) -> None:
    outcomes = [check.outcome for check in checks]
    suite = ET.SubElement(
        root,
        "testsuite",
        name=clean(name),
        tests=str(len(checks)),
        failures=str(outcomes.count("failed")),
        errors=str(outcomes.count("infrastructure") + outcomes.count("not_run")),
        skipped=str(outcomes.count("not_supported")),
        time=f"{sum(check.seconds for check in checks):.3f}",
        timestamp=started_at,
    )
    for check in checks:
        case = ET.SubElement(
            suite, "testcase", classname=clean(name), name=clean(check.check), time=f"{check.seconds:.3f}"
        )
        if check.outcome == "failed":
            parts = (check.message, check.program, check.replay)
            say(case, "failure", "\n".join(filter(None, parts)))
        elif check.outcome == "not_supported":
            say(case, "skipped", check.message)
        elif check.outcome != "passed":
            say(case, "error", check.message or "did not run")
        if check.stderr_tail:
            ET.SubElement(case, "system-err").text = clean(check.stderr_tail)


def _without_device(root: ET.Element, tests: Sequence[NotRun]) -> None:
    counts = {"tests": str(len(tests)), "failures": "0", "errors": str(len(tests)), "time": "0"}
    suite = ET.SubElement(root, "testsuite", name="no device", attrib=counts)
    for each in tests:
        case = ET.SubElement(suite, "testcase", classname="no device", name=clean(each.check), time="0")
        say(case, "error", "\n".join((f"no device for {each.condition!r}", *each.reasons)))


def say(case: ET.Element, kind: str, text: str) -> None:
    """A <failure> or <error> with its first line as the message."""
    first = (text.splitlines() or [""])[0]
    ET.SubElement(case, kind, message=clean(first)).text = clean(text)


def clean(text: str) -> str:
    """Text that XML 1.0 can hold."""
    return _NOT_XML.sub("�", text)


def finite(value: Any) -> Any:
    """JSON has no NaN and no infinity; they become null."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def replace_file(path: Path, text: str) -> None:
    """A reader never sees half a file."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)

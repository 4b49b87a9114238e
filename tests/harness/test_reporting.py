"""A run's files say the same as the run, in forms that other tools read."""

from __future__ import annotations

import dataclasses
import json
import math
import xml.etree.ElementTree as ET
from pathlib import Path

from harness.reporting import junit, write_report
from kvengine.codec import decode
from reports.results import CheckResult, RunResults
from tests.harness.test_store import a_check, a_device, a_leg, a_run

FAILED = dataclasses.replace(
    a_check("chunking", "failed"),
    message="row 3 differs\nby 0.2",
    program='{"capacity":1}',
    replay="kvfarm replay x",
)
BROKEN = dataclasses.replace(
    a_check("reset", "infrastructure"), message="runner died", stderr_tail="a\x1b[0mb\x00c"
)


def with_results(*checks: CheckResult) -> RunResults:
    return dataclasses.replace(
        a_run(), devices=(a_device(),), checks=checks, legs=(a_leg(),), planned_checks=len(checks)
    )


def test_results_json_reads_back(tmp_path: Path) -> None:
    results = with_results(a_check(), FAILED, BROKEN)
    page = write_report(results, tmp_path / "out")
    assert page == tmp_path / "out" / "index.html"
    assert {file.name for file in page.parent.iterdir()} == {"index.html", "results.json", "junit.xml"}
    assert decode(RunResults, json.loads((page.parent / "results.json").read_text())) == results


def test_results_json_has_no_nan(tmp_path: Path) -> None:
    write_report(with_results(dataclasses.replace(a_check(), worst_error=math.nan)), tmp_path)
    text = (tmp_path / "results.json").read_text()
    assert json.loads(text, parse_constant=lambda name: 1 / 0)["checks"][0]["worst_error"] is None


def test_junit_tells_failures_from_infrastructure() -> None:
    root = ET.fromstring(junit(with_results(a_check(), FAILED, BROKEN)))
    (suite,) = root
    assert (suite.get("name"), suite.get("tests"), suite.get("failures"), suite.get("errors")) == (
        "host[hybrid]",
        "3",
        "1",
        "1",
    )
    passed, failed, broken = suite
    assert list(passed) == []
    (failure,) = failed
    assert (failure.tag, failure.get("message")) == ("failure", "row 3 differs")
    assert failure.text is not None
    assert "kvfarm replay x" in failure.text
    assert [child.tag for child in broken] == ["error", "system-err"]
    assert broken[1].text == "a�[0mb�c"


def test_junit_says_what_did_not_run_and_what_broke_outside_the_checks() -> None:
    results = dataclasses.replace(with_results(a_check()), planned_checks=4, infrastructure=("cable",))
    run = ET.fromstring(junit(results))[-1]
    assert (run.get("errors"), run.get("failures")) == ("2", "0")
    assert [case[0].get("message") for case in run] == ["cable", "3 planned checks did not run"]


def test_what_is_not_supported_is_skipped_in_junit_with_the_reason() -> None:
    unsupported = dataclasses.replace(a_check("fork", "not_supported"), message="one cache plan")
    root = ET.fromstring(junit(with_results(a_check(), unsupported)))
    (suite,) = root.findall("testsuite")
    assert (suite.get("failures"), suite.get("errors"), suite.get("skipped")) == ("0", "0", "1")
    (skipped,) = suite.iter("skipped")
    assert skipped.get("message") == "one cache plan"

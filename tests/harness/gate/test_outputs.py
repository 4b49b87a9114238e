"""What machines get: JUnit, JSON, GitHub's step summary."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

from harness.gate.outputs import append_step_summary, junit, markdown, write_gate_report
from kvengine.codec import decode
from reports.results import RunResults
from tests.reports.gate_sample import HOSTILE, sample_gate


@pytest.fixture(scope="module")
def gate() -> RunResults:
    return sample_gate()


def test_all_files_are_written_and_json_reads_back(gate: RunResults, tmp_path: Path) -> None:
    page = write_gate_report(gate, tmp_path / "report")
    assert page.name == "index.html"
    assert {f.name for f in page.parent.iterdir()} == {
        "index.html",
        "junit.xml",
        "results.json",
        "summary.md",
    }
    assert decode(RunResults, json.loads((page.parent / "results.json").read_text())) == gate


def test_junit_has_a_case_for_each_gating_cell(gate: RunResults) -> None:
    assert gate.gate is not None
    root = ET.fromstring(junit(gate, gate.gate))
    suites = {suite.attrib["name"]: suite for suite in root}
    assert set(suites) == {"host", "pixel-9", HOSTILE, "waivers"}
    assert (suites["host"].attrib["tests"], suites["host"].attrib["failures"]) == ("3", "1")
    cases = {case.attrib["name"]: [child.tag for child in case] for suite in root for case in suite}
    assert cases["host/gemma-3-1b/p128+n64/decode"] == ["failure"]
    assert cases["pixel-9/gemma-3-1b/p128+n64/decode"] == ["error"]
    assert cases[f"{HOSTILE}/gemma-3-1b/p128+n64/decode"] == ["error"]
    assert cases["pixel-9/gemma-3-1b/p128+n64/ttft"] == ["system-out"]  # waived
    assert cases["y/*"] == ["failure"]  # expired
    assert "host/gemma-3-1b/p128+n64/memory" not in cases  # advisory


def test_the_step_summary_is_a_table_that_nothing_breaks(gate: RunResults) -> None:
    assert gate.gate is not None
    text = markdown(gate, gate.gate)
    assert text.startswith("## ✕ kvfarm gate: REGRESSED\n")
    assert HOSTILE not in text.replace(
        "`kvfarm gate --baseline v1.2 --candidate <img src=x onerror=alert(1)>`", ""
    )
    rows = [line for line in text.splitlines() if line.startswith("| ✕")]
    assert len(rows) == 1
    assert "+5.2 to +7.2 %" in rows[0]


def test_github_gets_the_summary_appended(
    gate: RunResults, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    where = tmp_path / "summary.md"
    where.write_text("before\n")
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(where))
    append_step_summary(gate)
    assert where.read_text().startswith("before\n## ✕ kvfarm gate")

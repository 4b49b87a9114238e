"""What a gate leaves for machines and people: results.json, junit.xml, summary.md and index.html."""

from __future__ import annotations

import json
import os
import xml.etree.ElementTree as ET
from collections.abc import Sequence
from pathlib import Path

from harness.reporting import clean, finite, replace_file, say
from kvengine.codec import encode
from reports import gate_view
from reports.gate_page import render
from reports.gate_results import GateInfo
from reports.results import RunResults
from reports.trend import Series

STEP_SUMMARY = "GITHUB_STEP_SUMMARY"  # set by GitHub Actions: a file to append Markdown to


def write_gate_report(results: RunResults, folder: Path, trend: Sequence[Series] = ()) -> Path:
    """Write all four files into ``folder``, replacing older ones; returns the page's path.

    trend: see harness.trends.

    Raises:
        OSError: ``folder`` cannot be made or written. ValueError: ``results`` are of no gate.
    """
    gate = results.gate
    if gate is None:
        raise ValueError(f"run {results.run_id} is no gate")
    folder.mkdir(parents=True, exist_ok=True)
    replace_file(
        folder / "results.json", json.dumps(finite(encode(results)), indent=1, allow_nan=False) + "\n"
    )
    replace_file(folder / "junit.xml", junit(results, gate))
    replace_file(folder / "summary.md", markdown(results, gate))
    return render(results, folder, trend)


def append_step_summary(results: RunResults) -> None:
    """Also to where GitHub Actions shows it, when we run there."""
    where = os.environ.get(STEP_SUMMARY)
    if where and results.gate is not None:
        with Path(where).open("a", encoding="utf-8") as file:
            file.write(markdown(results, results.gate))


def junit(results: RunResults, gate: GateInfo) -> str:
    """A suite for each device, a case for each gating cell.

    REGRESSED is a failure; INCONCLUSIVE and INVALID are errors, for CI systems show skipped tests as
    fine. Advisory cells are not in it. An expired waiver is a failure of its own.
    """
    root = ET.Element("testsuites", name=f"kvfarm {gate.kind} {results.run_id}")
    suites: dict[str, list[gate_view.GateRow]] = {}
    for row in gate_view.rows(gate):
        if row.cell.gating:
            suites.setdefault(row.cell.device, []).append(row)
    for device, rows in suites.items():
        words = ["PASS" if row.cell.waived else row.cell.verdict for row in rows]
        suite = ET.SubElement(
            root,
            "testsuite",
            name=clean(device),
            tests=str(len(rows)),
            failures=str(words.count("REGRESSED")),
            errors=str(words.count("INCONCLUSIVE") + words.count("INVALID")),
            timestamp=results.started_at,
        )
        for row, word in zip(rows, words, strict=True):
            case = ET.SubElement(
                suite, "testcase", classname=clean(device), name=clean(row.cell.id), time="0"
            )
            told = f"{row.word}: {row.cell.reason}"
            if word == "REGRESSED":
                say(case, "failure", told)
            elif word != "PASS":
                say(case, "error", told)
            else:
                ET.SubElement(case, "system-out").text = clean(told)
    expired = [waiver for waiver in gate.waivers if waiver.state == "expired"]
    if expired:
        count = str(len(expired))
        suite = ET.SubElement(root, "testsuite", name="waivers", tests=count, failures=count, errors="0")
        for waiver in expired:
            case = ET.SubElement(suite, "testcase", classname="waivers", name=clean(waiver.cell), time="0")
            say(case, "failure", f"expired on {waiver.expires}: {waiver.reason} ({waiver.owner})")
    ET.indent(root)
    return ET.tostring(root, encoding="unicode", xml_declaration=True) + "\n"


def markdown(results: RunResults, gate: GateInfo) -> str:
    """GitHub's step summary."""
    found = gate_view.summary(gate, results.finished_at is not None)
    lines = [
        f"## {found.symbol} kvfarm {gate.kind}: {md(found.word)}",
        "",
        *([f"**Drill: {md(gate.drill)}.** Nothing here is said of a release.", ""] if gate.drill else []),
        f"**{md(found.headline)}.** {md(found.sentence)}",
        "",
        f"Baseline `{code(gate.baseline.ref)}`, candidate `{code(gate.candidate.ref)}`, model "
        f"{md(results.model)}. {found.measured} of {found.planned} planned cells measured, "
        f"{found.gating} gating.",
        "",
        *(f"- {md(remark)}" for remark in found.remarks),
        "",
        "| Verdict | Cell | Baseline | Candidate | Change | Interval | Margin | Blocks |",
        "|---|---|--:|--:|--:|---|--:|--:|",
    ]
    for row in gate_view.rows(gate):
        verdict = f"{row.symbol} {row.word}" + ("" if row.cell.gating else " (advisory)")
        shown = [verdict, row.name, row.baseline, row.candidate, row.change, row.interval, row.margin]
        lines.append(f"| {' | '.join(map(md, [*shown, row.blocks]))} |")
    lines += ["", md(gate_view.calibration_sentence(gate.calibration)), ""]
    if gate.waivers:
        lines += [
            "| Waiver | Allowed | Owner | Reason | Issue | Expires | State |",
            "|---|--:|---|---|---|---|---|",
        ]
        for w in gate.waivers:
            parts = [
                w.cell,
                gate_view.percent(w.allowed, False),
                w.owner,
                w.reason,
                w.issue,
                w.expires,
                w.state,
            ]
            lines.append(f"| {' | '.join(map(md, parts))} |")
        lines.append("")
    lines += [f"Run `{code(results.run_id)}`. Again: `{code(results.command)}`", ""]
    return "\n".join(lines)


def md(text: str) -> str:
    """What devices and files say, harmless in a Markdown table."""
    for character in "\\`*_<>|[]":
        text = text.replace(character, f"&#{ord(character)};")
    return " ".join(text.split())


def code(text: str) -> str:
    return " ".join(text.replace("`", "'").split())

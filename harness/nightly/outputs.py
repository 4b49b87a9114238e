"""What a night leaves: its pages, results.json, junit.xml and summary.md; the newest also where CI looks."""

from __future__ import annotations

import json
import os
import shutil
import xml.etree.ElementTree as ET
from collections.abc import Sequence
from pathlib import Path

from harness.gate.outputs import STEP_SUMMARY, code, md
from harness.reporting import clean, finite, replace_file, say
from kvengine.codec import encode
from reports import gate_night
from reports.gate_night import NightInfo
from reports.gate_night_page import render
from reports.text import seconds


def write(night: NightInfo, history: Sequence[NightInfo], report: Path) -> Path:
    """``report``/NIGHT/ with all of the night, and the newest night's index in ``report``; returns that page.

    Raises:
        OSError: ``report`` cannot be made or written.
    """
    folder = report / night.night
    folder.mkdir(parents=True, exist_ok=True)
    replace_file(folder / "results.json", json.dumps(finite(encode(night)), indent=1, allow_nan=False) + "\n")
    replace_file(folder / "junit.xml", junit(night, folder))
    replace_file(folder / "summary.md", markdown(night, folder))
    render(night, history, folder, here="", others="../")
    for name in ("results.json", "junit.xml", "summary.md"):
        shutil.copyfile(folder / name, report / name)
    return render(night, history, report, here=f"{night.night}/", others="")


def append_step_summary(night: NightInfo, report: Path) -> None:
    """Also to where GitHub Actions shows it, when we run there."""
    if where := os.environ.get(STEP_SUMMARY):
        with Path(where).open("a", encoding="utf-8") as file:
            file.write(markdown(night, report / night.night))


def junit(night: NightInfo, folder: Path) -> str:
    """The suites of every part that decides, and one case for each part.

    WRONG and REGRESSED are failures; all else that is not PASS is an error, for CI systems show skipped
    tests as fine. A part that was not reached is an error too.
    """
    done = {part.name: part for part in night.parts}
    words = [done[name].word if name in done else "INVALID" for name in night.planned]
    judged = [w for n, w in zip(night.planned, words, strict=True) if n not in done or done[n].decides]
    root = ET.Element("testsuites", name=f"kvfarm {night.name} {night.night}")
    failures = sum(word in ("WRONG", "REGRESSED") for word in judged)
    errors = sum(word in ("INCONCLUSIVE", "INVALID") for word in judged)
    counts = {"tests": str(len(words)), "failures": str(failures), "errors": str(errors)}
    suite = ET.SubElement(root, "testsuite", name="night", timestamp=night.started_at, attrib=counts)
    for name in night.planned:
        part = done.get(name)
        took = f"{part.seconds:.3f}" if part else "0"
        case = ET.SubElement(suite, "testcase", classname="night", name=name, time=took)
        told = f"{part.word}: {part.headline}. {part.sentence}" if part else "not reached"
        if part is not None and (part.word == "PASS" or not part.decides):
            ET.SubElement(case, "system-out").text = clean(told)
        else:
            failed = part is not None and part.word in ("WRONG", "REGRESSED")
            say(case, "failure" if failed else "error", told)
    for part in night.parts:
        file = folder / part.name / "junit.xml"
        if part.decides and file.is_file():
            for theirs in ET.parse(file).getroot():
                theirs.set("name", f"{part.name}: {theirs.get('name', '')}")
                root.append(theirs)
    ET.indent(root)
    return ET.tostring(root, encoding="unicode", xml_declaration=True) + "\n"


def markdown(night: NightInfo, folder: Path) -> str:
    """GitHub's step summary: the night's verdict, its parts, and what the gate wrote."""
    told = gate_night.summary(night)
    lines = [
        f"# {told.symbol} kvfarm {md(night.name)}: {told.word}",
        "",
        *([f"**Drill: {md(night.drill)}.** Nothing here is said of a release.", ""] if night.drill else []),
        f"**{md(told.headline)}.** {md(told.sentence)}",
        "",
        *(f"- {md(remark)}" for remark in told.remarks),
        "",
        "| Part | Outcome | Found | Took |",
        "|---|---|---|--:|",
    ]
    for part in night.parts:
        word = f"{gate_night.SYMBOLS[part.word]} {part.word}" + ("" if part.decides else " (informs)")
        found = md(f"{part.headline}. {part.sentence}")
        lines.append(f"| {md(part.title)} | {word} | {found} | {seconds(part.seconds)} |")
    lines += [
        "",
        md(night.calibration),
        "",
        f"Night `{code(night.night)}`. Again: `{code(night.command)}`",
        "",
    ]
    gate = folder / "gate" / "summary.md"
    return "\n".join([*lines, gate.read_text(encoding="utf-8") if gate.is_file() else ""])

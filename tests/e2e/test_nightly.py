"""A night for real, a drill: killed, gone on with, and red for the wrong answers that were put into it."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
import xml.etree.ElementTree as ET
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from device_agents.deadline import Deadline
from harness.store import open_store
from harness.synth import synth
from kvengine.codec import decode
from reports.gate_night import NightInfo

NIGHT = """
model = "tiny"
baseline = "static"
candidate = "hybrid"
devices = "host"
report = "out"
parts = ["check"]
[check]
examples = 10
only = "p01 or p09"
[drill]
mutant = "window one too wide"
"""
# They outlive their raylet by a minute, trying to reach it (tests/e2e/test_parallel_run.py waits for them).
RAYS_OWN = ("ray::DashboardAgent", "ray::RuntimeEnvAgent")
COMMAND = [sys.executable, "-c", "from harness.cli import main; main()", "nightly", "--json"]


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    synth("tiny-gemma3", tmp_path / "tiny")
    (tmp_path / "nightly.toml").write_text(NIGHT)
    yield tmp_path
    assert processes_in(tmp_path) == []


def processes_in(folder: Path) -> list[str]:
    """Command lines of what works in ``folder`` or was told of it."""
    found = []
    for process in psutil.process_iter():
        try:
            line = " ".join(process.cmdline())
            if line.startswith(RAYS_OWN):
                continue
            if process.pid != psutil.Process().pid and (process.cwd() == str(folder) or str(folder) in line):
                found.append(line)
        except psutil.Error:
            continue
    return found


def at_work(folder: Path, night: subprocess.Popen[bytes]) -> bool:
    """Whether its suite has begun: the run is in the store before its first check."""
    assert night.poll() is None, night.communicate()[0].decode()
    database = folder / ".kvfarm" / "results.db"
    if not database.exists():
        return False
    with open_store(database) as store:
        return bool(store.runs())


def wait_for(what: str, true: Callable[[], bool]) -> None:
    deadline = Deadline(120)
    while not true():
        deadline.check(what)
        time.sleep(0.1)


def test_a_drill_is_killed_goes_on_and_finds_the_wrong_answers(folder: Path) -> None:
    with subprocess.Popen(COMMAND, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as night:
        try:
            wait_for("its suite", lambda: at_work(folder, night))
        finally:
            night.send_signal(signal.SIGKILL)
    wait_for("the end of all that the night had started", lambda: processes_in(folder) == [])

    done = subprocess.run(COMMAND, cwd=folder, capture_output=True, text=True, timeout=200, check=False)
    assert "going on with night" in done.stderr, done.stderr
    assert done.returncode == 5, done.stderr
    said = json.loads(done.stdout)
    assert (said["verdict"], said["exit_code"]) == ("WRONG", 5)
    night_info = decode(NightInfo, json.loads((folder / "out" / "results.json").read_text()))
    assert (night_info.starts, night_info.devices[0].error) == (2, "")
    page = (folder / "out" / "index.html").read_text()
    assert "window one too wide" in page
    check = folder / "out" / night_info.night / "check"
    results = json.loads((check / "results.json").read_text())
    failed = {c["check"]: c["message"] for c in results["checks"] if c["outcome"] == "failed"}
    # Another seed each night: it is the logits or a greedy token that a smallest program shows to be wrong.
    assert "reference" in failed["test_p01_every_step_equals_the_reference"]
    assert "window one too wide" in results["provenance"]["DRILL"]
    assert ET.parse(folder / "out" / "junit.xml").getroot().findall(".//failure")
    exported = [path.parent.name for path in (folder / ".kvfarm" / "artifacts").glob("*/artifact.json")]
    assert len(exported) == 1, "only the baseline's: what a drill exports lies apart"
